// A vector of float32 lanes per instruction set, on GCC's and Clang's vector types: + - * / & | << >> and comparisons
// are operators, `mask ? a : b` selects. Here is only what has no operator. Included by csrc/cpu/*.cpp alone.
#pragma once
#include <cstdint>
#include <cstring>

#include "onepass/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace onepass::ONEPASS_ISA {

#if defined(__AVX512F__)
inline constexpr int W = 16;
#elif defined(__AVX2__)
inline constexpr int W = 8;
#else
inline constexpr int W = 4;
#endif

typedef float F32 __attribute__((vector_size(W * 4)));
typedef int32_t I32 __attribute__((vector_size(W * 4)));
typedef uint32_t U32 __attribute__((vector_size(W * 4)));
typedef uint16_t U16 __attribute__((vector_size(W * 2)));
typedef int8_t S8 __attribute__((vector_size(W)));
typedef uint8_t U8 __attribute__((vector_size(W)));

#define OP_INLINE static inline __attribute__((always_inline))

OP_INLINE F32 splat(float x) { return x - F32{}; }  // x - 0 keeps the sign of zero
OP_INLINE U32 splat_u32(uint32_t x) { return x | U32{}; }
OP_INLINE I32 splat_i32(int32_t x) { return x | I32{}; }
OP_INLINE I32 as_i32(F32 x) { return (I32)x; }
OP_INLINE F32 as_f32(I32 x) { return (F32)x; }
OP_INLINE F32 to_f32(I32 x) { return __builtin_convertvector(x, F32); }
OP_INLINE I32 truncate(F32 x) { return __builtin_convertvector(x, I32); }

OP_INLINE U32 iota() {
  U32 lane{};
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
  return lane;
}

// Lane i is lane J[i] of a, or of b from W on. GCC has no __builtin_shufflevector before 12, Clang no
// __builtin_shuffle.
template <int... J>
OP_INLINE F32 shuffle(F32 a, F32 b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, I32{J...});
#endif
}

// a * b + c in one rounding where the hardware has it. Never in the random numbers, which must not depend on that.
OP_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// x where x > y else y: a NaN in x gives y, as the x86 instructions do.
OP_INLINE F32 max(F32 x, F32 y) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

OP_INLINE F32 min(F32 x, F32 y) {
#if defined(__AVX512F__)
  return _mm512_min_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_min_ps(x, y);
#else
  return x < y ? x : y;
#endif
}

OP_INLINE F32 sqrt(F32 x) {  // correctly rounded
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#elif defined(__aarch64__)
  return vsqrtq_f32(x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Nearest integer, ties to even, as a float. Right for |x| < 2^22.
OP_INLINE F32 round_even(F32 x) { return (x + 12582912.0f) - 12582912.0f; }

OP_INLINE float sum(F32 x) {  // a fixed tree: halves, quarters, ...
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float part[W];
  std::memcpy(part, &x, sizeof x);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) part[i] += part[i + step];
  return part[0];
#endif
}

OP_INLINE float max_lane(F32 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float best = x[0];
  for (int i = 1; i < W; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// ---- memory: T is float, BF16 or F16; the _n forms touch the first n elements of a vector, all for n >= W and
// none for n <= 0, and load zeros into the other lanes ----

OP_INLINE F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

OP_INLINE U32 to_u32(U16 x) {  // GCC 12 takes the vector apart where it is free to choose
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (U32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, U32);
#endif
}

OP_INLINE U16 to_u16(U32 x) {  // the lower half of each lane
#if defined(__AVX512F__)
  return (U16)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, U16);
#endif
}

OP_INLINE F32 widen(U16 half, BF16) { return (F32)(to_u32(half) << 16); }

OP_INLINE F32 widen(U16 half, F16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)half);
#elif defined(__aarch64__)
  return vcvt_f32_f16((float16x4_t)half);
#else
  const I32 bits = (I32)to_u32(half), size = bits & 0x7FFF;
  const I32 quiet = size > 0x7C00 ? splat_i32(0x7FC00000) : splat_i32(0x7F800000);
  const I32 normal = size < 0x7C00 ? (size << 13) + (112 << 23) : quiet | size << 13;
  const I32 value = size < 0x400 ? (I32)(to_f32(size) * 0x1p-24f) : normal;
  return (F32)(value | (bits & 0x8000) << 16);
#endif
}

OP_INLINE U16 narrow(F32 x, BF16) {  // ties to even; NaN stays NaN; denormals are kept, unlike vcvtneps2bf16
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40u;
  return to_u16(x == x ? rounded : quiet);
}

OP_INLINE U16 narrow(F32 x, F16) {
#if defined(__AVX512F__)
  return (U16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (U16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (U16)vcvt_f16_f32(x);
#else
  const I32 bits = (I32)x, size = bits & 0x7FFFFFFF;
  const I32 normal = (I32)(((U32)size + 0xFFFu + (((U32)size >> 13) & 1u) - (112u << 23)) >> 13);
  const I32 denormal = (I32)((F32)size + 0.5f) - (I32)splat(0.5f);  // of 0.5 the last place is a half's smallest step
  const I32 large = size > 0x7F800000 ? ((size >> 13) & 0x3FF) | 0x7E00 : splat_i32(0x7C00);
  const I32 value = size < (113 << 23) ? denormal : size < (143 << 23) ? normal : large;
  return to_u16((U32)(value | ((bits >> 16) & 0x8000)));
#endif
}

template <class Half>
OP_INLINE F32 load(const Half* p) {
  U16 half;
  std::memcpy(&half, p, sizeof half);
  return widen(half, Half{});
}

// GCC takes vectors of bytes apart, so this is no __builtin_convertvector.
OP_INLINE I32 to_i32(U8 x) {  // signed bytes
#if defined(__AVX512F__)
  return (I32)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (I32)_mm256_cvtepi8_epi32(_mm_set1_epi64x((int64_t)x));
#elif defined(__x86_64__)
  return (I32)_mm_cvtepi8_epi32(_mm_set1_epi32((int32_t)x));
#elif defined(__aarch64__)
  return vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)vdup_n_u32((uint32_t)x))));
#else
  return __builtin_convertvector((S8)x, I32);
#endif
}

// Codes widen to values of bfloat16: the low half of each lane is zero.
OP_INLINE F32 widen(U8 code, I8) { return to_f32(to_i32(code)); }

OP_INLINE F32 widen(U8 code, E4M3) {
  const U32 bits = (U32)to_i32(code), size = bits & 0x7Fu;
  const F32 normal = (F32)((size << 20) + (120u << 23)), denormal = to_f32((I32)size) * 0x1p-9f;
  const U32 value = size < 8u ? (U32)denormal : size == 0x7Fu ? splat_u32(0x7FC00000u) : (U32)normal;
  return (F32)(value | (bits & 0x80u) << 24);
}

template <class Code>
OP_INLINE F32 load_codes(const Code* p) {
  U8 code;
  std::memcpy(&code, p, sizeof code);
  return widen(code, Code{});
}
OP_INLINE F32 load(const I8* p) { return load_codes(p); }
OP_INLINE F32 load(const E4M3* p) { return load_codes(p); }

#if defined(__AVX512F__)
OP_INLINE __mmask16 first(int n) { return static_cast<__mmask16>(n >= W ? 0xFFFF : n > 0 ? (1u << n) - 1 : 0); }
OP_INLINE F32 load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
template <class Half>
OP_INLINE F32 load_n(const Half* p, int n) {
  return widen((U16)_mm256_maskz_loadu_epi16(first(n), p), Half{});
}
OP_INLINE F32 load_n(const I8* p, int n) { return widen((U8)_mm_maskz_loadu_epi8(first(n), p), I8{}); }
OP_INLINE F32 load_n(const E4M3* p, int n) { return widen((U8)_mm_maskz_loadu_epi8(first(n), p), E4M3{}); }
#else
template <class T>
OP_INLINE F32 load_n(const T* p, int n) {
  if (n >= W) return load(p);
  T buffer[W] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
#endif

OP_INLINE void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }

template <class Half>
OP_INLINE void store(Half* p, F32 x) {
  const U16 half = narrow(x, Half{});
  std::memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
OP_INLINE void store_n(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
template <class Half>
OP_INLINE void store_n(Half* p, F32 x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)narrow(x, Half{}));
}
#else
template <class T>
OP_INLINE void store_n(T* p, F32 x, int n) {
  if (n >= W) return store(p, x);
  T buffer[W];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif

// ---- functions ----

// x = k ln 2 + r with a whole k and |r| <= ln 2 / 2: e^r - 1.
OP_INLINE F32 exp_tail(F32 x, F32& k) {
  k = round_even(x * 1.44269504f);
  F32 r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  F32 q = splat(1.3818296e-3f);
  q = fma(q, r, splat(8.368532e-3f));
  q = fma(q, r, splat(4.1668292e-2f));
  q = fma(q, r, splat(0.16666523f));
  q = fma(q, r, splat(0.49999994f));
  return fma(q, r * r, r);
}

// y 2^k of a whole k, rounded once.
OP_INLINE F32 scale(F32 y, F32 k) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, k);
#else
  // 2^k in two factors, so that the largest and the denormal results round once too.
  const I32 whole = truncate(k == k ? k : splat(0.0f)), half = whole >> 1;
  return y * as_f32((half + 127) << 23) * as_f32((whole - half + 127) << 23);
#endif
}

// e^x within 1.5 ulp (no overflow trap: above 88.7 inf, below -104 zero, NaN stays NaN).
OP_INLINE F32 exp(F32 x) {
  F32 k;
  const F32 y = exp_tail(min(splat(89.0f), max(splat(-104.0f), x)), k) + 1.0f;
  return scale(y, k);
}

// e^(x / 2), as exp. With AVX-512 in 4 instructions less of 19: adding 1.5 2^23 rounds k, and halving x is left to the
// coefficients, powers of two and so exact.
OP_INLINE F32 exp_half(F32 x) {
#if defined(__AVX512F__)
  constexpr float ROUNDS = 12582912.0f;
  const F32 bounded = min(splat(178.0f), max(splat(-208.0f), x));
  const F32 k = fma(bounded, splat(1.44269504f / 2), splat(ROUNDS)) - ROUNDS;
  F32 r = fma(k, splat(2 * -0.693359375f), bounded);
  r = fma(k, splat(2 * 2.12194440e-4f), r);
  F32 q = splat(1.3818296e-3f / 64);
  q = fma(q, r, splat(8.368532e-3f / 32));
  q = fma(q, r, splat(4.1668292e-2f / 16));
  q = fma(q, r, splat(0.16666523f / 8));
  q = fma(q, r, splat(0.49999994f / 4));
  q = fma(q, r, splat(0.5f));
  return scale(fma(q, r, splat(1.0f)), k);
#else
  return exp(0.5f * x);
#endif
}

// e^x - 1 with a small relative error near 0 too.
OP_INLINE F32 expm1(F32 x) {
  const F32 bounded = x > 89.0f ? splat(89.0f) : (x < -30.0f ? splat(-30.0f) : x);
  F32 k;
  const F32 tail = exp_tail(bounded, k);
  const I32 whole = truncate(x == x ? k : splat(0.0f)), half = whole >> 1;
  const F32 low = as_f32((half + 127) << 23), high = as_f32((whole - half + 127) << 23);
  return fma(tail * low, high, fma(low, high, splat(-1.0f)));
}

}  // namespace onepass::ONEPASS_ISA
