// The sparse product of one tile, for one instruction set: what linear layers and convolutions share. Included by what is compiled once for
// each, with SECATEUR_ISA (a name) and SECATEUR_WIDTH (floats of a vector).
//
// One loop serves all layers: y[r] += w[r] * x[offset] for the columns of a block of rows, with a tile of 64 tokens or pixels in
// registers. What a tile reads is first copied into a buffer of its own, so that it lies together.
#pragma once
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

// R rows of c, `row` floats apart, += bias + values times what lies at the offsets; N vectors of columns. Where they are `fresh`, what c held
// does not count. No sum is left below `floor`, which is how a ReLU is done; NaN stays NaN.
struct Out {
  float* at;
  int64_t row;
  bool fresh;
  float floor;
};

template <int R, int N, class Where>
[[gnu::noinline]] void block(const float* x, const float* values, Where where, int64_t n, const Out& c, const float* bias) {
  Vector sum[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) sum[r][i] = (c.fresh ? Vector{} : Vector(*reinterpret_cast<const Loose*>(c.at + r * c.row + i * WIDTH))) + bias[r];
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

// All `wide` columns of a tile, N vectors at a time, and fewer for what is left: as many vectors are written as `wide` needs, and no more.
template <int R, int N, class Where>
inline void across(const float* x, const float* values, Where where, int64_t n, Out c, const float* bias, int64_t wide) {
  float* const begin = c.at;
  int64_t at = 0;
  for (; wide - at > (N - 1) * WIDTH; at += N * WIDTH, c.at = begin + at) block<R, N>(x + at, values, where, n, c, bias);
  if constexpr (N > 1)
    if (at < wide) across<R, N / 2>(x + at, values, where, n, c, bias, wide - at);
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

// Where the columns of a tile go: row r of the matrix begins at `at + r * row`, and there the tile lies together or in pieces. What is added
// to, if anything, lies at `plus` in the same way. `fits`: there is room behind the rows for whole vectors and below the last for whole blocks.
struct Tile {
  float* at;
  const float* plus;
  int64_t row, wide;
  bool fits;
  const std::vector<Piece>* pieces;
  // `n` rows of it, from and to rows of TILE floats
  void take(const float* from, int64_t n, float* to) const {
    for (int64_t r = 0; r < n; r++, from += row, to += TILE) {
      if (!pieces) in_lanes<WIDTH>(to, wide, Each{from});
      else
        for (const Piece& piece : *pieces) in_lanes<WIDTH>(to + piece.from, piece.inside, Each{from + piece.to});
    }
  }
  void put(const float* from, int64_t n, float* to) const {
    for (int64_t r = 0; r < n; r++, from += TILE, to += row) {
      if (!pieces) in_lanes<WIDTH>(to, wide, Each{from});
      else
        for (const Piece& piece : *pieces) in_lanes<WIDTH>(to + piece.to, piece.inside, Each{from + piece.from});
    }
  }
};

template <int R, class Where>
void blocks(const Matrix& m, const float* x, Where where, const Tile& tile, int64_t set, int64_t from, int64_t to) {
  constexpr int N = most<R>();
  const int32_t* starts = m.starts + set * m.blocks();
  const float floor = m.relu && set + 1 == m.sets() ? 0.0f : -INFINITY;
  const bool fresh = set == 0 && !tile.plus, direct = !tile.pieces && (tile.fits || tile.wide % WIDTH == 0);
  alignas(64) float spill[R * TILE];
  if (!fresh) std::memset(spill, 0, sizeof spill);  // between pieces nothing is taken
  for (int64_t b = from; b < to; b++) {
    const int64_t s = starts[b], n = starts[b + 1] - s, rows = std::min<int64_t>(R, m.rows - b * R);
    float bias[R] = {};
    if (m.bias && set == 0)
      for (int64_t r = 0; r < rows; r++) bias[r] = m.bias[b * R + r];
    float* at = tile.at + (b - from) * R * tile.row;
    const float* before = set == 0 ? tile.plus + (b - from) * R * tile.row : at;
    if (direct && (rows == R || tile.fits)) {
      if (!fresh && before != at)
        for (int64_t r = 0; r < R; r++) std::memcpy(at + r * tile.row, before + r * tile.row, tile.wide * 4);
      across<R, N>(x, m.values + s * R, where.from(s), n, Out{at, tile.row, fresh, floor}, bias, tile.wide);
    } else {
      if (!fresh) tile.take(before, rows, spill);
      across<R, N>(x, m.values + s * R, where.from(s), n, Out{spill, TILE, fresh, floor}, bias, tile.wide);
      tile.put(spill, rows, at);
    }
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
void any_blocks(const Matrix& m, const float* x, Where where, const Tile& tile, int64_t from, int64_t to) {
  for (int64_t q = 0; q < m.sets(); q++) switch (m.r) {
      case 1: blocks<1>(m, x, where.set(q * m.set), tile, q, from, to); break;
      case 4: blocks<4>(m, x, where.set(q * m.set), tile, q, from, to); break;
      default: blocks<8>(m, x, where.set(q * m.set), tile, q, from, to);
    }
}

}  // namespace
}  // namespace SECATEUR_ISA
}  // namespace secateur
