// From float32 to the codes of a cache: code = x / scale to the nearest, ties to even, saturating. Included by
// csrc/cpu/kvcache.cpp.
#pragma once
#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

template <class Code>
inline constexpr float LARGEST = 0;
template <>
inline constexpr float LARGEST<I8> = 127;
template <>
inline constexpr float LARGEST<E4M3> = 448;

// The largest |x|, NaN if there is one. x has zeros up to a whole vector.
static inline float largest(const float* x, int64_t dim) {
  F32 best{};
  for (int64_t d = 0; d < dim; d += W) {
    const F32 y = (F32)((U32)load(x + d) & 0x7FFFFFFFu);
    best = y > best ? y : (y == y ? best : y);  // a NaN stays: nothing is above it
  }
  float lanes[W], top = 0;
  store(lanes, best);
  for (const float y : lanes) top = y > top || y != y ? y : top;
  return top;
}

OP_INLINE U8 encode(F32 y, I8) {  // NaN gives 0
  const F32 bounded = min(max(y == y ? y : splat(0.0f), splat(-127.0f)), splat(127.0f));
  return (U8) __builtin_convertvector(truncate(round_even(bounded)), S8);
}

OP_INLINE U8 encode(F32 y, E4M3) {  // NaN stays NaN
  const U32 bits = (U32)y, size = bits & 0x7FFFFFFFu;
  const F32 bounded = min((F32)size, splat(448.0f));
  const U32 normal = (((U32)bounded + 0x7FFFFu + (((U32)bounded >> 20) & 1u)) >> 20) - (120u << 3);
  const U32 denormal = (U32)(bounded + 16384.0f) & 0xFu;  // multiples of 2^-9, the last place of 2^14
  const U32 code = y != y ? splat_u32(0x7Fu) : bounded < 0x1p-6f ? denormal : normal;
  return __builtin_convertvector(code | (bits >> 31) << 7, U8);
}

// Zeros have the code of zero whatever the scale; x is as in `largest`.
template <class Code>
static void quantize(const float* x, int64_t dim, float scale, Code* codes) {
  for (int64_t d = 0; d < dim; d += W) {
    const F32 value = load(x + d);
    const U8 code = encode(value == 0.0f ? splat(0.0f) : value / scale, Code{});
    std::memcpy(codes + d, &code, dim - d < W ? dim - d : W);
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
