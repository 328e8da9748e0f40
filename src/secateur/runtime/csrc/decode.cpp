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
struct Sum {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  float total() const { return _mm512_reduce_add_ps(_mm512_add_ps(low, high)); }
  void add(const uint16_t* values, uint32_t mask, const float* x) {
    const __m512i w = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    const __m512i a = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(w)), 16);
    const __m512i b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1)), 16);
    low = _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_loadu_ps(x), low);
    high = _mm512_fmadd_ps(_mm512_castsi512_ps(b), _mm512_loadu_ps(x + 16), high);
  }
  void add(const float* values, uint32_t mask, const float* x) {
    const __mmask16 a = mask & 0xFFFF, b = mask >> 16;
    low = _mm512_fmadd_ps(_mm512_maskz_expand_ps(a, _mm512_loadu_ps(values)), _mm512_loadu_ps(x), low);
    const float* rest = values + __builtin_popcount(a);
    high = _mm512_fmadd_ps(_mm512_maskz_expand_ps(b, _mm512_loadu_ps(rest)), _mm512_loadu_ps(x + 16), high);
  }
};
#else
struct Sum {
  float sum = 0;
  float total() const { return sum; }
  template <class Value>
  void add(const Value* values, uint32_t mask, const float* x) {
    for (; mask; mask &= mask - 1) sum += wide(*values++) * x[__builtin_ctz(mask)];
  }
};
#endif

template <class Value>
bool rows(const Bits& m, const Value* values, const float* x, float* y, int64_t from, int64_t to) {
  const int64_t chunks = (m.columns + COLUMNS - 1) / COLUMNS;
  for (int64_t block = from; block < to; block++) {
    const Value *at = values + m.starts[block], *end = values + m.starts[block + 1];
    const uint32_t* mask = m.masks + block * chunks * ROWS;
    Sum sums[ROWS];
    for (int64_t c = 0; c < chunks; c++, mask += ROWS) {
      int64_t counts[ROWS], all = 0;
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) all += counts[r] = __builtin_popcount(mask[r]);
      if (all > end - at) return false;  // more bits than values
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        sums[r].add(at, mask[r], x + c * COLUMNS);
        at += counts[r];
      }
    }
    if (at != end) return false;
    for (int64_t r = 0; r < ROWS && block * ROWS + r < m.rows; r++) y[block * ROWS + r] = sums[r].total() + (m.bias ? m.bias[block * ROWS + r] : 0);
  }
  return true;
}

}  // namespace

// y (rows) = W x + bias for blocks of rows [from, to); x is padded to whole chunks. False where masks and values do not belong together.
bool decode(const Bits& m, const float* x, float* y, int64_t from, int64_t to) {
  return m.half ? rows(m, static_cast<const uint16_t*>(m.values), x, y, from, to) : rows(m, static_cast<const float*>(m.values), x, y, from, to);
}

}  // namespace SECATEUR_ISA
}  // namespace secateur
