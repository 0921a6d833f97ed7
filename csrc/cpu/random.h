// The recipe of engine/reference/rng.py, lane by lane and bit by bit: the order of operations is the definition, and
// fma() stands only where the product is exact. Block n of W is in lane n of four vectors of words, then woven into
// order.
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

// N vectors that go through the same steps side by side: a polynomial's steps wait for each other, N of them do not.
template <class V, int N>
struct Pack {
  V v[N];
};

template <int N, class F>
OP_INLINE auto each(F&& f) {
  Pack<decltype(f(0)), N> result;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) result.v[i] = f(i);
  return result;
}

template <int N>
using F32s = Pack<F32, N>;
template <int N>
using I32s = Pack<I32, N>;

template <int N>
OP_INLINE F32s<N> operator+(const F32s<N>& x, const F32s<N>& y) {
  return each<N>([&](int i) { return x.v[i] + y.v[i]; });
}
template <int N>
OP_INLINE F32s<N> operator*(const F32s<N>& x, const F32s<N>& y) {
  return each<N>([&](int i) { return x.v[i] * y.v[i]; });
}
template <int N>
OP_INLINE F32s<N> operator+(const F32s<N>& x, float y) {
  return each<N>([&](int i) { return x.v[i] + y; });
}
template <int N>
OP_INLINE F32s<N> operator*(const F32s<N>& x, float y) {
  return each<N>([&](int i) { return x.v[i] * y; });
}
template <int N>
OP_INLINE F32s<N> operator-(const F32s<N>& x) {
  return each<N>([&](int i) { return -x.v[i]; });
}
template <int N>
OP_INLINE F32s<N> to_f32(const I32s<N>& x) {
  return each<N>([&](int i) { return to_f32(x.v[i]); });
}

// a * b + c, of a product that a float32 holds exactly: one rounding is then the same as two.
template <int N>
OP_INLINE F32s<N> exact_fma(const F32s<N>& a, float b, const F32s<N>& c) {
  return each<N>([&](int i) { return fma(a.v[i], splat(b), c.v[i]); });
}
template <int N>
OP_INLINE F32s<N> exact_fma(const F32s<N>& a, float b, float c) {
  return each<N>([&](int i) { return fma(a.v[i], splat(b), splat(c)); });
}

// x with its sign changed where the top bit is set.
OP_INLINE F32 flip(F32 x, I32 top) {
#if defined(__AVX512F__)
  return (F32)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)top, _mm512_set1_epi32(INT32_MIN), 0x78);
#else
  return as_f32(as_i32(x) ^ (top & INT32_MIN));
#endif
}

OP_INLINE F32 whole(U32 word) {
#if defined(__AVX512F__)
  return _mm512_cvtepu32_ps((__m512i)word);
#else
  // Both halves are exact and the sum rounds once: the signed conversion is the only one there is.
  return to_f32((I32)(word >> 16)) * 65536.0f + to_f32((I32)(word & 0xFFFFu));
#endif
}

template <int N>
OP_INLINE F32s<N> unit(const Pack<U32, N>& word) {
  const F32s<N> u = exact_fma(each<N>([&](int i) { return whole(word.v[i]); }), UNIT_STEP, UNIT_MIDDLE);
  return each<N>([&](int i) { return min(u.v[i], splat(UNIT_MOST)); });
}

template <int N>
OP_INLINE F32s<N> ln_reduced(const F32s<N>& f, const F32s<N>& k) {
  F32s<N> p = f * LN_0 + LN_1;
  p = p * f + LN_2;
  p = p * f + LN_3;
  p = p * f + LN_4;
  p = p * f + LN_5;
  p = p * f + LN_6;
  p = p * f + LN_7;
  const F32s<N> square = f * f;
  const F32s<N> tail = f * square * p + k * LN2_LOW;
  return exact_fma(k, LN2_HIGH, exact_fma(square, -0.5f, tail) + f);
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)): m - 1 and k.
template <int N>
OP_INLINE F32s<N> split(const F32s<N>& x, I32s<N>& k) {
  const I32s<N> bits = each<N>([&](int i) { return as_i32(x.v[i]) - SQRT_HALF_BITS; });
  k = each<N>([&](int i) { return bits.v[i] >> 23; });
  return each<N>([&](int i) { return as_f32((bits.v[i] & 0x7FFFFF) + SQRT_HALF_BITS) - 1.0f; });
}

template <int N>
OP_INLINE F32s<N> ln(const F32s<N>& x) {
  I32s<N> k;
  const F32s<N> f = split(x, k);
  return ln_reduced(f, to_f32(k));
}

template <int N>
OP_INLINE F32s<N> log1p_neg(const F32s<N>& u) {  // ln(1 - u)
  const F32s<N> rest = each<N>([&](int i) { return 1.0f - u.v[i]; });
  I32s<N> k;
  const F32s<N> f = split(rest, k);
  const F32s<N> lost = each<N>([&](int i) { return ((1.0f - rest.v[i]) - u.v[i]) * as_f32((127 - k.v[i]) << 23); });
  return ln_reduced(f + lost, to_f32(k));
}

template <int N>
OP_INLINE void sincos_turn(const F32s<N>& u, F32s<N>& sin, F32s<N>& cos) {  // of 2 pi u, u in [0, 1)
  const F32s<N> turned = exact_fma(u, 4.0f, 0.5f);
  const I32s<N> quadrant = each<N>([&](int i) { return truncate(turned.v[i]); });
  const F32s<N> r = exact_fma(u, 4.0f, -to_f32(quadrant)), square = r * r;
  const F32s<N> s = (square * SIN_0 + SIN_1) * square + SIN_2;
  const F32s<N> c = ((square * COS_0 + COS_1) * square + COS_2) * square + COS_3;
  const F32s<N> sine = r * HALF_PI_HIGH + (r * square * s + r * HALF_PI_LOW);
  const F32s<N> cosine = square * c + 1.0f;
  const I32s<N> odd = each<N>([&](int i) { return (quadrant.v[i] & 1) != 0; });
  const I32s<N> sign = each<N>([&](int i) { return quadrant.v[i] << 30; });
  sin = each<N>([&](int i) { return flip(odd.v[i] ? cosine.v[i] : sine.v[i], sign.v[i]); });
  cos = each<N>([&](int i) { return flip(odd.v[i] ? sine.v[i] : cosine.v[i], sign.v[i] + (1 << 30)); });
}

// Box-Muller on two words of each lane.
template <int N>
OP_INLINE void normal_pair(const Pack<U32, N>& w0, const Pack<U32, N>& w1, F32s<N>& z0, F32s<N>& z1) {
  const F32s<N> square = ln(unit(w0)) * -2.0f;
  const F32s<N> radius = each<N>([&](int i) { return sqrt(square.v[i]); });
  F32s<N> sin, cos;
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

// Fetch elements i to i + n of what will be read, or written, soon. Addresses beyond a tensor do no harm.
template <class T>
OP_INLINE void fetch(const T* p, int64_t i, int64_t n) {
  for (int64_t j = i; j < i + n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + j, 0);
}
template <class T>
OP_INLINE void fetch_to_write(T* p, int64_t i, int64_t n) {
  for (int64_t j = i; j < i + n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + j, 1);
}

// The elements that N times W blocks of words give, in element order.
template <Distribution D, int N>
OP_INLINE void transform(const Words* words, float* out) {
  F32s<4 * N> x;
  if constexpr (D == Distribution::normal) {
    F32s<2 * N> even, odd;
    normal_pair(each<2 * N>([&](int i) { return words[i / 2].w[i % 2 * 2]; }),
                each<2 * N>([&](int i) { return words[i / 2].w[i % 2 * 2 + 1]; }), even, odd);
    x = each<4 * N>([&](int i) { return i % 2 ? odd.v[i / 2] : even.v[i / 2]; });
  } else if constexpr (D == Distribution::bits) {
    x = each<4 * N>([&](int i) { return (F32)words[i / 4].w[i % 4]; });
  } else {
    const F32s<4 * N> u = unit(each<4 * N>([&](int i) { return words[i / 4].w[i % 4]; }));
    if constexpr (D == Distribution::uniform) x = u;
    if constexpr (D == Distribution::exponential) x = -ln(u);
    if constexpr (D == Distribution::gumbel) x = -ln(-log1p_neg(u));
    if constexpr (D == Distribution::logistic) x = ln(u) + -log1p_neg(u);
    if constexpr (D == Distribution::laplace) {
      const F32s<4 * N> size = ln(each<4 * N>([&](int i) { return 2.0f * (u.v[i] < 0.5f ? u.v[i] : 1.0f - u.v[i]); }));
      x = each<4 * N>([&](int i) { return u.v[i] < 0.5f ? size.v[i] : -size.v[i]; });
    }
  }
  for (int n = 0; n < N; ++n) {
    F32 woven[4];
    weave(x.v + 4 * n, woven);
    for (int j = 0; j < 4; ++j) store(out + n * DRAW + j * W, woven[j]);
  }
}

// `draws` times DRAW elements from a block of the key's row on. All words first, then all elements: each loop is short
// enough for the processor to work on several turns of it at a time. `beside(i, n)` is called while elements i to i + n
// are made, to fetch what will be read with them: the memory is idle meanwhile.
template <Distribution D, class Beside>
static void draw(const Key& key, uint64_t block, int64_t draws, float* out, Beside&& beside) {
  constexpr int64_t CHUNK = 12;
  const RoundKeys keys(key.seed);
  Words words[CHUNK];
  for (int64_t begin = 0; begin < draws; begin += CHUNK) {
    const int64_t count = draws - begin < CHUNK ? draws - begin : CHUNK;
    const uint64_t first = key.offset + block + static_cast<uint64_t>(begin) * W;
    int64_t i = 0;
    for (; i + 3 <= count; i += 3) philox<3>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    for (; i < count; ++i) philox<1>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    for (i = 0; i + 2 <= count; i += 2) {
      beside((begin + i) * DRAW, 2 * DRAW);
      transform<D, 2>(words + i, out + (begin + i) * DRAW);
    }
    if (i < count) {
      beside((begin + i) * DRAW, DRAW);
      transform<D, 1>(words + i, out + (begin + i) * DRAW);
    }
  }
}

template <Distribution D>
static void draw(const Key& key, uint64_t block, int64_t draws, float* out) {
  draw<D>(key, block, draws, out, [](int64_t, int64_t) {});
}

// Elements [start, start + count) of the key's row; the buffer has room for count + 2 DRAW.
template <Distribution D, class Beside>
static const float* draw_elements(const Key& key, int64_t start, int64_t count, float* buffer, Beside&& beside) {
  const int64_t skip = start % 4;
  draw<D>(key, static_cast<uint64_t>(start / 4), (skip + count + DRAW - 1) / DRAW, buffer, beside);
  return buffer + skip;
}

template <Distribution D>
static const float* draw_elements(const Key& key, int64_t start, int64_t count, float* buffer) {
  return draw_elements<D>(key, start, count, buffer, [](int64_t, int64_t) {});
}

}  // namespace onepass::ONEPASS_ISA
