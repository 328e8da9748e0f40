// Linear layers, and the table of all kernels of one instruction set. Tokens are turned, so that those of a tile lie side by side.
#include "blocks.h"

namespace secateur {
namespace SECATEUR_ISA {
void conv(const Matrix& m, const Window& w, const int32_t* offsets, const float* x, const float* plus, float* y, int64_t part, int64_t from,
          int64_t to);  // conv.cpp
int64_t conv_parts(const Window& w);
int64_t conv_buffer(const Window& w);
void conv_offsets(const Window& w, int32_t* offsets);
void pool(const Window& w, const float* x, float* y);     // pool.cpp
void arrange(const Bits& m, const float* x, float* to);  // decode.cpp
bool decode(const Bits& m, const float* x, float* y, int64_t from, int64_t to);
namespace {

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
    any_blocks(m, in, Rows{m.index, 0}, Tile{c, nullptr, TILE, wide, true, nullptr}, from, to);
    turn(c, rows, wide, TILE, y + t * m.rows + from * m.r, m.rows);
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
                                     SECATEUR_ISA::pool, SECATEUR_ISA::arrange, SECATEUR_ISA::decode, SECATEUR_ISA::largest};

}  // namespace secateur
