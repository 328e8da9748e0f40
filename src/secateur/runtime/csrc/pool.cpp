// The largest of every window of an image: down the columns first, then along the rows.
#include "blocks.h"

namespace secateur {
namespace SECATEUR_ISA {
namespace {

thread_local Buffer largest_down;

// A NaN is larger than all.
inline Vector larger(Vector a, Vector b) { return (a > b) | (a != a) ? a : b; }
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace

// y (out_height, out_width) of one channel x (height, width)
void pool(const Window& w, const float* x, float* y) {
  const int64_t left = (w.pad_w + WIDTH - 1) / WIDTH * WIDTH, end = left + (w.out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
  float* down = largest_down.floats(std::max(end, left + w.width) + 2 * WIDTH);
  std::fill(down, down + std::max(end, left + w.width) + 2 * WIDTH, -INFINITY);
  for (int64_t i = 0; i < w.out_height; i++, y += w.out_width) {
    bool first = true;
    for (int64_t k = 0; k < w.kernel_h; k++) {
      const int64_t row = i * w.stride_h + k * w.dilation_h - w.pad_h;
      if (row < 0 || row >= w.height) continue;
      const float* from = x + row * w.width;
      int64_t j = 0;
      for (; j + WIDTH <= w.width; j += WIDTH) {
        const Vector now = *reinterpret_cast<const Loose*>(from + j);
        Vector* const at = reinterpret_cast<Vector*>(down + left + j);
        *at = first ? now : larger(*at, now);
      }
      for (; j < w.width; j++) down[left + j] = first ? from[j] : larger(down[left + j], from[j]);
      first = false;
    }
    if (first) std::fill(down + left, down + left + w.width, -INFINITY);
    const float* begin = down + left - w.pad_w;
    int64_t j = 0;
    if (w.stride_w <= 2)
      for (; j + WIDTH <= w.out_width; j += WIDTH) {
        Vector most;
        for (int64_t k = 0; k < w.kernel_w; k++) {
          const float* at = begin + j * w.stride_w + k * w.dilation_w;
          const Vector now = w.stride_w == 1 ? Vector(*reinterpret_cast<const Loose*>(at)) : Vector(EverySecond{at}.at<WIDTH>(0));
          most = k ? larger(most, now) : now;
        }
        *reinterpret_cast<Loose*>(y + j) = most;
      }
    for (; j < w.out_width; j++) {
      float most = begin[j * w.stride_w];
      for (int64_t k = 1; k < w.kernel_w; k++) most = larger(most, begin[j * w.stride_w + k * w.dilation_w]);
      y[j] = most;
    }
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
