// The recipe of engine/reference/rng.py, lane by lane and bit by bit: no fma(), the order of operations is the
// definition. A draw of 4 W elements: block n of Philox in lane n of four vectors of words, then woven into order.
#pragma once
#include "onepass/recipe.h"
#include "onepass/rng.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {

using namespace recipe;

inline constexpr int DRAW = 4 * W;  // elements a call gives

struct Words {
  U32 w[4];
};

// High and low words of the 32 x 32 product.
OP_INLINE void multiply(U32 x, uint32_t m, U32& high, U32& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32((__m512i)x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), factor);
  high = (U32)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = (U32)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32((__m256i)x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
  high = (U32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = (U32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Blocks block, block + 1, ..., block + W - 1.
OP_INLINE Words philox(const Key& key, uint64_t block) {
  const U32 low = splat_u32(static_cast<uint32_t>(block)) + iota();
  const U32 carry = (U32)(low < static_cast<uint32_t>(block)) & 1u;
  U32 c0 = low, c1 = splat_u32(static_cast<uint32_t>(block >> 32)) + carry;
  U32 c2 = splat_u32(static_cast<uint32_t>(key.stream)), c3 = splat_u32(static_cast<uint32_t>(key.stream >> 32));
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < ROUNDS; ++round) {
    U32 high0, low0, high1, low1;
    multiply(c0, MULTIPLIER_0, high0, low0);
    multiply(c2, MULTIPLIER_1, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += WEYL_0;
    k1 += WEYL_1;
  }
  return {{c0, c1, c2, c3}};
}

OP_INLINE F32 unit(U32 word) {
#if defined(__AVX512F__)
  const F32 x = _mm512_cvtepu32_ps((__m512i)word);
#else
  // Both halves are exact and the sum rounds once: the signed conversion is the only one there is.
  const F32 x = to_f32((I32)(word >> 16)) * 65536.0f + to_f32((I32)(word & 0xFFFFu));
#endif
  return min(x * UNIT_STEP + UNIT_MIDDLE, splat(UNIT_MOST));
}

OP_INLINE F32 ln_reduced(F32 f, F32 k) {
  F32 p = splat(LN_0);
  p = p * f + LN_1;
  p = p * f + LN_2;
  p = p * f + LN_3;
  p = p * f + LN_4;
  p = p * f + LN_5;
  p = p * f + LN_6;
  p = p * f + LN_7;
  const F32 square = f * f;
  const F32 tail = f * square * p + k * LN2_LOW;
  return (tail - 0.5f * square + f) + k * LN2_HIGH;
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)).
OP_INLINE F32 split(F32 x, I32& k) {
  const I32 bits = as_i32(x) - SQRT_HALF_BITS;
  k = bits >> 23;
  return as_f32((bits & 0x7FFFFF) + SQRT_HALF_BITS);
}

OP_INLINE F32 ln(F32 x) {
  I32 k;
  const F32 mantissa = split(x, k);
  return ln_reduced(mantissa - 1.0f, to_f32(k));
}

OP_INLINE F32 log1p_neg(F32 u) {  // ln(1 - u)
  const F32 rest = 1.0f - u, lost = (1.0f - rest) - u;
  I32 k;
  const F32 mantissa = split(rest, k);
  return ln_reduced((mantissa - 1.0f) + lost * as_f32((127 - k) << 23), to_f32(k));
}

OP_INLINE void sincos_turn(F32 u, F32& sin, F32& cos) {  // of 2 pi u, u in [0, 1)
  const F32 quarters = 4.0f * u;
  const I32 quadrant = truncate(quarters + 0.5f);
  const F32 r = quarters - to_f32(quadrant), square = r * r;
  F32 s = splat(SIN_0);
  s = s * square + SIN_1;
  s = s * square + SIN_2;
  F32 c = splat(COS_0);
  c = c * square + COS_1;
  c = c * square + COS_2;
  c = c * square + COS_3;
  const F32 sine = r * HALF_PI_HIGH + (r * square * s + r * HALF_PI_LOW);
  const F32 cosine = square * c + 1.0f;
  const I32 odd = (quadrant & 1) != 0;
  const I32 sin_sign = (quadrant & 2) << 30, cos_sign = ((quadrant + 1) & 2) << 30;
  sin = as_f32(as_i32(odd ? cosine : sine) ^ sin_sign);
  cos = as_f32(as_i32(odd ? sine : cosine) ^ cos_sign);
}

// Box-Muller on two words of each lane.
OP_INLINE void normal_pair(U32 w0, U32 w1, F32& z0, F32& z1) {
  const F32 radius = sqrt(-2.0f * ln(unit(w0)));
  F32 sin, cos;
  sincos_turn(unit(w1), sin, cos);
  z0 = radius * cos;
  z1 = radius * sin;
}

// Lane n of v[0..3] becomes elements 4 n .. 4 n + 3 of out[0..3].
OP_INLINE void weave(const F32 v[4], F32 out[4]) {
#if defined(__AVX512F__) || defined(__AVX2__)
  // Within each 128-bit part a 4 x 4 transpose, then the parts in order.
  F32 t[4];
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
  const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
  t[0] = (F32)_mm512_unpacklo_pd((__m512d)a, (__m512d)c);
  t[1] = (F32)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
  t[2] = (F32)_mm512_unpacklo_pd((__m512d)b, (__m512d)d);
  t[3] = (F32)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
  const __m512 e = _mm512_shuffle_f32x4(t[0], t[1], 0x44), f = _mm512_shuffle_f32x4(t[2], t[3], 0x44);
  const __m512 g = _mm512_shuffle_f32x4(t[0], t[1], 0xEE), h = _mm512_shuffle_f32x4(t[2], t[3], 0xEE);
  out[0] = _mm512_shuffle_f32x4(e, f, 0x88);
  out[1] = _mm512_shuffle_f32x4(e, f, 0xDD);
  out[2] = _mm512_shuffle_f32x4(g, h, 0x88);
  out[3] = _mm512_shuffle_f32x4(g, h, 0xDD);
#else
  const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
  const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
  t[0] = (F32)_mm256_unpacklo_pd((__m256d)a, (__m256d)c);
  t[1] = (F32)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
  t[2] = (F32)_mm256_unpacklo_pd((__m256d)b, (__m256d)d);
  t[3] = (F32)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
  out[0] = _mm256_permute2f128_ps(t[0], t[1], 0x20);
  out[1] = _mm256_permute2f128_ps(t[2], t[3], 0x20);
  out[2] = _mm256_permute2f128_ps(t[0], t[1], 0x31);
  out[3] = _mm256_permute2f128_ps(t[2], t[3], 0x31);
#endif
#else
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) out[j][i] = v[i][j];
#endif
}

// DRAW elements of the row from block `block` on, in element order.
template <Distribution D>
OP_INLINE void draw(const Key& key, uint64_t block, F32 out[4]) {
  const Words words = philox(key, block);
  F32 v[4];
  if constexpr (D == Distribution::normal) {
    normal_pair(words.w[0], words.w[1], v[0], v[1]);
    normal_pair(words.w[2], words.w[3], v[2], v[3]);
  } else {
    for (int i = 0; i < 4; ++i) {
      const F32 u = unit(words.w[i]);
      if constexpr (D == Distribution::uniform) v[i] = u;
      if constexpr (D == Distribution::exponential) v[i] = -ln(u);
      if constexpr (D == Distribution::gumbel) v[i] = -ln(-log1p_neg(u));
      if constexpr (D == Distribution::logistic) v[i] = ln(u) - log1p_neg(u);
      if constexpr (D == Distribution::laplace) {
        const I32 low = u < 0.5f;
        const F32 size = ln(2.0f * (low ? u : 1.0f - u));
        v[i] = low ? size : -size;
      }
    }
  }
  weave(v, out);
}

}  // namespace onepass::ONEPASS_ISA
