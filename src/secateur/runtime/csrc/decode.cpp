// A sparse matrix times a few vectors, as when a language model writes one token: bound by the bytes of the weights, so a bit says for
// every weight whether it is there, and the values that are lie in one stream. Compiled once for each instruction set, as kernels.cpp.
//
// Eight rows are worked on together, 32 columns at a time: the masks of the eight lie side by side and so do their values, and the part
// of x is loaded once for all of them.
#include <cstring>
#if defined(__AVX512VBMI2__)
#include <immintrin.h>
#endif

#include "sparse.h"

namespace secateur {
namespace SECATEUR_ISA {
namespace {

constexpr int ROWS = 8, COLUMNS = 32;

inline float wide(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float wide(float f) { return f; }

#if defined(__AVX512VBMI2__)
typedef __m512 Sums[ROWS][2];

inline void clear(Sums& sums) {
  for (auto& s : sums) s[0] = s[1] = _mm512_setzero_ps();
}
inline float total(const __m512 (&s)[2]) { return _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1])); }

// A bfloat16 is the upper half of a float, so in 32 bits of two neighbours the one is shifted up and the other masked; x has its even
// columns first and then its odd ones.
inline void add(__m512 (&s)[2], const uint16_t* values, uint32_t mask, __m512 even, __m512 odd) {
  const __m512i w = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
  s[0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even, s[0]);
  s[1] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xFFFF0000)))), odd, s[1]);
}
inline void add(__m512 (&s)[2], const float* values, uint32_t mask, __m512 first, __m512 second) {
  s[0] = _mm512_fmadd_ps(_mm512_maskz_expand_ps(mask & 0xFFFF, _mm512_loadu_ps(values)), first, s[0]);
  values += __builtin_popcount(mask & 0xFFFF);
  s[1] = _mm512_fmadd_ps(_mm512_maskz_expand_ps(mask >> 16, _mm512_loadu_ps(values)), second, s[1]);
}

// One chunk of 8 rows.
template <class Value>
inline void chunk(Sums& sums, const Value* const (&at)[ROWS + 1], const uint32_t* mask, const float* x) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) add(sums[r], at[r], mask[r], a, b);
}
constexpr bool EVEN_FIRST = true;
#else
typedef float Sums[ROWS];

inline void clear(Sums& sums) {
  for (float& s : sums) s = 0;
}
inline float total(float s) { return s; }

template <class Value>
inline void chunk(Sums& sums, const Value* const (&at)[ROWS + 1], const uint32_t* mask, const float* x) {
  for (int r = 0; r < ROWS; r++) {
    const Value* values = at[r];
    for (uint32_t m = mask[r]; m; m &= m - 1) sums[r] += wide(*values++) * x[__builtin_ctz(m)];
  }
}
constexpr bool EVEN_FIRST = false;
#endif

template <class Value>
bool rows(const Bits& m, const Value* values, const float* x, float* y, int64_t from, int64_t to) {
  const int64_t chunks = (m.columns + COLUMNS - 1) / COLUMNS;
  for (int64_t block = from; block < to; block++) {
    const Value *now = values + m.starts[block], *const end = values + m.starts[block + 1];
    const uint32_t* mask = m.masks + block * chunks * ROWS;
    Sums sums;
    clear(sums);
    for (int64_t c = 0; c < chunks; c++, mask += ROWS) {
      const Value* at[ROWS + 1];
      at[0] = now;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) at[r + 1] = at[r] + __builtin_popcount(mask[r]);
      now = at[ROWS];
      if (now > end) return false;  // more bits than values
      chunk(sums, at, mask, x + c * COLUMNS);
    }
    if (now != end) return false;
    for (int64_t r = 0; r < ROWS && block * ROWS + r < m.rows; r++) y[block * ROWS + r] = total(sums[r]) + (m.bias ? m.bias[block * ROWS + r] : 0);
  }
  return true;
}

}  // namespace

// y (rows) = W x + bias for blocks of rows [from, to); x is as `arrange` left it. False where masks and values do not belong together.
bool decode(const Bits& m, const float* x, float* y, int64_t from, int64_t to) {
  return m.half ? rows(m, static_cast<const uint16_t*>(m.values), x, y, from, to) : rows(m, static_cast<const float*>(m.values), x, y, from, to);
}

// x in whole chunks, in the order in which `decode` reads it.
void arrange(const Bits& m, const float* x, float* to) {
  for (int64_t k = 0; k < (m.columns + COLUMNS - 1) / COLUMNS * COLUMNS; k++) {
    const int64_t place = EVEN_FIRST && m.half ? k / COLUMNS * COLUMNS + k % 2 * 16 + k % COLUMNS / 2 : k;
    to[place] = k < m.columns ? x[k] : 0;
  }
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
