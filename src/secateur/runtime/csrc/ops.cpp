// The kernels as torch operators, through torch's stable ABI: one binary serves later versions of torch, and work is shared among torch's
// own threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "sparse.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace secateur {
namespace {

const Kernels& best() {
#if defined(__x86_64__)
  static const Kernels& found = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512dq") ? kernels_avx512
                                : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")       ? kernels_avx2
                                                                                                        : kernels_baseline;
  return found;
#else
  return kernels_baseline;
#endif
}

const Kernels& chosen(int64_t isa) {
#if defined(__x86_64__)
  if (isa == 1) return kernels_baseline;
  if (isa == 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2;
#endif
  return best();
}

void check(const Tensor& t, ScalarType type, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.is_cpu(), "secateur: ", what, " must be a contiguous CPU tensor of its type");
}

// Everything that the kernels rely on, so that no content of the tensors makes them read or write elsewhere.
Matrix matrix(const Tensor& values, const Tensor& index, const Tensor& starts, const std::optional<Tensor>& bias, int64_t rows, int64_t columns,
              int64_t r, int64_t set, bool relu) {
  check(values, ScalarType::Float, "values");
  check(index, ScalarType::Short, "index");
  check(starts, ScalarType::Int, "starts");
  STD_TORCH_CHECK(r == 1 || r == 4 || r == 8, "secateur: blocks of ", r, " rows; there are 1, 4 and 8");
  constexpr int64_t MOST = int64_t(1) << 40;  // so that sets times blocks can be counted
  STD_TORCH_CHECK(rows > 0 && rows < MOST && columns > 0 && columns < MOST && set > 0 && set <= 65536, "secateur: rows, columns or set out of range");
  Matrix m{values.const_data_ptr<float>(), reinterpret_cast<const uint16_t*>(index.const_data_ptr<int16_t>()), starts.const_data_ptr<int32_t>(),
           nullptr, rows, columns, set, static_cast<int32_t>(r), relu};
  int64_t count;
  const int64_t n = index.numel();
  STD_TORCH_CHECK(!__builtin_mul_overflow(m.sets(), m.blocks(), &count), "secateur: rows, columns or set out of range");
  STD_TORCH_CHECK(starts.numel() == count + 1 && values.numel() == n * r, "secateur: values, index and starts do not belong together");
  STD_TORCH_CHECK(m.starts[0] == 0 && m.starts[count] == n, "secateur: starts do not span the index");
  for (int64_t i = 0; i < count; i++) STD_TORCH_CHECK(m.starts[i] <= m.starts[i + 1], "secateur: starts go back");
  for (int64_t q = 0; q < m.sets(); q++) {
    const int32_t *begin = m.starts + q * m.blocks(), *end = begin + m.blocks();
    STD_TORCH_CHECK(best().largest(m.index + *begin, *end - *begin) < std::min(set, columns - q * set), "secateur: a column is out of range");
  }
  if (bias) {
    check(*bias, ScalarType::Float, "bias");
    STD_TORCH_CHECK(bias->numel() == rows, "secateur: one bias for each row");
    m.bias = bias->const_data_ptr<float>();
  }
  return m;
}

// Runs work(item, from, to) for all items and all blocks of rows; rows are split where there are fewer items than threads.
template <class Work>
void shared(int64_t items, int64_t blocks, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = items % threads == 0 ? 1 : std::min(blocks, items > 2 * threads ? 1 : threads);
  torch::stable::parallel_for(0, items * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) work(i / chunks, i % chunks * blocks / chunks, (i % chunks + 1) * blocks / chunks);
  });
}

Tensor sparse_linear(Tensor x, Tensor values, Tensor index, Tensor starts, std::optional<Tensor> bias, int64_t rows, int64_t columns, int64_t r,
                     int64_t set, bool relu, int64_t isa) {
  check(x, ScalarType::Float, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns, "secateur: x has other columns than the weight");
  const Matrix m = matrix(values, index, starts, bias, rows, columns, r, set, relu);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t tokens = x.numel() / columns, tiles = (tokens + TILE - 1) / TILE;
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  shared(tiles, m.blocks(), [&](int64_t tile, int64_t first, int64_t last) {
    chosen(isa).linear(m, from, to, tile * TILE, std::min(tokens, (tile + 1) * TILE), first, last);
  });
  return y;
}

// The window, which is kernel, stride, padding and dilation, over images x (N, C, H, W).
Window windowed(const Tensor& x, const int64_t* window) {
  STD_TORCH_CHECK(x.dim() == 4, "secateur: x is (N, C, H, W)");
  Window w{x.size(1), x.size(2), x.size(3), 0, 0, window[0], window[1], window[2], window[3], window[4], window[5], window[6], window[7]};
  constexpr int64_t LARGE = int64_t(1) << 20;  // of any size, so that products of two of them and sums of those can be counted
  for (int i = 0; i < 8; i++) STD_TORCH_CHECK(window[i] < LARGE, "secateur: no such window");
  STD_TORCH_CHECK(w.height < LARGE && w.width < LARGE, "secateur: the image is too large");
  for (int i = 0; i < 8; i++) STD_TORCH_CHECK(window[i] > 0 || (window[i] == 0 && (i == 4 || i == 5)), "secateur: no such window");
  const int64_t high = w.height + 2 * w.pad_h - w.dilation_h * (w.kernel_h - 1) - 1, wide = w.width + 2 * w.pad_w - w.dilation_w * (w.kernel_w - 1) - 1;
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "secateur: the window is larger than the padded image");
  w.out_height = high / w.stride_h + 1, w.out_width = wide / w.stride_w + 1;
  return w;
}

Tensor convolved(const Tensor& x, const Tensor& values, const Tensor& index, const Tensor& starts, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& plus, int64_t rows, int64_t columns, int64_t r, int64_t set, bool relu, const int64_t* window, int64_t isa) {
  check(x, ScalarType::Float, "x");
  const Window w = windowed(x, window);
  int64_t taps;
  STD_TORCH_CHECK(!__builtin_mul_overflow(w.channels, w.kernel_h * w.kernel_w, &taps), "secateur: no such window");
  STD_TORCH_CHECK(taps == columns, "secateur: expected x to have ", columns / (w.kernel_h * w.kernel_w), " channels, but it has ", w.channels);
  const Matrix m = matrix(values, index, starts, bias, rows, columns, r, set, relu);
  const int64_t buffer = best().conv_buffer(w);
  STD_TORCH_CHECK(buffer >= 0 && buffer < INT32_MAX - TILE, "secateur: the image is too large");
  const int64_t shape[] = {x.size(0), rows, w.out_height, w.out_width};
  if (plus) {
    check(*plus, ScalarType::Float, "plus");
    STD_TORCH_CHECK(plus->dim() == 4 && std::equal(shape, shape + 4, plus->sizes().begin()), "secateur: what is added has another shape");
  }
  Tensor y = torch::stable::new_empty(x, {shape[0], shape[1], shape[2], shape[3]});
  std::unique_ptr<int32_t[]> offsets(new int32_t[m.columns]);
  const Kernels& kernels = chosen(isa);
  kernels.conv_offsets(w, offsets.get());
  const float *from = x.const_data_ptr<float>(), *added = plus ? plus->const_data_ptr<float>() : nullptr;
  float* to = y.mutable_data_ptr<float>();
  const int64_t parts = kernels.conv_parts(w), image = w.channels * w.height * w.width, result = rows * w.out_height * w.out_width;
  shared(x.size(0) * parts, m.blocks(), [&](int64_t item, int64_t first, int64_t last) {
    const int64_t at = item / parts * result;
    kernels.conv(m, w, offsets.get(), from + item / parts * image, added ? added + at : nullptr, to + at, item % parts, first, last);
  });
  return y;
}

Tensor sparse_conv2d(Tensor x, Tensor values, Tensor index, Tensor starts, std::optional<Tensor> bias, std::optional<Tensor> plus, int64_t rows,
                     int64_t columns, int64_t r, int64_t set, bool relu, std::vector<int64_t> window, int64_t isa) {
  STD_TORCH_CHECK(window.size() == 8, "secateur: the window has kernel, stride, padding and dilation");
  return convolved(x, values, index, starts, bias, plus, rows, columns, r, set, relu, window.data(), isa);
}

Tensor max_pool2d(Tensor x, std::vector<int64_t> window, int64_t isa) {
  check(x, ScalarType::Float, "x");
  STD_TORCH_CHECK(window.size() == 8, "secateur: the window has kernel, stride, padding and dilation");
  const Window w = windowed(x, window.data());
  STD_TORCH_CHECK(2 * w.pad_h <= w.kernel_h && 2 * w.pad_w <= w.kernel_w, "secateur: the padding is more than half of the window");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), w.out_height, w.out_width});
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; c++) chosen(isa).pool(w, from + c * w.height * w.width, to + c * w.out_height * w.out_width);
  });
  return y;
}

// What one convolution of a chain is: numbers of values (those given first, then the outputs one after the other; -1: none) and of weights.
struct Step {
  int64_t source, plus, values, index, starts, bias, rows, columns, r, set, relu, window[8];
};

// Convolutions one after the other: where images are small, calling each by itself takes longer than what it computes.
std::vector<Tensor> sparse_chain(std::vector<Tensor> given, std::vector<Tensor> weights, std::vector<int64_t> steps, std::vector<int64_t> results) {
  constexpr size_t EACH = sizeof(Step) / sizeof(int64_t);
  STD_TORCH_CHECK(steps.size() % EACH == 0, "secateur: a step has ", EACH, " numbers");
  std::vector<Tensor> values = std::move(given);
  const auto one = [](const std::vector<Tensor>& list, int64_t i) -> const Tensor& {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(list.size()), "secateur: a step names a tensor that is not there");
    return list[i];
  };
  const auto maybe = [&](const std::vector<Tensor>& list, int64_t i) { return i == -1 ? std::nullopt : std::optional<Tensor>(one(list, i)); };
  for (size_t at = 0; at < steps.size(); at += EACH) {
    Step s;
    std::memcpy(&s, steps.data() + at, sizeof(Step));
    values.push_back(convolved(one(values, s.source), one(weights, s.values), one(weights, s.index), one(weights, s.starts), maybe(weights, s.bias),
                               maybe(values, s.plus), s.rows, s.columns, s.r, s.set, s.relu, s.window, 0));
  }
  std::vector<Tensor> found;
  for (const int64_t i : results) found.push_back(one(values, i));
  return found;
}

Tensor sparse_decode(Tensor x, Tensor values, Tensor masks, Tensor starts, std::optional<Tensor> bias, int64_t rows, int64_t columns, int64_t isa) {
  const bool half = values.scalar_type() == ScalarType::BFloat16;
  check(x, ScalarType::Float, "x");
  check(values, half ? ScalarType::BFloat16 : ScalarType::Float, "values");
  check(masks, ScalarType::Int, "masks");
  check(starts, ScalarType::Long, "starts");
  constexpr int64_t MOST = int64_t(1) << 40;
  STD_TORCH_CHECK(rows > 0 && rows < MOST && columns > 0 && columns < MOST && x.dim() > 0 && x.size(x.dim() - 1) == columns,
                  "secateur: x has other columns than the weight");
  const int64_t blocks = (rows + 7) / 8, chunks = (columns + 31) / 32, tokens = x.numel() / columns;
  int64_t bits;
  STD_TORCH_CHECK(!__builtin_mul_overflow(blocks, chunks * 8, &bits), "secateur: rows or columns out of range");
  STD_TORCH_CHECK(masks.numel() == bits && starts.numel() == blocks + 1, "secateur: masks and starts do not belong together");
  Bits m{values.const_data_ptr(), reinterpret_cast<const uint32_t*>(masks.const_data_ptr<int32_t>()), starts.const_data_ptr<int64_t>(), nullptr, rows,
         columns, half};
  STD_TORCH_CHECK(m.starts[0] == 0 && m.starts[blocks] == values.numel() - 32, "secateur: starts do not span the values");
  for (int64_t b = 0; b < blocks; b++) STD_TORCH_CHECK(m.starts[b] <= m.starts[b + 1], "secateur: starts go back");
  if (bias) {
    check(*bias, ScalarType::Float, "bias");
    STD_TORCH_CHECK(bias->numel() == rows, "secateur: one bias for each row");
    m.bias = bias->const_data_ptr<float>();
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const Kernels& kernels = chosen(isa);
  std::vector<float> padded(tokens * chunks * 32);
  for (int64_t t = 0; t < tokens; t++) kernels.arrange(m, x.const_data_ptr<float>() + t * columns, padded.data() + t * chunks * 32);
  float* to = y.mutable_data_ptr<float>();
  std::atomic<bool> whole{true};
  torch::stable::parallel_for(0, blocks, 16, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; t < tokens; t++)
      if (!kernels.decode(m, padded.data() + t * chunks * 32, to + t * rows, first, last)) whole = false;
  });
  STD_TORCH_CHECK(whole, "secateur: masks and values do not belong together");
  return y;
}

STABLE_TORCH_LIBRARY(secateur, m) {
  m.def("sparse_decode(Tensor x, Tensor values, Tensor masks, Tensor starts, Tensor? bias, int rows, int columns, int isa=0) -> Tensor");
  m.def("sparse_linear(Tensor x, Tensor values, Tensor index, Tensor starts, Tensor? bias, int rows, int columns, int r, int set, bool relu, int isa=0) "
        "-> Tensor");
  m.def("sparse_conv2d(Tensor x, Tensor values, Tensor index, Tensor starts, Tensor? bias, Tensor? plus, int rows, int columns, int r, int set, bool relu, "
        "int[] window, int isa=0) -> Tensor");
  m.def("max_pool2d(Tensor x, int[] window, int isa=0) -> Tensor");
  m.def("sparse_chain(Tensor[] given, Tensor[] weights, int[] steps, int[] results) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("sparse_chain", TORCH_BOX(&sparse_chain));
}

}  // namespace
}  // namespace secateur
