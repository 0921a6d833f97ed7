// The recipe of engine/reference/rng.py, lane by lane and bit by bit: the order of operations is the definition, and
// fma() stands only where the product is exact.
#pragma once
#include "onepass/rng.h"
#include "philox.h"

namespace onepass::ONEPASS_ISA {

inline constexpr int DRAW = 4 * W;  // elements of W blocks

// N vectors that go through the same steps side by side: a polynomial's steps wait for each other, N of them do not.
template <class V, int N>
struct Pack {
  V v[N];
};

template <int N, class F>
OP_INLINE auto each(F&& f) {
  Pack<decltype(f(0)), N> result;
#pragma GCC unroll 16
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

// S times the logarithm of (1 + f) 2^k. S is a power of two, of either sign: each constant times S gives each step's
// result times S, to the bit.
template <int S = 1, int N>
OP_INLINE F32s<N> ln_reduced(const F32s<N>& f, const F32s<N>& k) {
  F32s<N> p = f * (S * LN_0) + S * LN_1;
  p = p * f + S * LN_2;
  p = p * f + S * LN_3;
  p = p * f + S * LN_4;
  p = p * f + S * LN_5;
  p = p * f + S * LN_6;
  p = p * f + S * LN_7;
  const F32s<N> square = f * f;
  const F32s<N> tail = f * square * p + k * (S * LN2_LOW);
  return exact_fma(k, S * LN2_HIGH, exact_fma(f, S, exact_fma(square, S * -0.5f, tail)));
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)): m - 1 and k.
template <int N>
OP_INLINE F32s<N> split(const F32s<N>& x, I32s<N>& k) {
  const I32s<N> bits = each<N>([&](int i) { return as_i32(x.v[i]) - SQRT_HALF_BITS; });
  k = each<N>([&](int i) { return bits.v[i] >> 23; });
  return each<N>([&](int i) { return as_f32((bits.v[i] & 0x7FFFFF) + SQRT_HALF_BITS) - 1.0f; });
}

template <int S = 1, int N>
OP_INLINE F32s<N> ln(const F32s<N>& x) {  // times S
  I32s<N> k;
  const F32s<N> f = split(x, k);
  return ln_reduced<S>(f, to_f32(k));
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
  const F32s<N> square = ln<-2>(unit(w0));
  const F32s<N> radius = each<N>([&](int i) { return sqrt(square.v[i]); });
  F32s<N> sin, cos;
  sincos_turn(unit(w1), sin, cos);
  z0 = radius * cos;
  z1 = radius * sin;
}

// Fetch elements i to i + n of what will be read, or written, soon, into the second cache: the first has too few
// buffers for lines on their way. Addresses beyond a tensor do no harm.
template <class T>
OP_INLINE void fetch(const T* p, int64_t i, int64_t n) {
  for (int64_t j = i; j < i + n; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + j, 0, 2);
  asm volatile("");  // GCC takes a function of mere prefetches for one without effect, and drops every call of it
}

// Whether operands of so many elements are worth fetching: of smaller ones all lie in the second cache together.
template <class T>
OP_INLINE bool is_far(int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) > 1 << 18;
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
// enough for the processor to work on several turns of it at a time. `beside(i, n)` is called for every element on the
// way, a few at a time, to fetch what will be read with them: the memory is idle meanwhile.
template <Distribution D, class Beside>
static void draw(const Key& key, uint64_t block, int64_t draws, float* out, Beside&& beside) {
  constexpr int64_t CHUNK = 12, TOGETHER = D == Distribution::normal && W == 16 ? 4 : 2;  // what was quickest
  const RoundKeys keys(key.seed);
  Words words[CHUNK];
  int64_t met = 0;  // half of a draw's elements while its words are made, half while its numbers are
  const auto meet = [&](int64_t halves) {
    beside(met, halves * DRAW / 2);
    met += halves * DRAW / 2;
  };
  for (int64_t begin = 0; begin < draws; begin += CHUNK) {
    const int64_t count = draws - begin < CHUNK ? draws - begin : CHUNK;
    const uint64_t first = key.offset + block + static_cast<uint64_t>(begin) * W;
    int64_t i = 0;
    for (; i + 3 <= count; i += 3) {
      meet(3);
      philox<3>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    }
    for (; i < count; ++i) {
      meet(1);
      philox<1>(keys, key.stream, first + static_cast<uint64_t>(i) * W, words + i);
    }
    for (i = 0; i + TOGETHER <= count; i += TOGETHER) {
      meet(TOGETHER);
      transform<D, TOGETHER>(words + i, out + (begin + i) * DRAW);
    }
    for (; i < count; ++i) {
      meet(1);
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
