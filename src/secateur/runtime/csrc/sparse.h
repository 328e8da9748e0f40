// What the kernels are given, and the table of them that each instruction set fills.
#pragma once
#include <cstdint>

namespace secateur {

constexpr int64_t TILE = 64;  // columns (tokens or pixels) that are worked on together

// A sparse matrix (rows, columns) in blocks of `r` rows that share their columns. Columns come in sets of `set`, so that what a set
// reads stays in the cache: block b of set q has the columns q * set + index[i] for starts[q * blocks + b] <= i < starts[q * blocks + b + 1],
// and for each of them r values. Rows past the last are padding.
struct Matrix {
  const float* values;
  const uint16_t* index;
  const int32_t* starts;
  const float* bias;  // or null
  int64_t rows, columns, set;
  int32_t r;
  bool relu;
  int64_t blocks() const { return (rows + r - 1) / r; }
  int64_t sets() const { return (columns + set - 1) / set; }
};

// A sparse matrix as a bit for every weight: blocks of 8 rows, chunks of 32 columns, the masks of a chunk's 8 rows side by side, and the values
// in that order, of block b from starts[b]. 32 values more than there are may be read.
struct Bits {
  const void* values;  // bfloat16 where `half`, else float32
  const uint32_t* masks;
  const int64_t* starts;
  const float* bias;  // or null
  int64_t rows, columns;
  bool half;
};

// An image (channels, height, width) and the window that is moved over it, in pixels.
struct Window {
  int64_t channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool pointwise() const { return kernel_h == 1 && kernel_w == 1 && pad_h == 0 && pad_w == 0; }
};

struct Kernels {
  // y (tokens, rows) = x (tokens, columns) W^T for tokens [first, last) and blocks of rows [from, to)
  void (*linear)(const Matrix&, const float* x, float* y, int64_t first, int64_t last, int64_t from, int64_t to);
  // one image: y (rows, out_height * out_width) = W x + plus (or null), the `part`-th of `parts` stretches of it, blocks of rows [from, to). `offsets` are those of
  // `conv_offsets`
  void (*conv)(const Matrix&, const Window&, const int32_t* offsets, const float* x, const float* plus, float* y, int64_t part, int64_t from, int64_t to);
  int64_t (*conv_parts)(const Window&);
  int64_t (*conv_buffer)(const Window&);  // floats of a stretch of all channels, -1 where they are too many to count
  void (*conv_offsets)(const Window&, int32_t* offsets);  // in the buffer, of every column: (channel, kernel_h, kernel_w)
  void (*pool)(const Window&, const float* x, float* y);  // one channel: the largest of every window
  void (*arrange)(const Bits&, const float* x, float* to);
  bool (*decode)(const Bits&, const float* x, float* y, int64_t from, int64_t to);
  int32_t (*largest)(const uint16_t* index, int64_t n);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;

}  // namespace secateur
