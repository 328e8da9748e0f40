// Sparse times dense for one instruction set: compiled once for each, with SECATEUR_ISA (a name) and SECATEUR_WIDTH (floats of a vector).
//
// One loop serves all layers: y[r] += w[r] * x[offset] for the columns of a block of rows, with a tile of 64 tokens or pixels in
// registers. What a tile reads is first copied into a buffer of its own, so that it lies together: tokens side by side for a linear layer;
// for a convolution the padded image as lines, where every tap of the window is one constant offset and no im2col is needed.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "sparse.h"

namespace secateur {
namespace SECATEUR_ISA {
void arrange(const Bits& m, const float* x, float* to);  // decode.cpp
bool decode(const Bits& m, const float* x, float* y, int64_t from, int64_t to);
namespace {

constexpr int WIDTH = SECATEUR_WIDTH;
typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Loose __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef int32_t Order __attribute__((vector_size(WIDTH * 4)));

// Scratch memory that a thread keeps.
class Buffer {
 public:
  ~Buffer() { std::free(at_); }
  float* floats(int64_t n) {
    if (n > size_) {
      std::free(at_);
      size_ = 0;
      const int64_t most = (n + 63) / 64 * 64 + 64;
      at_ = static_cast<float*>(std::aligned_alloc(64, most * 4));
      if (!at_) throw std::bad_alloc();
      size_ = most;
    }
    return at_;
  }

 private:
  float* at_ = nullptr;
  int64_t size_ = 0;
};
thread_local Buffer inputs, outputs;

// c (R rows of TILE) += or = bias + values times what lies at the offsets; N vectors of columns
template <int R, int N, class Where>
inline void block(const float* x, const float* values, Where where, int64_t n, float* c, const float* bias) {
  Vector sum[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) sum[r][i] = bias ? Vector{} + bias[r] : *reinterpret_cast<const Vector*>(c + r * TILE + i * WIDTH);
  for (int64_t k = 0; k < n; k++) {
    const float* at = x + where(k);
    Vector now[N];
    for (int i = 0; i < N; i++) now[i] = *reinterpret_cast<const Loose*>(at + i * WIDTH);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < N; i++) sum[r][i] += values[k * R + r] * now[i];
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) *reinterpret_cast<Vector*>(c + r * TILE + i * WIDTH) = sum[r][i];
}

// Vectors of columns at once: as many as the registers hold beside R rows of sums.
template <int R>
constexpr int most() {
#if SECATEUR_WIDTH == 16
  return R == 8 ? 2 : 4;
#else
  return R == 1 ? TILE / WIDTH : 2;
#endif
}

// All `wide` columns of a tile, N vectors at a time, and fewer for what is left.
template <int R, int N, class Where>
inline void across(const float* x, const float* values, Where where, int64_t n, float* c, const float* bias, int64_t wide) {
  int64_t at = 0;
  for (; wide - at > N / 2 * WIDTH; at += N * WIDTH) block<R, N>(x + at, values, where, n, c + at, bias);
  if constexpr (N > 1)
    if (at < wide) across<R, N / 2>(x + at, values, where, n, c + at, bias, wide - at);
}

template <int R, class Where>
void blocks(const Matrix& m, const float* x, Where where, float* c, int64_t wide, int64_t set, int64_t from, int64_t to) {
  constexpr int N = most<R>();
  const int32_t* starts = m.starts + set * m.blocks();
  for (int64_t b = from; b < to; b++) {
    const int64_t s = starts[b], n = starts[b + 1] - s;
    float first[R] = {};
    if (m.bias && set == 0)
      for (int64_t r = 0; r < R && b * R + r < m.rows; r++) first[r] = m.bias[b * R + r];
    const float* bias = set == 0 ? first : nullptr;
    if (!n && !bias) continue;
    float* out = c + (b - from) * R * TILE;
    across<R, N>(x, m.values + s * R, where.from(s), n, out, bias, wide);
  }
}

// Where in the buffer a column lies: rows of TILE floats, or by a table of the columns of a set.
struct Rows {
  const uint16_t* index;
  int64_t operator()(int64_t i) const { return int64_t(index[i]) * TILE; }
  Rows from(int64_t i) const { return {index + i}; }
};
struct Offsets {
  const uint16_t* index;
  const int32_t* table;
  int64_t operator()(int64_t i) const { return table[index[i]]; }
  Offsets from(int64_t i) const { return {index + i, table}; }
};

template <class Where>
void any_blocks(const Matrix& m, const float* x, Where where, float* c, int64_t wide, int64_t set, int64_t from, int64_t to) {
  switch (m.r) {
    case 1: return blocks<1>(m, x, where, c, wide, set, from, to);
    case 4: return blocks<4>(m, x, where, c, wide, set, from, to);
    default: return blocks<8>(m, x, where, c, wide, set, from, to);
  }
}

void rectify(float* c, int64_t n) {
  for (int64_t i = 0; i < n; i++) c[i] = c[i] < 0 ? 0 : c[i];  // NaN stays NaN
}

// One step of turning a square of vectors: a and b, D rows apart, exchange the halves of every 2 D elements.
template <int D, int... I>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
  const Vector first = __builtin_shuffle(a, b, Order{(I & D ? WIDTH + I - D : I)...});
  b = __builtin_shuffle(a, b, Order{(I & D ? WIDTH + I : I + D)...});
  a = first;
}

template <int D>
inline void exchanges(Vector* v) {
  for (int i = 0; i < WIDTH; i++)
    if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, WIDTH>());
  if constexpr (D > 1) exchanges<D / 2>(v);
}

// to (columns, rows) = from (rows, columns) turned, in squares of vectors
void turn(const float* from, int64_t rows, int64_t columns, int64_t from_row, float* to, int64_t to_row) {
  int64_t i = 0;
  for (; i + WIDTH <= rows; i += WIDTH) {
    int64_t j = 0;
    for (; j + WIDTH <= columns; j += WIDTH) {
      Vector v[WIDTH];
      for (int k = 0; k < WIDTH; k++) v[k] = *reinterpret_cast<const Loose*>(from + (i + k) * from_row + j);
      exchanges<WIDTH / 2>(v);
      for (int k = 0; k < WIDTH; k++) *reinterpret_cast<Loose*>(to + (j + k) * to_row + i) = v[k];
    }
    for (; j < columns; j++)
      for (int k = 0; k < WIDTH; k++) to[j * to_row + i + k] = from[(i + k) * from_row + j];
  }
  for (; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * to_row + i] = from[i * from_row + j];
}

void linear(const Matrix& m, const float* x, float* y, int64_t first, int64_t last, int64_t from, int64_t to) {
  const int64_t rows = std::min(to * m.r, m.rows) - from * m.r;
  float* in = inputs.floats(m.columns * TILE);
  float* c = outputs.floats((to - from) * m.r * TILE);
  for (int64_t t = first; t < last; t += TILE) {
    const int64_t wide = std::min(TILE, last - t);
    if (wide < TILE) std::memset(in, 0, m.columns * TILE * 4);
    turn(x + t * m.columns, wide, m.columns, m.columns, in, TILE);
    for (int64_t q = 0; q < m.sets(); q++) any_blocks(m, in + q * m.set * TILE, Rows{m.index}, c, wide, q, from, to);
    if (m.relu) rectify(c, rows * TILE);
    turn(c, rows, wide, TILE, y + t * m.rows + from * m.r, m.rows);
  }
}

// ------------------------------------------------------------------ convolutions
// The padded image is cut into its phases (one where the stride is 1), and each phase is one line: rows one after the other. A row of
// output pixels is `line` long; the last few of it fall on padding and are not copied out.
struct Plan {
  int64_t line, length, halo, phases, stretch;
  explicit Plan(const Window& w) {
    line = w.stride_h == 1 && w.stride_w == 1 ? w.width + w.pad_w  // what is left of a row is padding for the end of the one before
                                              : w.out_width + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
    line = std::max(line, w.out_width);
    length = (w.out_height - 1) * line + w.out_width;
    halo = (w.kernel_h - 1) * w.dilation_h / w.stride_h * line + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
    phases = w.stride_h * w.stride_w;
    // Stretches long beside their halo, in a buffer that fits the second cache.
    const int64_t room = (1 << 16) / std::max<int64_t>(1, std::min<int64_t>(w.channels, 1 << 16) * std::min<int64_t>(phases, 1 << 16)) - halo;
    const int64_t tiles = std::max<int64_t>(1, std::min(room, length) / TILE);
    const int64_t all = (length + TILE - 1) / TILE;
    stretch = (all + (all + tiles - 1) / tiles - 1) / ((all + tiles - 1) / tiles) * TILE;
  }
  int64_t parts() const { return (length + stretch - 1) / stretch; }
  // Floats of one phase of one channel in the buffer: an odd number of cache lines, so that the same tile of all channels does not fall on
  // a few places of the first cache.
  int64_t row() const { return ((stretch + halo + 15) / 16 | 1) * 16; }
};

int64_t conv_parts(const Window& w) { return Plan(w).parts(); }

int64_t conv_buffer(const Window& w) {
  const Plan p(w);
  int64_t planes, floats;
  return __builtin_mul_overflow(w.channels, p.phases, &planes) || __builtin_mul_overflow(planes, p.row(), &floats) ? -1 : floats;
}

void conv_offsets(const Window& w, int32_t* offsets) {
  const Plan p(w);
  for (int64_t channel = 0; channel < w.channels; channel++)
    for (int64_t down = 0; down < w.kernel_h * w.dilation_h; down += w.dilation_h)
      for (int64_t right = 0; right < w.kernel_w * w.dilation_w; right += w.dilation_w) {
        const int64_t phase = down % w.stride_h * w.stride_w + right % w.stride_w;
        *offsets++ = int32_t((channel * p.phases + phase) * p.row() + down / w.stride_h * p.line + right / w.stride_w);
      }
}

// Positions [at, at + n) of one phase of one padded channel, as a line.
void fill(const Window& w, const Plan& p, const float* image, int64_t phase, int64_t at, int64_t n, float* to) {
  const int64_t py = phase / w.stride_w, px = phase % w.stride_w;
  for (int64_t row = at / p.line; n > 0; row++) {
    const int64_t j = at - row * p.line, count = std::min(n, p.line - j);  // columns j .. j + count of this row
    const int64_t y = row * w.stride_h + py - w.pad_h;
    if (y < 0 || y >= w.height) {
      std::memset(to, 0, count * 4);
    } else {
      const float* from = image + y * w.width;
      if (w.stride_w == 1) {
        const int64_t x = j - w.pad_w, left = std::clamp<int64_t>(-x, 0, count), right = std::clamp<int64_t>(w.width - x, left, count);
        std::memset(to, 0, left * 4);
        std::memcpy(to + left, from + x + left, (right - left) * 4);
        std::memset(to + right, 0, (count - right) * 4);
      } else {
        for (int64_t i = 0; i < count; i++) {
          const int64_t x = (j + i) * w.stride_w + px - w.pad_w;
          to[i] = x < 0 || x >= w.width ? 0 : from[x];
        }
      }
    }
    at += count, n -= count, to += count;
  }
}

void conv(const Matrix& m, const Window& w, const int32_t* offsets, const float* x, float* y, int64_t part, int64_t from, int64_t to) {
  const Plan p(w);
  const int64_t begin = part * p.stretch, end = std::min(p.length, begin + p.stretch), pixels = w.out_height * w.out_width;
  const int64_t rows = std::min(to * m.r, m.rows) - from * m.r;
  float* in = inputs.floats(w.channels * p.phases * p.row() + TILE);
  for (int64_t c = 0; c < w.channels; c++)
    for (int64_t phase = 0; phase < p.phases; phase++)
      fill(w, p, x + c * w.height * w.width, phase, begin, p.row(), in + (c * p.phases + phase) * p.row());
  std::memset(in + w.channels * p.phases * p.row(), 0, TILE * 4);
  float* c = outputs.floats((to - from) * m.r * TILE);
  for (int64_t t = begin; t < end; t += TILE) {
    const int64_t wide = std::min(TILE, end - t);
    for (int64_t q = 0; q < m.sets(); q++) any_blocks(m, in + t - begin, Offsets{m.index, offsets + q * m.set}, c, wide, q, from, to);
    if (m.relu) rectify(c, rows * TILE);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t at = t; at < t + wide;) {
        const int64_t line = at / p.line, j = at - line * p.line, count = std::min(t + wide - at, p.line - j);
        if (j < w.out_width) std::memcpy(y + (from * m.r + r) * pixels + line * w.out_width + j, c + r * TILE + at - t, std::min(count, w.out_width - j) * 4);
        at += count;
      }
  }
}

// The largest of n numbers, -1 of none.
int32_t largest(const uint16_t* index, int64_t n) {
  uint16_t found = 0;
  for (int64_t i = 0; i < n; i++) found = std::max(found, index[i]);
  return n ? found : -1;
}

}  // namespace
}  // namespace SECATEUR_ISA

#define JOINED(a, b) a##b
#define TABLE(isa) JOINED(kernels_, isa)
extern const Kernels TABLE(SECATEUR_ISA);
const Kernels TABLE(SECATEUR_ISA) = {SECATEUR_ISA::linear, SECATEUR_ISA::conv, SECATEUR_ISA::conv_parts, SECATEUR_ISA::conv_buffer, SECATEUR_ISA::conv_offsets,
                                     SECATEUR_ISA::arrange, SECATEUR_ISA::decode, SECATEUR_ISA::largest};

}  // namespace secateur
