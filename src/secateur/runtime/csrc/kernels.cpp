// Sparse times dense for one instruction set: compiled once for each, with SECATEUR_ISA (a name) and SECATEUR_WIDTH (floats of a vector).
//
// One loop serves all layers: y[r] += w[r] * x[offset] for the columns of a block of rows, with a tile of 64 tokens or pixels in
// registers. What a tile reads is first copied into a buffer of its own, so that it lies together: tokens side by side for a linear layer;
// for a convolution the padded image as lines, where every tap of the window is one constant offset and no im2col is needed.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

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

// Where the sums go: rows `row` floats apart. `first`: they are begun, with the bias; otherwise added to what is there. No sum is left below
// `floor`, which is how a ReLU is done; NaN stays NaN.
struct Out {
  float* at;
  int64_t row;
  bool first;
  float floor;
};

// R rows of c += or = bias + values times what lies at the offsets; N vectors of columns
template <int R, int N, class Where>
inline void block(const float* x, const float* values, Where where, int64_t n, const Out& c, const float* bias) {
  Vector sum[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) sum[r][i] = c.first ? Vector{} + bias[r] : *reinterpret_cast<const Loose*>(c.at + r * c.row + i * WIDTH);
  for (int64_t k = 0; k < n; k++) {
    const float* at = x + where(k);
    Vector now[N];
    for (int i = 0; i < N; i++) now[i] = *reinterpret_cast<const Loose*>(at + i * WIDTH);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < N; i++) sum[r][i] += values[k * R + r] * now[i];
  }
  const Vector floor = Vector{} + c.floor;
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) *reinterpret_cast<Loose*>(c.at + r * c.row + i * WIDTH) = sum[r][i] < floor ? floor : sum[r][i];
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

// All `wide` columns of a tile, N vectors at a time, and fewer for what is left. Whole vectors are written.
template <int R, int N, class Where>
inline void across(const float* x, const float* values, Where where, int64_t n, Out c, const float* bias, int64_t wide) {
  float* const begin = c.at;
  int64_t at = 0;
  for (; wide - at > N / 2 * WIDTH; at += N * WIDTH, c.at = begin + at) block<R, N>(x + at, values, where, n, c, bias);
  if constexpr (N > 1)
    if (at < wide) across<R, N / 2>(x + at, values, where, n, c, bias, wide - at);
}

// `fits`: there is room behind the rows of c for whole vectors, and below the last of them for whole blocks.
template <int R, class Where>
void blocks(const Matrix& m, const float* x, Where where, Out c, bool fits, int64_t wide, int64_t set, int64_t from, int64_t to) {
  constexpr int N = most<R>();
  const int32_t* starts = m.starts + set * m.blocks();
  alignas(64) float spill[R * TILE];
  const float none[R] = {};
  for (int64_t b = from; b < to; b++, c.at += R * c.row) {
    const int64_t s = starts[b], n = starts[b + 1] - s, rows = std::min<int64_t>(R, m.rows - b * R);
    float edge[R] = {};
    const float* bias = m.bias ? m.bias + b * R : none;
    if (rows < R && m.bias) bias = static_cast<const float*>(std::memcpy(edge, bias, rows * 4));
    if (fits || (rows == R && wide % WIDTH == 0)) {
      across<R, N>(x, m.values + s * R, where.from(s), n, c, bias, wide);
      continue;
    }
    for (int64_t r = 0; r < rows && !c.first; r++) std::memcpy(spill + r * TILE, c.at + r * c.row, wide * 4);
    across<R, N>(x, m.values + s * R, where.from(s), n, Out{spill, TILE, c.first, c.floor}, bias, wide);
    for (int64_t r = 0; r < rows; r++) std::memcpy(c.at + r * c.row, spill + r * TILE, wide * 4);
  }
}

// Where in the buffer a column lies: rows of TILE floats, or by a table of the columns.
struct Rows {
  const uint16_t* index;
  int64_t begin;
  int64_t operator()(int64_t i) const { return begin + int64_t(index[i]) * TILE; }
  Rows from(int64_t i) const { return {index + i, begin}; }
  Rows set(int64_t column) const { return {index, column * TILE}; }
};
struct Offsets {
  const uint16_t* index;
  const int32_t* table;
  int64_t operator()(int64_t i) const { return table[index[i]]; }
  Offsets from(int64_t i) const { return {index + i, table}; }
  Offsets set(int64_t column) const { return {index, table + column}; }
};

// All sets of columns, one after the other.
template <class Where>
void any_blocks(const Matrix& m, const float* x, Where where, float* y, int64_t row, bool fits, int64_t wide, int64_t from, int64_t to) {
  for (int64_t q = 0; q < m.sets(); q++) {
    const bool last = q + 1 == m.sets();
    const Out c{y, row, q == 0, m.relu && last ? 0.0f : -INFINITY};
    switch (m.r) {
      case 1: blocks<1>(m, x, where.set(q * m.set), c, fits, wide, q, from, to); break;
      case 4: blocks<4>(m, x, where.set(q * m.set), c, fits, wide, q, from, to); break;
      default: blocks<8>(m, x, where.set(q * m.set), c, fits, wide, q, from, to);
    }
  }
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
    any_blocks(m, in, Rows{m.index, 0}, c, TILE, true, wide, from, to);
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
    const int64_t room = (1 << 17) / std::max<int64_t>(1, std::min<int64_t>(w.channels, 1 << 16) * std::min<int64_t>(phases, 1 << 16)) - halo;
    const int64_t tiles = std::max<int64_t>(1, std::min(room, length) / TILE);
    const int64_t all = (length + TILE - 1) / TILE;
    stretch = (all + (all + tiles - 1) / tiles - 1) / ((all + tiles - 1) / tiles) * TILE;
  }
  int64_t parts() const { return (length + stretch - 1) / stretch; }
  // Floats of one phase of one channel in the buffer: an odd number of cache lines, so that the same tile of all channels does not fall on
  // a few places of the first cache.
  int64_t row() const { return ((stretch + halo + 15) / 16 | 1) * 16; }
};

int64_t conv_parts(const Window& w) { return w.pointwise() ? (w.out_height * w.out_width + TILE - 1) / TILE : Plan(w).parts(); }

int64_t conv_buffer(const Window& w) {
  if (w.pointwise()) return w.channels < INT32_MAX ? w.channels * TILE : -1;
  const Plan p(w);
  int64_t planes, floats;
  return __builtin_mul_overflow(w.channels, p.phases, &planes) || __builtin_mul_overflow(planes, p.row(), &floats) ? -1 : floats;
}

void conv_offsets(const Window& w, int32_t* offsets) {
  if (w.pointwise()) return;  // they are not asked for
  const Plan p(w);
  for (int64_t channel = 0; channel < w.channels; channel++)
    for (int64_t down = 0; down < w.kernel_h * w.dilation_h; down += w.dilation_h)
      for (int64_t right = 0; right < w.kernel_w * w.dilation_w; right += w.dilation_w) {
        const int64_t phase = down % w.stride_h * w.stride_w + right % w.stride_w;
        *offsets++ = int32_t((channel * p.phases + phase) * p.row() + down / w.stride_h * p.line + right / w.stride_w);
      }
}

// Rows of an image are short, so a call of the library for each would cost more than the copy. LANES floats at once, the last ones twice, and
// half as many where there are not so many.
template <int LANES>
struct Lanes {
  typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4)));
  typedef int32_t Places __attribute__((vector_size(LANES * 4)));
};

template <int LANES, class Load>
inline void in_lanes(float* to, int64_t n, const Load& load) {
  using Some = typename Lanes<LANES>::Floats;
  if (n >= LANES) {
    for (int64_t i = 0; i < n - LANES; i += LANES) *reinterpret_cast<Some*>(to + i) = load.template at<LANES>(i);
    *reinterpret_cast<Some*>(to + n - LANES) = load.template at<LANES>(n - LANES);
  } else if constexpr (LANES > 4) {
    in_lanes<LANES / 2>(to, n, load);
  } else {
    for (int64_t i = 0; i < n; i++) to[i] = load.one(i);
  }
}

struct Zeros {
  template <int LANES> typename Lanes<LANES>::Floats at(int64_t) const { return typename Lanes<LANES>::Floats{}; }
  float one(int64_t) const { return 0; }
};
struct Each {
  const float* from;
  template <int LANES> typename Lanes<LANES>::Floats at(int64_t i) const { return *reinterpret_cast<const typename Lanes<LANES>::Floats*>(from + i); }
  float one(int64_t i) const { return from[i]; }
};
struct EverySecond {
  const float* from;  // one more than the last that is asked for can be read
  template <int LANES> typename Lanes<LANES>::Floats at(int64_t i) const { return even<LANES>(i, std::make_integer_sequence<int, LANES>()); }
  template <int LANES, int... I> typename Lanes<LANES>::Floats even(int64_t i, std::integer_sequence<int, I...>) const {
    return __builtin_shuffle(Each{from + 2 * i}.at<LANES>(0), Each{from + 2 * i}.at<LANES>(LANES), typename Lanes<LANES>::Places{2 * I...});
  }
  float one(int64_t i) const { return from[2 * i]; }
};

// A piece of a line that is copied between a row of the image and the buffer: `left` zeros, `inside` floats, `right` zeros.
struct Piece {
  int64_t from, to, left, inside, right;
};

// Positions [at, at + n) of one phase of a padded channel, as pieces of rows; they are the same for all channels.
void pieces_in(const Window& w, const Plan& p, int64_t phase, int64_t at, int64_t n, std::vector<Piece>& found) {
  const int64_t py = phase / w.stride_w, px = phase % w.stride_w;
  found.clear();
  for (int64_t row = at / p.line, to = 0; to < n; row++) {
    const int64_t j = at - row * p.line, count = std::min(n - to, p.line - j);  // columns j .. j + count of this row
    const int64_t y = row * w.stride_h + py - w.pad_h, x = j * w.stride_w + px - w.pad_w;  // of the first; inside the image from left to right
    int64_t left = std::clamp<int64_t>((w.stride_w - 1 - x) / w.stride_w, 0, count);
    int64_t right = std::clamp<int64_t>((w.width - x + w.stride_w - 1) / w.stride_w, left, count);
    if (y < 0 || y >= w.height) left = right = count;
    found.push_back({y * w.width + x + w.stride_w * left, to, left, right - left, count - right});
    at += count, to += count;
  }
}

void fill(const Window& w, const std::vector<Piece>& pieces, const float* image, float* line) {
  for (const Piece& piece : pieces) {
    float* to = line + piece.to;
    in_lanes<WIDTH>(to, piece.left, Zeros{});
    to += piece.left;
    if (w.stride_w == 1) {
      in_lanes<WIDTH>(to, piece.inside, Each{image + piece.from});
    } else if (w.stride_w == 2 && piece.inside) {  // the last apart: what follows it may be the end of the tensor
      in_lanes<WIDTH>(to, piece.inside - 1, EverySecond{image + piece.from});
      to[piece.inside - 1] = image[piece.from + 2 * (piece.inside - 1)];
    } else {
      for (int64_t i = 0; i < piece.inside; i++) to[i] = image[piece.from + w.stride_w * i];
    }
    in_lanes<WIDTH>(to + piece.inside, piece.right, Zeros{});
  }
}

// Where the columns [t, t + wide) of a tile go in the result; what is on padding goes nowhere.
void pieces_out(const Window& w, const Plan& p, int64_t t, int64_t wide, std::vector<Piece>& found) {
  found.clear();
  for (int64_t at = t; at < t + wide;) {
    const int64_t line = at / p.line, j = at - line * p.line, count = std::min(t + wide - at, p.line - j);
    if (j < w.out_width) found.push_back({at - t, line * w.out_width + j, 0, std::min(count, w.out_width - j), 0});
    at += count;
  }
}

thread_local std::vector<Piece> pieces;

// A window of one pixel: its tiles are copied as they lie, and the sums go straight to the result.
void pointwise(const Matrix& m, const Window& w, const float* x, float* y, int64_t part, int64_t from, int64_t to) {
  const int64_t pixels = w.out_height * w.out_width, image = w.height * w.width, t = part * TILE, wide = std::min(TILE, pixels - t);
  float* in = inputs.floats(w.channels * TILE);
  if (w.stride_h == 1 && w.stride_w == 1) {
    if (wide == TILE) {
      for (int64_t c = 0; c < w.channels; c++) {
        const float* from = x + c * image + t;
        for (int64_t i = 0; i < TILE; i += 16) __builtin_prefetch(from + TILE + i, 0, 2);  // the next tile
        std::memcpy(in + c * TILE, from, TILE * 4);
      }
    } else {
      for (int64_t c = 0; c < w.channels; c++) {
        std::memcpy(in + c * TILE, x + c * image + t, wide * 4);
        std::memset(in + c * TILE + wide, 0, (TILE - wide) * 4);
      }
    }
  } else {
    int64_t where[TILE] = {};
    for (int64_t i = 0; i < wide; i++) where[i] = (t + i) / w.out_width * w.stride_h * w.width + (t + i) % w.out_width * w.stride_w;
    for (int64_t c = 0; c < w.channels; c++)
      for (int64_t i = 0; i < TILE; i++) in[c * TILE + i] = x[c * image + where[i]];
  }
  any_blocks(m, in, Rows{m.index, 0}, y + from * m.r * pixels + t, pixels, false, wide, from, to);
}

void conv(const Matrix& m, const Window& w, const int32_t* offsets, const float* x, float* y, int64_t part, int64_t from, int64_t to) {
  if (w.pointwise()) return pointwise(m, w, x, y, part, from, to);
  const Plan p(w);
  const int64_t begin = part * p.stretch, end = std::min(p.length, begin + p.stretch), pixels = w.out_height * w.out_width;
  const int64_t rows = std::min(to * m.r, m.rows) - from * m.r;
  float* in = inputs.floats(w.channels * p.phases * p.row() + TILE);
  for (int64_t phase = 0; phase < p.phases; phase++) {
    pieces_in(w, p, phase, begin, p.row(), pieces);
    for (int64_t c = 0; c < w.channels; c++) fill(w, pieces, x + c * w.height * w.width, in + (c * p.phases + phase) * p.row());
  }
  std::memset(in + w.channels * p.phases * p.row(), 0, TILE * 4);
  float* c = outputs.floats((to - from) * m.r * TILE);
  for (int64_t t = begin; t < end; t += TILE) {
    const int64_t wide = std::min(TILE, end - t);
    any_blocks(m, in + t - begin, Offsets{m.index, offsets}, c, TILE, true, wide, from, to);
    pieces_out(w, p, t, wide, pieces);
    float* rows_of_y = y + from * m.r * pixels;
    for (int64_t r = 0; r < rows; r++)
      for (const Piece& piece : pieces) in_lanes<WIDTH>(rows_of_y + r * pixels + piece.to, piece.inside, Each{c + r * TILE + piece.from});
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
