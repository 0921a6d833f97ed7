// Many rows against a tile of keys. Lanes are rows in the first product and the softmax, so that keys are broadcast
// from where they lie and nothing is summed across lanes; in the second product lanes are channels, of packed values.
#pragma once
#include "attention_score.h"
#include "attention_words.h"

namespace onepass::ONEPASS_ISA {
namespace {

// ---- products ----

// Registers: 24 sums and what they are made of with 32 of them, 12 with 16.
inline constexpr int QUERY_VECTORS = 3, KEY_ROWS = W == 16 ? 8 : 4;
inline constexpr int ROWS = 6, COLUMNS = W == 16 ? 4 : 2;

// Asks for bytes [from, to) of what comes next, from each of `count` pointers.
static inline void fetch(const char* const* next, int64_t count, int64_t from, int64_t to) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t at = from; at < to; at += 64) __builtin_prefetch(next[i] + at, 0, 2);
}

// scores[key][row] of KEY_ROWS keys and N vectors of rows: key[i] points to words, q is [word][row]. What comes next,
// unless null, lies `skip` bytes behind its pointers and has `bytes` a word.
template <bool DOT, int N>
static void scores_block(const float* const* key, const float* q, int64_t q_step, int64_t words, float* scores,
                         int64_t step, const char* const* next, int64_t skip, int64_t bytes) {
  for (int64_t k = 0; k < words;) {
    const bool first = k == 0;
    const int64_t end = least(words, k + CHAIN<DOT>);
    if (next) fetch(next, KEY_ROWS, skip + k * bytes, skip + end * bytes);
    F32 acc[KEY_ROWS][N] = {};
    for (; k < end; ++k) {
      F32 row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(q + k * q_step + n * W);
#pragma GCC unroll 8
      for (int i = 0; i < KEY_ROWS; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] = multiply_add<DOT>(key[i] + k, row[n], acc[i][n]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < KEY_ROWS; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = scores + i * step + n * W;
        store(at, first ? acc[i][n] : load(at) + acc[i][n]);
      }
  }
}

// R rows of c [N vectors] = alpha c + p v over `depth` words: p is [word][row], v [word][channel].
template <bool DOT, int R, int N>
static void values_block(const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t depth,
                         const float* alpha, float* c, int64_t c_step) {
  constexpr int PARTS = WAYS<DOT, N>;
  for (int64_t k = 0; k < depth;) {
    const bool first = k == 0;
    const int64_t end = least(depth, k + CHAIN<DOT> * PARTS);
    F32 acc[R][N][PARTS] = {};
    const auto add = [&](int64_t k, int part) {
      F32 column[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) column[n] = load(v + k * v_step + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) acc[r][n][part] = multiply_add<DOT>(p + k * p_step + r, column[n], acc[r][n][part]);
    };
    for (; k + PARTS <= end; k += PARTS)
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) add(k + part, part);
    for (; k < end; ++k) add(k, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = c + r * c_step + n * W;
        const F32 sum = total(acc[r][n]);
        store(at, first ? fma(load(at), splat(alpha[r]), sum) : load(at) + sum);
      }
  }
}

template <bool DOT, int N>
static void values_block_of(int rows, const float* p, int64_t p_step, const float* v, int64_t v_step, int64_t depth,
                            const float* alpha, float* c, int64_t c_step) {
  switch (rows) {
    case 6: return values_block<DOT, 6, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
    case 5: return values_block<DOT, 5, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
    case 4: return values_block<DOT, 4, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
    case 3: return values_block<DOT, 3, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
    case 2: return values_block<DOT, 2, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
    case 1: return values_block<DOT, 1, N>(p, p_step, v, v_step, depth, alpha, c, c_step);
  }
}

// ---- packing ----

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

// Keys whose words do not lie in memory as the product wants them, in float32 or filled up to a whole pair.
template <class T, bool DOT>
static void pack_keys(const float** key, int count, int64_t dim, int64_t step, float* packed) {
  for (int j = 0; j < count; ++j) {
    const T* row = reinterpret_cast<const T*>(key[j]);
    float* to = packed + j * step;
    for (int64_t d = 0; d < dim; d += W * PER_WORD<T, DOT>)
      store(to + d / PER_WORD<T, DOT>, words<T, DOT>(row, d, dim));
    key[j] = to;
  }
}

// Values as the second factor: packed[key][channel] floats, or [key / 2][channel] pairs; zeros beyond count and dim.
template <class T, bool DOT, class Row>
static void pack_values(Row&& row, int count, int64_t dim, int64_t step, float* packed) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int j = 0; j < count; j += 2)
      for (int64_t d = 0; d < dim; d += 2 * W) {
        const __m512i a = (__m512i)words<T, true>(row(j), d, dim);
        const __m512i b = j + 1 < count ? (__m512i)words<T, true>(row(j + 1), d, dim) : _mm512_setzero_si512();
        float* at = packed + j / 2 * step + d;
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(at + W, _mm512_permutex2var_epi16(a, second, b));
      }
    return;
  }
#endif
  for (int j = 0; j < count; ++j)
    for (int64_t d = 0; d < dim; d += W) store(packed + j * step + d, words<T, false>(row(j), d, dim));
}

// ---- the softmax ----

// What each of W rows may see of the tile, as [low, high) of lanes, and [from, to) the widest of them.
struct Seen {
  F32 low, high;
  int from, to;
  bool cut;
};

static inline Seen seen_by(const Unit& u, int64_t line, int64_t at, int count) {
  const int64_t group = u.p.heads / u.p.kv_heads, rows = least(W, u.to - line);
  int64_t query = line / group, next = (query + 1) * group;
  const Span first = span(u.p, u.row, query, at, count), last = span(u.p, u.row, (line + rows - 1) / group, at, count);
  Seen s{splat(0.0f), splat(static_cast<float>(count)), first.low, last.high, last.low > 0 || first.high < count};
  if (!s.cut) return s;  // rows are in order: the first sees the fewest late keys, the last the fewest early ones
  for (int i = 0; i < W; ++i) {
    if (line + i == next) {
      ++query;
      next += group;
    }
    const Span one = i < rows ? span(u.p, u.row, query, at, count) : Span{0, 0};
    s.low[i] = static_cast<float>(one.low);
    s.high[i] = static_cast<float>(one.high);
  }
  return s;
}

// Raw products of W rows as scores, in place.
static void finish_scores(const Unit& u, int64_t line, int64_t at, int count, const Seen& seen, float* scores,
                          int64_t step) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads;
  F32 slope{}, place{};
  float bias[KEYS * W];
  for (int i = 0; i < W; ++i) {
    const int64_t row = least(line + i, u.to - 1), h = u.head * group + row % group;
    slope[i] = slope_of(p, u.row.b, h);
    place[i] = static_cast<float>(u.row.place(row / group) - at);
    fill_bias(p, u.row, row / group, h, at, count, bias + i, W);
  }
  for (int j = seen.from; j < seen.to; ++j)
    store(scores + j * step,
          score(p, load(scores + j * step), slope, place - static_cast<float>(j), load(bias + j * W)));
}

// Weights of one key, or with DOT of two, beside each other in a word.
template <bool DOT>
OP_INLINE void store_weights(float* to, F32 even, [[maybe_unused]] F32 odd) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    return;
  }
#endif
  store(to, even);
}

// Turns raw products [key][row] of W rows into weights [word][row], and brings the rows' states up to their new
// maximum. Weights are there for every key of the tile, zero where a row sees none.
template <bool DOT, bool CUT>
static void soften_rows(const Attention& p, const Seen& seen, bool plain, int count, float* scores, int64_t step,
                        float* top, float* total, float* alpha) {
  constexpr int PAIR = DOT ? 2 : 1;
  const F32 scale = splat(plain ? p.scale : 1.0f);
  const auto masked = [&](F32 x, int j) {
    if constexpr (!CUT) return x;
    const F32 key = splat(static_cast<float>(j));
    x = key < seen.low ? splat(EMPTY) : x;
    return key < seen.high ? x : splat(EMPTY);
  };
  F32 best = load(top);
  for (int j = seen.from; j < seen.to; ++j) best = max(masked(load(scores + j * step) * scale, j), best);
  const F32 shift = best == EMPTY ? splat(0.0f) : best, keep = exp_negative(load(top) - shift);
  F32 sums{};
  const auto weight = [&](int j) {
    if (j < seen.from || j >= seen.to) return F32{};
    // Scaled and shifted in one rounding, of the difference: that of the product would be an error of the exponent.
    const F32 y = exp_negative(masked(fma(load(scores + j * step), scale, -shift), j));
    sums += y;
    return y;
  };
  for (int j = 0; j < count; j += PAIR) {
    const F32 even = weight(j), odd = PAIR == 2 && j + 1 < count ? weight(j + 1) : F32{};
    store_weights<DOT>(scores + j / PAIR * step, even, odd);
  }
  store(alpha, keep);
  store(total, fma(load(total), keep, sums));
  store(top, best);
}

// ---- a tile ----

template <class T, bool DOT>
static void many(const Unit& u, const Sizes& s, const Scratch& w, int64_t at, int count, int ahead) {
  const Attention& p = u.p;
  constexpr int PAIR = DOT ? 2 : 1;
  const int64_t rows = u.to - u.from, groups = (rows + W - 1) / W, group = p.heads / p.kv_heads;
  const int64_t key_bytes = p.k.head * u.head * sizeof(T), value_bytes = p.v.head * u.head * sizeof(T);
  const int64_t depth = (p.head_dim + PAIR - 1) / PAIR, vectors = (p.value_dim + W - 1) / W;
  Seen seen[TALL / W];
  for (int64_t g = 0; g < groups; ++g) seen[g] = seen_by(u, u.from + g * W, at, count);
  const float* key[KEYS];
  for (int j = 0; j < KEYS; ++j) key[j] = reinterpret_cast<const float*>(w.key[j] + key_bytes);
  if (DOT ? p.head_dim % 2 != 0 : !std::is_same_v<T, float>) {
    pack_keys<T, DOT>(key, count, p.head_dim, s.q_step, w.keys);
    for (int j = count; j < KEYS; ++j) key[j] = key[count - 1];
  }
  pack_values<T, DOT>([&](int j) { return reinterpret_cast<const T*>(w.value[j] + value_bytes); }, count, p.value_dim,
                      s.c_step, w.values);
  for (int j = 0; j < count; j += KEY_ROWS) {
    const char* const* next = ahead ? w.key + KEYS + j : nullptr;
    const auto unseen = [&](int64_t group) { return seen[group].to <= j || seen[group].from >= j + KEY_ROWS; };
    for (int64_t g = 0; g < groups;) {
      if (unseen(g)) {
        ++g;
        continue;
      }
      int64_t run = 1;
      while (run < QUERY_VECTORS && g + run < groups && !unseen(g + run)) ++run;
      const float* q = w.q + g * W;
      float* scores = w.scores + j * TALL + g * W;
      if (run == 3)
        scores_block<DOT, 3>(key + j, q, TALL, depth, scores, TALL, next, key_bytes, sizeof(T) * PAIR);
      else if (run == 2)
        scores_block<DOT, 2>(key + j, q, TALL, depth, scores, TALL, next, key_bytes, sizeof(T) * PAIR);
      else
        scores_block<DOT, 1>(key + j, q, TALL, depth, scores, TALL, next, key_bytes, sizeof(T) * PAIR);
      next = nullptr;
      g += run;
    }
  }
  const bool plain = is_plain(p);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r = g * W;
    if (!plain) finish_scores(u, u.from + r, at, count, seen[g], w.scores + r, TALL);
    const auto soften = seen[g].cut ? soften_rows<DOT, true> : soften_rows<DOT, false>;
    soften(p, seen[g], plain, count, w.scores + r, TALL, w.top + r, w.total + r, w.alpha + r);
  }
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t r = rows * block / blocks, n = rows * (block + 1) / blocks - r;
    const int64_t j = KEYS * block / blocks;
    if (ahead)
      fetch(w.value + KEYS + j, KEYS * (block + 1) / blocks - j, value_bytes, value_bytes + p.value_dim * sizeof(T));
    const int low = span(p, u.row, (u.from + r) / group, at, count).low;
    const int high = span(p, u.row, (u.from + r + n - 1) / group, at, count).high;
    if (low >= high) continue;  // no row of the block sees the tile: their sums stay
    const int start = low / PAIR, length = (high + PAIR - 1) / PAIR - start;
    const float *weights = w.scores + start * TALL + r, *values = w.values + start * s.c_step;
    float* c = u.c + r * u.c_step;
    int64_t d = 0;
    for (; d + COLUMNS <= vectors; d += COLUMNS)
      values_block_of<DOT, COLUMNS>(static_cast<int>(n), weights, TALL, values + d * W, s.c_step, length, w.alpha + r,
                                    c + d * W, u.c_step);
    for (; d < vectors; ++d)
      values_block_of<DOT, 1>(static_cast<int>(n), weights, TALL, values + d * W, s.c_step, length, w.alpha + r,
                              c + d * W, u.c_step);
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
