// The recipe of engine/reference/rng.py, lane by lane and bit by bit: the order of operations is the definition, and
// fma() stands only where the product is exact. Block n of W is in lane n of four vectors of words, then woven into order.
#pragma once
#include "onepass/recipe.h"
#include "onepass/rng.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {

using namespace recipe;

inline constexpr int DRAW = 4 * W;  // elements of W blocks

struct Words {
  U32 w[4];
};

// Philox works on 64-bit lanes, of which the lower half counts: a product then gives both of its words without a
// shuffle. One vector holds the even blocks of W and one the odd ones, until the words are done.
typedef uint64_t U64 __attribute__((vector_size(W * 4)));

OP_INLINE U64 splat_u64(uint64_t x) { return x | U64{}; }

// The 64-bit products of the lower halves.
OP_INLINE U64 multiply(U64 x, uint32_t m) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__x86_64__)
  return (U64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#elif defined(__aarch64__)
  return (U64)vmull_n_u32(vmovn_u64((uint64x2_t)x), m);
#else
  return (x & 0xFFFFFFFFu) * m;
#endif
}

OP_INLINE U64 xor3(U64 x, U64 y, uint32_t z) {
#if defined(__AVX512F__)
  return (U64)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)y, _mm512_set1_epi32(static_cast<int>(z)), 0x96);
#else
  return x ^ y ^ (U64)splat_u32(z);
#endif
}

// The lower halves of both, in turn.
OP_INLINE U32 interleave(U64 even, U64 odd) {
#if defined(__AVX512F__)
  return (U32)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#else
  return (U32)((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

struct RoundKeys {
  uint32_t k[ROUNDS][2];
  explicit RoundKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < ROUNDS; ++round, k0 += WEYL_0, k1 += WEYL_1) k[round][0] = k0, k[round][1] = k1;
  }
};

// Words of N W blocks from `block` on. The rounds of one block wait for each other: N runs hide that.
template <int N>
OP_INLINE void philox(const RoundKeys& keys, uint64_t stream, uint64_t block, Words* words) {
  U64 c0[2 * N], c1[2 * N], c2[2 * N], c3[2 * N];
  for (int n = 0; n < 2 * N; ++n) {
    U64 lane{};
    for (int i = 0; i < W / 2; ++i) lane[i] = static_cast<uint64_t>(2 * i + n % 2 + n / 2 * W);
    c0[n] = splat_u64(block) + lane;
    c1[n] = c0[n] >> 32;
    c2[n] = splat_u64(stream);
    c3[n] = splat_u64(stream >> 32);
  }
#pragma GCC unroll 10
  for (int round = 0; round < ROUNDS; ++round) {
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n) {
      const U64 product0 = multiply(c0[n], MULTIPLIER_0), product1 = multiply(c2[n], MULTIPLIER_1);
      c0[n] = xor3(product1 >> 32, c1[n], keys.k[round][0]);
      c1[n] = product1;
      c2[n] = xor3(product0 >> 32, c3[n], keys.k[round][1]);
      c3[n] = product0;
    }
  }
  for (int n = 0; n < N; ++n)
    words[n] = {{interleave(c0[2 * n], c0[2 * n + 1]), interleave(c1[2 * n], c1[2 * n + 1]),
                 interleave(c2[2 * n], c2[2 * n + 1]), interleave(c3[2 * n], c3[2 * n + 1])}};
}

// a * b + c, of a product that a float32 holds exactly: one rounding is then the same as two.
OP_INLINE F32 exact_fma(F32 a, float b, F32 c) { return fma(a, splat(b), c); }

// x with its sign changed where the top bit is set.
OP_INLINE F32 flip(F32 x, I32 top) {
#if defined(__AVX512F__)
  return (F32)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)top, _mm512_set1_epi32(INT32_MIN), 0x78);
#else
  return as_f32(as_i32(x) ^ (top & INT32_MIN));
#endif
}

OP_INLINE F32 unit(U32 word) {
#if defined(__AVX512F__)
  const F32 x = _mm512_cvtepu32_ps((__m512i)word);
#else
  // Both halves are exact and the sum rounds once: the signed conversion is the only one there is.
  const F32 x = to_f32((I32)(word >> 16)) * 65536.0f + to_f32((I32)(word & 0xFFFFu));
#endif
  return min(exact_fma(x, UNIT_STEP, splat(UNIT_MIDDLE)), splat(UNIT_MOST));
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
  return exact_fma(k, LN2_HIGH, exact_fma(square, -0.5f, tail) + f);
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
  const I32 quadrant = truncate(exact_fma(u, 4.0f, splat(0.5f)));
  const F32 r = exact_fma(u, 4.0f, -to_f32(quadrant)), square = r * r;
  F32 s = splat(SIN_0);
  s = s * square + SIN_1;
  s = s * square + SIN_2;
  F32 c = splat(COS_0);
  c = c * square + COS_1;
  c = c * square + COS_2;
  c = c * square + COS_3;
  const F32 sine = r * HALF_PI_HIGH + (r * square * s + r * HALF_PI_LOW);
  const F32 cosine = square * c + 1.0f;
  const I32 odd = (quadrant & 1) != 0, turned = quadrant << 30;
  sin = flip(odd ? cosine : sine, turned);
  cos = flip(odd ? sine : cosine, turned + (1 << 30));
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

// The DRAW elements that the words of W blocks give, in element order.
template <Distribution D>
OP_INLINE void transform(const Words& words, float* out) {
  F32 v[4], woven[4];
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
  weave(v, woven);
  for (int j = 0; j < 4; ++j) store(out + j * W, woven[j]);
}

// `draws` times DRAW elements from a block of the key's row on. All words first, then all elements: each loop is short
// enough for the processor to work on several turns of it at a time.
template <Distribution D>
static void draw(const Key& key, uint64_t block, int64_t draws, float* out) {
  constexpr int64_t CHUNK = 16;
  const RoundKeys keys(key.seed);
  Words words[CHUNK];
  for (int64_t begin = 0; begin < draws; begin += CHUNK) {
    const int64_t count = draws - begin < CHUNK ? draws - begin : CHUNK;
    const uint64_t first = key.offset + block + static_cast<uint64_t>(begin) * W;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) philox<2>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    if (i < count) philox<1>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    for (i = 0; i < count; ++i) transform<D>(words[i], out + (begin + i) * DRAW);
  }
}

// Elements [start, start + count) of the key's row; the buffer has room for count + 2 DRAW.
template <Distribution D>
static const float* draw_elements(const Key& key, int64_t start, int64_t count, float* buffer) {
  const int64_t skip = start % 4;
  draw<D>(key, static_cast<uint64_t>(start / 4), (skip + count + DRAW - 1) / DRAW, buffer);
  return buffer + skip;
}

}  // namespace onepass::ONEPASS_ISA
