// Philox4x32-10: block n of W blocks gives four words, which lie in one lane of four vectors.
#pragma once
#include <utility>

#include "onepass/recipe.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {

using namespace recipe;

struct Words {
  U32 w[4];
};

// Which block is in lane n: with this order a transpose within 128 bits puts the words of all blocks in their order.
constexpr int block_of_lane(int n) { return n % 4 * (W / 4) + n / 4; }

// The rounds work on 64-bit lanes, of which the lower half counts: a product then gives both of its words without a
// shuffle. One vector holds the blocks of even lanes and one those of odd lanes, until the words are done.
typedef uint64_t U64 __attribute__((vector_size(W * 4)));

struct LaneBlocks {
  uint64_t of[2][W / 2];
  constexpr LaneBlocks() : of() {
    for (int n = 0; n < W; ++n) of[n % 2][n / 2] = static_cast<uint64_t>(block_of_lane(n));
  }
};
inline constexpr LaneBlocks LANE_BLOCKS;

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

template <class V>
OP_INLINE V xor3(V x, V y, uint32_t z) {
#if defined(__AVX512F__)
  return (V)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)y, _mm512_set1_epi32(static_cast<int>(z)), 0x96);
#else
  return x ^ y ^ (V)splat_u32(z);
#endif
}

// The lower halves of both, in turn.
OP_INLINE U32 interleave_low(U64 even, U64 odd) {
#if defined(__AVX512F__)
  return (U32)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (U32)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
  return (U32)((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

// The upper halves of both, in turn.
OP_INLINE U32 interleave_high(U64 even, U64 odd) {
#if defined(__AVX512F__)
  return (U32)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (U32)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xAA);
#else
  return (U32)((even >> 32) | (odd & 0xFFFFFFFF00000000u));
#endif
}

struct RoundKeys {
  uint32_t k[ROUNDS][2];
  explicit RoundKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < ROUNDS; ++round, k0 += WEYL_0, k1 += WEYL_1) k[round][0] = k0, k[round][1] = k1;
  }
};

// Words of N W blocks from `block` on. The rounds of one block wait for each other: N runs hide that. Unless the upper
// word of the block's number changes on the way, one product in four of the first two rounds is the same for all.
template <int N, bool CARRY>
OP_INLINE void philox_rounds(const RoundKeys& keys, uint64_t stream, uint64_t block, Words* words) {
  U64 c0[2 * N], c1[2 * N], c2[2 * N], c3[2 * N];
  for (int n = 0; n < 2 * N; ++n) {
    U64 lane;
    std::memcpy(&lane, LANE_BLOCKS.of[n % 2], sizeof lane);
    c0[n] = splat_u64(block + static_cast<uint64_t>(n / 2 * W)) + lane;
    c1[n] = CARRY ? c0[n] >> 32 : splat_u64(block >> 32);
    c2[n] = splat_u64(stream);
    c3[n] = splat_u64(stream >> 32);
  }
#pragma GCC unroll 9
  for (int round = 0; round < ROUNDS - 1; ++round) {
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n) {
      const U64 product0 = multiply(c0[n], MULTIPLIER_0), product1 = multiply(c2[n], MULTIPLIER_1);
      c0[n] = xor3(product1 >> 32, c1[n], keys.k[round][0]);
      c1[n] = product1;
      c2[n] = xor3(product0 >> 32, c3[n], keys.k[round][1]);
      c3[n] = product0;
    }
  }
  // The last round puts even and odd lanes together before it combines them.
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const int even = 2 * n, odd = 2 * n + 1;
    const U64 even0 = multiply(c0[even], MULTIPLIER_0), even1 = multiply(c2[even], MULTIPLIER_1);
    const U64 odd0 = multiply(c0[odd], MULTIPLIER_0), odd1 = multiply(c2[odd], MULTIPLIER_1);
    const uint32_t* key = keys.k[ROUNDS - 1];
    words[n] = {
        {xor3(interleave_high(even1, odd1), interleave_low(c1[even], c1[odd]), key[0]), interleave_low(even1, odd1),
         xor3(interleave_high(even0, odd0), interleave_low(c3[even], c3[odd]), key[1]), interleave_low(even0, odd0)}};
  }
}

__attribute__((noinline)) static void philox_across(const RoundKeys& keys, uint64_t stream, uint64_t block,
                                                    Words* words) {
  philox_rounds<1, true>(keys, stream, block, words);
}

template <int N>
OP_INLINE void philox(const RoundKeys& keys, uint64_t stream, uint64_t block, Words* words) {
  const bool carries = static_cast<uint32_t>(block) > 0xFFFFFFFFu - (N * W - 1);
  if (__builtin_expect(!carries, 1)) return philox_rounds<N, false>(keys, stream, block, words);
  for (int n = 0; n < N; ++n) philox_across(keys, stream, block + static_cast<uint64_t>(n * W), words + n);
}

// Of each 128 bits of a and b the half at FROM, S floats of a and S of b in turn.
template <int S, int FROM, int... J>
OP_INLINE F32 zip(F32 a, F32 b, std::integer_sequence<int, J...>) {
  return shuffle<(J / S % 2 * W + J / 4 * 4 + FROM + (S == 1 ? J % 4 / 2 : J % 2))...>(a, b);
}

// Element j of block n, which is in a lane of v[j], becomes element 4 n + j of out: a transpose within 128 bits.
OP_INLINE void weave(const F32 v[4], F32 out[4]) {
  const std::make_integer_sequence<int, W> lanes;
  for (int half = 0; half < 2; ++half) {
    const F32 first = half ? zip<1, 2>(v[0], v[1], lanes) : zip<1, 0>(v[0], v[1], lanes);
    const F32 last = half ? zip<1, 2>(v[2], v[3], lanes) : zip<1, 0>(v[2], v[3], lanes);
    out[2 * half] = zip<2, 0>(first, last, lanes);
    out[2 * half + 1] = zip<2, 2>(first, last, lanes);
  }
}

}  // namespace onepass::ONEPASS_ISA
