// Matrix products of attention's tiles in register blocks. Included by csrc/cpu/attention_*.
#pragma once
#include "attention_fetch.h"
#include "attention_words.h"
#include "attention_work.h"

namespace onepass::ONEPASS_ISA {
namespace {

// Registers: 24 sums and what they are made of with 32 of them, 12 with 16.
inline constexpr int QUERY_VECTORS = 3, KEY_ROWS = W == 16 ? 8 : 4;
inline constexpr int ROWS = 6, COLUMNS = W == 16 ? 4 : 2;
inline constexpr int FETCH_EVERY = 8;  // words of a product

inline constexpr int64_t BESIDE = CHAIN / 2;  // words of a chain that has another beside it

// Adds a chain of `length` words, or SIDE of BESIDE words, to scores[key][row] of KEY_ROWS keys and N vectors of rows.
template <bool DOT, int N, int SIDE>
OP_INLINE void scores_chains(const float* const* key, const float* q, int64_t q_step, int64_t k, int64_t length,
                             float* scores, int64_t stride, FetchRows& ahead) {
  F32 acc[SIDE][KEY_ROWS][N] = {};
  for (int64_t end = k + length; k < end;) {
    fetch(ahead);
    for (const int64_t stop = least(end, k + FETCH_EVERY); k < stop; ++k)
#pragma GCC unroll 2
      for (int side = 0; side < SIDE; ++side) {
        const int64_t at = k + side * BESIDE;
        F32 row[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) row[n] = load(q + at * q_step + n * W);
#pragma GCC unroll 8
        for (int i = 0; i < KEY_ROWS; ++i)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[side][i][n] = multiply_add<DOT>(key[i] + at, row[n], acc[side][i][n]);
      }
  }
  const bool first = k == length;
#pragma GCC unroll 8
  for (int i = 0; i < KEY_ROWS; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* at = scores + i * stride + n * W;
      F32 sum = first ? acc[0][i][n] : load(at) + acc[0][i][n];
      if constexpr (SIDE == 2) sum += acc[1][i][n];
      store(at, sum);
    }
}

// scores[key][row] of KEY_ROWS keys and N vectors of rows: key[i] points to words, q is [word][row]. A lone vector has
// two chains side by side, as KEY_ROWS sums are fewer than a product's latency asks for.
template <bool DOT, int N>
static void scores_block(const float* const* key, const float* q, int64_t q_step, int64_t words, float* scores,
                         int64_t stride, FetchRows& ahead) {
  int64_t k = 0;
  if constexpr (N == 1 && W == 16)
    for (; k + 2 * BESIDE <= words; k += 2 * BESIDE)
      scores_chains<DOT, N, 2>(key, q, q_step, k, BESIDE, scores, stride, ahead);
  for (; k < words; k += CHAIN)
    scores_chains<DOT, N, 1>(key, q, q_step, k, least(CHAIN, words - k), scores, stride, ahead);
}

// R rows of c [N vectors] = alpha c + p v over `depth` words: p is [word][row] or, ACROSS, [row][word]; v is
// [word][channel]. alpha null: c is not read.
template <bool DOT, bool ACROSS, int R, int N>
static void values_block(const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t depth,
                         const float* alpha, float* c, int64_t c_step, FetchRows& ahead) {
  constexpr int PARTS = WAYS<DOT, N>;
  for (int64_t k = 0; k < depth;) {
    const bool first = k == 0;
    const int64_t end = least(depth, k + CHAIN * PARTS);
    F32 acc[R][N][PARTS] = {};
    const auto add = [&](int64_t k, int part) {
      F32 column[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) column[n] = load(v + k * v_step + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          acc[r][n][part] =
              multiply_add<DOT>(ACROSS ? p + r * p_step + k : p + k * p_step + r, column[n], acc[r][n][part]);
    };
    while (k + PARTS <= end) {
      fetch(ahead);
      for (const int64_t stop = least(end, k + FETCH_EVERY); k + PARTS <= stop; k += PARTS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) add(k + part, part);
    }
    for (; k < end; ++k) add(k, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = c + r * c_step + n * W;
        const F32 sum = total(acc[r][n]);
        if (!first)
          store(at, load(at) + sum);
        else
          store(at, alpha ? fma(load(at), splat(alpha[r]), sum) : sum);
      }
  }
}

template <bool DOT, bool ACROSS, int N>
static void values_block_of(int rows, const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t depth,
                            const float* alpha, float* c, int64_t c_step, FetchRows& ahead) {
  switch (rows) {
    case 6: return values_block<DOT, ACROSS, 6, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
    case 5: return values_block<DOT, ACROSS, 5, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
    case 4: return values_block<DOT, ACROSS, 4, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
    case 3: return values_block<DOT, ACROSS, 3, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
    case 2: return values_block<DOT, ACROSS, 2, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
    case 1: return values_block<DOT, ACROSS, 1, N>(p, p_step, v, v_step, depth, alpha, c, c_step, ahead);
  }
}

// Up to ROWS rows of c [vectors] = alpha c + p v.
template <bool DOT, bool ACROSS>
static void values_product(int rows, const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t depth,
                           const float* alpha, float* c, int64_t c_step, int64_t vectors, FetchRows& ahead) {
  int64_t d = 0;
  for (; d + COLUMNS <= vectors; d += COLUMNS)
    values_block_of<DOT, ACROSS, COLUMNS>(rows, p, p_step, v + d * W, v_step, depth, alpha, c + d * W, c_step, ahead);
  for (; d < vectors; ++d)
    values_block_of<DOT, ACROSS, 1>(rows, p, p_step, v + d * W, v_step, depth, alpha, c + d * W, c_step, ahead);
}

// scores[key][row] of `count` keys and the groups of W rows that `unseen(group, key)` lets pass.
template <bool DOT, class Unseen>
static void scores_product(const float* const* key, int count, const float* q, int64_t groups, int64_t words,
                           float* scores, FetchRows& ahead, Unseen&& unseen) {
  for (int j = 0; j < count; j += KEY_ROWS) {
    for (int64_t g = 0; g < groups;) {
      if (unseen(g, j)) {
        ++g;
        continue;
      }
      int64_t run = 1;
      while (run < QUERY_VECTORS && g + run < groups && !unseen(g + run, j)) ++run;
      const auto block = run == 3 ? scores_block<DOT, 3> : run == 2 ? scores_block<DOT, 2> : scores_block<DOT, 1>;
      block(key + j, q + g * W, TALL, words, scores + j * TALL + g * W, TALL, ahead);
      g += run;
    }
  }
}

// q [row][word] as [word][row], W words of W rows at a time.
static inline void turn(const float* q, int64_t q_step, int64_t rows, int64_t words, float* turned, int64_t step) {
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t k = 0; k < words; k += W) {
      F32 x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = r + i < rows ? load(q + (r + i) * q_step + k) : F32{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(turned + (k + i) * step + r, x[i]);
    }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
