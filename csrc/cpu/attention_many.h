// Many rows against a tile of keys. Lanes are rows in the first product and the softmax, so that keys are broadcast
// from where they lie and nothing is summed across lanes; in the second product lanes are channels, of values that are
// packed unless they lie as it wants them. From the cache the products run at 94% of the multipliers' rate and the
// softmax at 6 cycles for 16 scores (AVX-512, float32); a causal prefill of 1024 rows loses another fifth to cold rows
// of q and out and to the diagonal. Tried without gain: the next unit's rows of q fetched by this one, units of a head
// in turn, rows or channels outermost in the products, tiles of 192 rows.
#pragma once
#include "attention_products.h"
#include "attention_score.h"

namespace onepass::ONEPASS_ISA {
namespace {

// ---- packing ----

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

// Whether values are read where they lie: whole vectors of float32, a step apart. Whole pages apart they share few sets
// of the first cache, and 64 rows that come back to them while memory brings the next ones took 1.04 times as long.
template <class T, bool DOT>
static bool lie_as_packed(const Unit& u) {
  const Attention& p = u.p;
  if (DOT || !std::is_same_v<T, float> || p.cache.block_table || p.value_dim % W != 0) return false;
  return p.v.step % 1024 != 0 || u.row.rows <= SOME || u.row.rows > SPLIT;
}

// ---- the softmax ----

constexpr int CHAINS = 4;  // sums and maxima side by side, each of every fourth key
static_assert(KEYS % CHAINS == 0);

// Weights of one key, or with DOT of two, beside each other in a word.
template <bool DOT>
OP_INLINE void store_pairs(float* to, F32 even, [[maybe_unused]] F32 odd) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) {
    const __m512i beside = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(beside, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    return;
  }
#endif
  store(to, even);
}

// Turns raw products [key][row] of W rows into weights [word][row], and brings the rows' states up to their new
// maximum. Weights are there for every key of the tile, zero where a row sees none. CODES: as in `soften`. CUT: there
// are rows that do not see every key, or keys that are not a whole number of CHAINS.
template <bool DOT, bool CODES, bool CUT>
static void soften_rows(const Attention& p, const Seen& seen, bool plain, int count, float* scores, int64_t step,
                        const float* key_scale, const float* value_scale, float* top, float* row_total, float* alpha) {
  constexpr int PAIR = DOT ? 2 : 1;
  const F32 low = seen.low, high = seen.high, before = load(top);
  const F32 scale = splat(plain ? p.scale : 1.0f);
  const bool by_key = CODES && plain;
  const auto masked = [&](F32 x, int j) {
    if constexpr (!CUT) return x;
    const F32 key = splat(static_cast<float>(j));
    x = key < low ? splat(EMPTY) : x;
    return key < high ? x : splat(EMPTY);
  };
  const int begin = seen.from / CHAINS * CHAINS, end = seen.to;
  F32 best[CHAINS];  // of raw products, which a positive scale keeps in order; short sums: see CHAIN
  for (F32& x : best) x = splat(EMPTY);
  for (int j = begin; j < end; j += CHAINS)
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) {
      const F32 x = load(scores + (j + i) * step);
      best[i] = max(masked(by_key ? x * key_scale[j + i] : x, j + i), best[i]);
    }
  const F32 raw = max(max(best[0], best[1]), max(best[2], best[3]));
  const F32 highest = max(raw * scale, before);
  const F32 shift = highest == EMPTY ? splat(0.0f) : highest, keep = exp_negative(before - shift);
  F32 sums[CHAINS] = {};
  const auto put = [&](int j, auto&& weight) {
    F32 y[CHAINS];
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) y[i] = weight(i);
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; i += PAIR) store_pairs<DOT>(scores + (j + i) / PAIR * step, y[i], y[i + PAIR - 1]);
  };
  const auto nothing = [](int) { return F32{}; };
  int j = 0;
  for (; j < begin; j += CHAINS) put(j, nothing);
  for (; j < end; j += CHAINS)
    put(j, [&](int i) {
      const F32 over = fma(load(scores + (j + i) * step), by_key ? scale * key_scale[j + i] : scale, -shift);
      const F32 y = exp_negative(masked(over, j + i));
      sums[i] += y;
      return CODES ? y * value_scale[j + i] : y;
    });
  for (; j < count; j += CHAINS) put(j, nothing);
  store(alpha, keep);
  store(row_total, fma(load(row_total), keep, total(sums)));
  store(top, highest);
}

// ---- a tile ----

template <class T, bool DOT>
static void many(const Unit& u, const Sizes& s, const Scratch& w, int64_t at, int count, const Next& next) {
  const Attention& p = u.p;
  constexpr int PAIR = DOT ? 2 : 1;
  const int64_t rows = u.to - u.from, groups = (rows + W - 1) / W, group = p.heads / p.kv_heads;
  const int64_t key_bytes = p.k.head * u.head * sizeof(T), value_bytes = p.v.head * u.head * sizeof(T);
  const int64_t next_key = p.k.head * next.head * sizeof(T), next_value = p.v.head * next.head * sizeof(T);
  const int64_t depth = (p.head_dim + PAIR - 1) / PAIR, vectors = (p.value_dim + W - 1) / W;
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  const auto span_of = [&](int64_t line) { return span(p, u.row, line / group, at, count); };
  const bool whole = span_of(u.from).high == count && span_of(u.to - 1).low == 0;  // for every row
  Seen seen[TALL / W];
  for (int64_t g = 0; g < groups; ++g)
    seen[g] = whole ? Seen{splat(0.0f), splat(static_cast<float>(count)), 0, count, false}
                    : seen_by(u, u.from + g * W, at, count);
  if constexpr (IS_CODE<T>) read_scales(p, w, u.head);
  const float* key[KEYS];
  for (int j = 0; j < KEYS; ++j) key[j] = reinterpret_cast<const float*>(w.now->key[j] + key_bytes);
  if (IS_CODE<T> || (DOT ? p.head_dim % 2 != 0 : !std::is_same_v<T, float>)) {
    pack_keys<T, DOT>(key, count, p.head_dim, s.q_step, w.keys);
    for (int j = count; j < KEYS; ++j) key[j] = key[count - 1];
  }
  const float* value = w.values;
  int64_t value_step = s.c_step;
  if (lie_as_packed<T, DOT>(u)) {
    value = reinterpret_cast<const float*>(w.now->value[0] + value_bytes);
    value_step = p.v.step;
  } else {
    pack_values<T, DOT>([&](int j) { return reinterpret_cast<const T*>(w.now->value[j] + value_bytes); }, count,
                        p.value_dim, s.c_step, w.values);
  }
  FetchRows keys_ahead, values_ahead;
  if (next.places) {
    const auto parts = [](int64_t n, int64_t of) { return (n + of - 1) / of; };
    keys_ahead = {
        next.places->key, KEYS, next_key, next_key + p.head_dim * static_cast<int64_t>(sizeof(T)),
        KEYS / KEY_ROWS * parts(groups, QUERY_VECTORS) * parts(depth, groups == 1 ? 2 * FETCH_EVERY : FETCH_EVERY)};
    values_ahead = {next.places->value, KEYS, next_value, next_value + p.value_dim * static_cast<int64_t>(sizeof(T)),
                    parts(KEYS / PAIR, FETCH_EVERY) * parts(vectors, COLUMNS) * blocks};
  }
  scores_product<DOT>(key, count, w.q, groups, depth, w.scores, keys_ahead,
                      [&](int64_t g, int j) { return seen[g].to <= j || seen[g].from >= j + KEY_ROWS; });
  const bool plain = is_plain(p);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r = g * W;
    if (!plain) {
      const Terms terms(u, u.from + r, at, count);
      for (int j = seen[g].from; j < seen[g].to; ++j) {
        float* x = w.scores + j * TALL + r;
        store(x, terms.score_of(p, IS_CODE<T> ? load(x) * w.key_scale[j] : load(x), j));
      }
    }
    const auto soften =
        seen[g].cut || count % CHAINS ? soften_rows<DOT, IS_CODE<T>, true> : soften_rows<DOT, IS_CODE<T>, false>;
    soften(p, seen[g], plain, count, w.scores + r, TALL, w.key_scale, w.value_scale, w.top + r, w.total + r,
           w.alpha + r);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t r = rows * block / blocks, n = rows * (block + 1) / blocks - r;
    const int low = whole ? 0 : span_of(u.from + r).low, high = whole ? count : span_of(u.from + r + n - 1).high;
    if (low >= high) continue;  // no row of the block sees the tile: their sums stay
    const int start = low / PAIR, length = (high + PAIR - 1) / PAIR - start;
    const float *weights = w.scores + start * TALL + r, *values = value + start * value_step;
    values_product<DOT, false>(static_cast<int>(n), weights, TALL, values, value_step, length, w.alpha + r,
                               u.c + r * u.c_step, u.c_step, vectors, values_ahead);
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
