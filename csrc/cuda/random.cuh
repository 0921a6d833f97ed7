// The recipe of engine/reference/rng.py on a device, bit by bit: each operation is rounded on its own (no nvcc option
// can fuse the _rn ones), in the order that the reference writes.
#pragma once
#include "device.cuh"
#include "onepass/recipe.h"
#include "onepass/rng.h"

namespace onepass::cuda {

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul_add(float a, float b, float c) { return add(mul(a, b), c); }  // two roundings

inline constexpr int NUMBERS = 4;  // of a Philox block

struct Words {
  uint32_t w[4];
};

__device__ __forceinline__ Words philox(const Key& key, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.stream), c3 = static_cast<uint32_t>(key.stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < recipe::ROUNDS; ++round) {
    const uint32_t high0 = __umulhi(recipe::MULTIPLIER_0, c0), low0 = recipe::MULTIPLIER_0 * c0;
    const uint32_t high1 = __umulhi(recipe::MULTIPLIER_1, c2), low1 = recipe::MULTIPLIER_1 * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += recipe::WEYL_0;
    k1 += recipe::WEYL_1;
  }
  return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float unit(uint32_t word) {
  return fminf(mul_add(__uint2float_rn(word), recipe::UNIT_STEP, recipe::UNIT_MIDDLE), recipe::UNIT_MOST);
}

__device__ __forceinline__ float ln_reduced(float f, float k) {
  using namespace recipe;
  float p = LN_0;
  p = mul_add(p, f, LN_1);
  p = mul_add(p, f, LN_2);
  p = mul_add(p, f, LN_3);
  p = mul_add(p, f, LN_4);
  p = mul_add(p, f, LN_5);
  p = mul_add(p, f, LN_6);
  p = mul_add(p, f, LN_7);
  const float square = mul(f, f);
  const float tail = add(mul(mul(f, square), p), mul(k, LN2_LOW));
  return add(add(sub(tail, mul(0.5f, square)), f), mul(k, LN2_HIGH));
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)).
__device__ __forceinline__ float split(float x, int& k) {
  const int bits = __float_as_int(x) - recipe::SQRT_HALF_BITS;
  k = bits >> 23;
  return __int_as_float((bits & 0x7FFFFF) + recipe::SQRT_HALF_BITS);
}

__device__ __forceinline__ float ln(float x) {
  int k;
  const float mantissa = split(x, k);
  return ln_reduced(sub(mantissa, 1.0f), __int2float_rn(k));
}

__device__ __forceinline__ float log1p_neg(float u) {  // ln(1 - u)
  const float rest = sub(1.0f, u), lost = sub(sub(1.0f, rest), u);
  int k;
  const float mantissa = split(rest, k);
  const float scale = __int_as_float((127 - k) << 23);
  return ln_reduced(add(sub(mantissa, 1.0f), mul(lost, scale)), __int2float_rn(k));
}

__device__ __forceinline__ void sincos_turn(float u, float& sin, float& cos) {  // of 2 pi u, u in [0, 1)
  using namespace recipe;
  const float quarters = mul(4.0f, u);
  const int quadrant = __float2int_rz(add(quarters, 0.5f));
  const float r = sub(quarters, __int2float_rn(quadrant)), square = mul(r, r);
  const float s = mul_add(mul_add(SIN_0, square, SIN_1), square, SIN_2);
  const float c = mul_add(mul_add(mul_add(COS_0, square, COS_1), square, COS_2), square, COS_3);
  const float sine = add(mul(r, HALF_PI_HIGH), add(mul(mul(r, square), s), mul(r, HALF_PI_LOW)));
  const float cosine = mul_add(square, c, 1.0f);
  const bool odd = quadrant & 1;
  const int sin_sign = (quadrant & 2) << 30, cos_sign = ((quadrant + 1) & 2) << 30;
  sin = __int_as_float(__float_as_int(odd ? cosine : sine) ^ sin_sign);
  cos = __int_as_float(__float_as_int(odd ? sine : cosine) ^ cos_sign);
}

// Box-Muller on two words.
__device__ __forceinline__ void normal_pair(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float radius = __fsqrt_rn(mul(-2.0f, ln(unit(w0))));
  float sin, cos;
  sincos_turn(unit(w1), sin, cos);
  z0 = mul(radius, cos);
  z1 = mul(radius, sin);
}

__device__ __forceinline__ void normals(const Key& key, uint64_t block, float* z) {
  const Words words = philox(key, block);
  normal_pair(words.w[0], words.w[1], z[0], z[1]);
  normal_pair(words.w[2], words.w[3], z[2], z[3]);
}

// Four draws of one block; the words themselves where bits are asked for.
__device__ __forceinline__ void draw(Distribution distribution, const Key& key, uint64_t block, float* x) {
  if (distribution == Distribution::normal) return normals(key, block, x);
  const Words words = philox(key, block);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float u = unit(words.w[i]);
    switch (distribution) {
      case Distribution::bits: x[i] = __uint_as_float(words.w[i]); break;
      case Distribution::uniform: x[i] = u; break;
      case Distribution::exponential: x[i] = -ln(u); break;
      case Distribution::gumbel: x[i] = -ln(-log1p_neg(u)); break;
      case Distribution::logistic: x[i] = sub(ln(u), log1p_neg(u)); break;
      default: {  // laplace
        const bool low = u < 0.5f;
        const float size = ln(mul(2.0f, low ? u : sub(1.0f, u)));
        x[i] = low ? size : -size;
      }
    }
  }
}

// Where a run of elements begins in its row of random numbers: `skip` of the first block of four belong to what is
// before.
struct NoiseAt {
  Key key;
  int64_t first;
  int skip;
};

__device__ __forceinline__ NoiseAt noise_from(const Key& key, int64_t start) {
  return {key, start - start % 4, static_cast<int>(start % 4)};
}

// The normals of elements i .. i + N - 1 of a row of random numbers; i is a multiple of 4.
template <int N>
__device__ __forceinline__ void normals_at(const Key& key, int64_t i, float (&z)[N]) {
#pragma unroll
  for (int j = 0; j < N; j += 4) normals(key, key.offset + static_cast<uint64_t>((i + j) / 4), z + j);
}

}  // namespace onepass::cuda
