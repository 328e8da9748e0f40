// Runs a packaged model without Python: run KERNELS.so MODEL.pt2 N C H W
// The input is 0, 1/n, 2/n ... in that shape; printed are the sum of the outputs and the milliseconds of a call.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

int main(int count, char** given) {
  if (count < 4) return std::fprintf(stderr, "run KERNELS.so MODEL.pt2 SIZE ...\n"), 2;
  if (!dlopen(given[1], RTLD_NOW | RTLD_GLOBAL)) return std::fprintf(stderr, "%s\n", dlerror()), 1;  // registers the sparse operators
  std::vector<int64_t> shape;
  for (int i = 3; i < count; i++) shape.push_back(std::atoll(given[i]));
  const c10::InferenceMode mode;
  torch::Tensor x = torch::zeros(shape);
  x = (torch::arange(x.numel()) / float(x.numel())).view(shape);
  torch::inductor::AOTIModelPackageLoader model(given[2]);
  std::vector<torch::Tensor> inputs{x};
  auto outputs = model.run(inputs);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; i++) outputs = model.run(inputs);
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / 10;
  std::printf("%.6f %.3f\n", outputs[0].sum().item<double>(), took * 1e3);
}
