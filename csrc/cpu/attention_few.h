// A few rows of several heads against a tile of keys: keys and values are used where they lie, each read once. Lanes
// are channels in the products and keys in the softmax. Where heads interleave in memory a tile is walked a block of
// keys at a time, all heads of those before the next, and lines are asked for in the order of their addresses: the
// memory serves that up to 1.2 times as fast as head after head.
// Queries of bfloat16 take int8 codes as whole numbers where AVX-512 is: 32 products an instruction (VNNI) and one to
// widen 32 codes, where floats take 16 and two for 16. A decode that took 0.93 of a bfloat16 cache's time takes 0.65.
#pragma once
#include "attention_fetch.h"
#include "attention_score.h"
#include "attention_words.h"

namespace onepass::ONEPASS_ISA {
namespace {

// The cache that a prefetch fills, as __builtin_prefetch counts: the first. Intel's servers, which run the kernels of
// AVX-512 without pairs, wait for its few line buffers with every load; into the second decoding takes 0.83 of the
// time.
constexpr int NEAR = W == 16 && !HAS_DOT ? 2 : 3;
constexpr int64_t BLOCK_BYTES = 4 * TOKEN_BYTES;  // of a block's keys or values

// Rows of a head, or heads of a row each, are taken four at a time, then two, then one: how many from row r on.
static inline int64_t rows_at_once(int64_t rows, int64_t r) { return rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1; }

// The states that state r of some heads is taken with.
struct Together {
  int64_t first, count;
};

static inline Together together(int64_t rows, int64_t heads, int64_t r) {
  const int64_t lines = rows == 1 ? heads : rows, begin = rows == 1 ? 0 : r / rows * rows;
  int64_t line = 0;
  while (begin + line + rows_at_once(lines, line) <= r) line += rows_at_once(lines, line);
  return {begin + line, rows_at_once(lines, line)};
}

OP_INLINE F32 as_floats(F32 x) { return x; }
OP_INLINE F32 as_floats(I32 x) { return to_f32(x); }

// scores[r][j] of R rows of q against `count` keys, W (row, key) pairs at a time. q is [word / W][R][W]; pointers are
// there for whole vectors of pairs. APART: each row is of a head of its own, whose keys lie `apart` elements further.
template <class T, Way WAY, int R, bool APART, bool FETCH>
OP_INLINE void dots(const float* q, const char* const* key, int64_t offset, int64_t apart, int count, int64_t dim,
                    float* scores, FetchLines& fetched) {
  constexpr int SOME = W / R, PER = WAY == Way::floats ? 1 : 2, N = W * PER, LINE = most(N, 64 / sizeof(T));
  FetchLines ahead = fetched;  // here, where it lies in registers
  const auto some = [&](int j) __attribute__((always_inline)) {
    const T* row[SOME];
#pragma GCC unroll 16
    for (int i = 0; i < SOME; ++i) row[i] = reinterpret_cast<const T*>(key[j + i] + offset);
    Sum<WAY> acc[W] = {};
    const auto add = [&](int64_t d, bool begins, auto&& read) {
      F32 x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + d / PER * R + r * W);
#pragma GCC unroll 16
      for (int i = 0; i < SOME; ++i) {
        F32 y;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if (APART || r == 0) {
            if (FETCH && begins) fetch<NEAR>(ahead);
            y = read(row[i] + (APART ? r * apart : 0), d);
          }
          acc[r * SOME + i] = accumulate<WAY>(x[r], y, acc[r * SOME + i]);
        }
      }
    };
    int64_t d = 0;
    for (; d + LINE <= dim; d += LINE)
#pragma GCC unroll 4
      for (int n = 0; n < LINE; n += N)
        add(d + n, n == 0, [](const T* x, int64_t d) { return all_words_of<T, WAY>(x + d); });
    for (; d < dim; d += N) add(d, true, [&](const T* x, int64_t d) { return words_of<T, WAY>(x, d, dim); });
    return as_floats(sums(acc));
  };
  for (int j = 0; j < count; j += W) {
    F32 block[R];
#pragma GCC unroll 1
    for (int g = 0; g < R; ++g) block[g] = j + g * SOME < count ? some(j + g * SOME) : F32{};
    turn_blocks(block);
    for (int r = 0; r < R; ++r) store_n(scores + r * KEYS + j, block[r], count - j);
  }
  fetched = ahead;
}

// R rows of c [dim] = alpha c + p v over a block of keys; p holds words. alpha null: 1. unit: what 1 stands for in the
// weights of each row, where they are whole numbers.
template <class T, Way WAY, int R, int N, bool WHOLE, bool FETCH>
OP_INLINE void weigh_part(const float* p, const char* const* value, int64_t offset, int count, int64_t dim, int64_t at,
                          const float* alpha, const float* unit, float* c, int64_t c_step, FetchLines& ahead) {
  constexpr bool PAIRED = WAY != Way::floats;
  constexpr int PARTS = WAYS<PAIRED, N>, LINE = most(1, 64 / (W * static_cast<int>(sizeof(T))));  // vectors of 64 bytes
  const auto row = [&](int j) { return reinterpret_cast<const T*>(value[j] + offset); };
  const auto read = [&](const T* value, int n) {
    return WHOLE ? all_words_of<T, WAY>(value + at + n * W) : words_of<T, WAY>(value, at + n * W, dim);
  };
  Sum<WAY> acc[R][N][PARTS] = {};
#if defined(__AVX512F__)
  if constexpr (PAIRED) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int j = 0; j < count; j += 2) {
      const T *even = row(j), *odd = row(j + 1 < count ? j + 1 : j);
      const bool lone = !IS_CODE<T> && j + 1 >= count;  // Inf times weight 0; codes have none
      F32 pair[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n += 2) {
        for (int key = 0; FETCH && n % LINE == 0 && key < 2; ++key) fetch<NEAR>(ahead);
        if constexpr (WHOLE && WAY == Way::pairs && std::is_same_v<T, I8>) {
          for (int i = n; i < n + 2; ++i)
            pair[i] = (F32)((U32)load(even + at + i * W) >> 16 | (U32)load(odd + at + i * W));
          continue;
        }
        const __m512i a = (__m512i)read(even, n), b = lone ? _mm512_setzero_si512() : (__m512i)read(odd, n);
        pair[n] = (F32)_mm512_permutex2var_epi16(a, first, b);
        pair[n + 1] = (F32)_mm512_permutex2var_epi16(a, second, b);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n][0] = accumulate<WAY>(p + r * KEYS + j / 2, pair[n], acc[r][n][0]);
    }
  } else
#endif
      if constexpr (!PAIRED) {
    const auto add = [&](int j, int part) {
      const T* value = row(j);
      F32 x[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        if (FETCH && n % LINE == 0) fetch<NEAR>(ahead);
        x[n] = read(value, n);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n][part] = accumulate<WAY>(p + r * KEYS + j, x[n], acc[r][n][part]);
    };
    int j = 0;
    for (; j + PARTS <= count; j += PARTS)
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) add(j + part, part);
    for (; j < count; ++j) add(j, 0);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* sum = c + r * c_step + at + n * W;
      F32 added;
      if constexpr (WAY == Way::whole)
        added = to_f32(acc[r][n][0]) * splat(unit[r]);
      else
        added = total(acc[r][n]);
      store(sum, alpha ? fma(load(sum), splat(alpha[r]), added) : load(sum) + added);
    }
}

template <class T, Way WAY, int R, bool FETCH>
OP_INLINE void weigh(const float* p, const char* const* value, int64_t offset, int count, int64_t dim,
                     const float* alpha, const float* unit, float* c, int64_t c_step, FetchLines& fetched) {
  FetchLines ahead = fetched;
  constexpr int WIDE = W >= 16 ? 4 : 2, NARROW = WAY == Way::floats ? 1 : 2;
  int64_t at = 0;
  for (; at + WIDE * W <= dim; at += WIDE * W)
    weigh_part<T, WAY, R, WIDE, true, FETCH>(p, value, offset, count, dim, at, alpha, unit, c, c_step, ahead);
  for (; at < dim; at += NARROW * W)
    weigh_part<T, WAY, R, NARROW, false, FETCH>(p, value, offset, count, dim, at, alpha, unit, c, c_step, ahead);
  fetched = ahead;
}

// Turns a row of raw products into weights relative to the row's new maximum, and brings its state up to that. CODES:
// products are of codes, whose scales enter the scores, and the weights are for codes. Whole numbers stand for
// multiples: products for those of `product_unit`, weights for those of *weight_unit.
template <Way WAY, bool CODES>
static void soften(const Attention& p, const Row& row, int64_t i, int64_t h, int64_t at, int count, Span seen,
                   float* scores, const float* key_scale, const float* value_scale, float product_unit, float* top,
                   float* total, float* alpha, [[maybe_unused]] float* weight_unit) {
  const bool plain = is_plain(p), cut = seen.low > 0 || seen.high < KEYS;
  const F32 lanes = to_f32((I32)iota());
  const F32 low = splat(static_cast<float>(seen.low)), high = splat(static_cast<float>(seen.high));
  const auto masked = [&](F32 x, int n) {
    const F32 key = lanes + static_cast<float>(n * W);
    x = key < low ? splat(EMPTY) : x;
    return key < high ? x : splat(EMPTY);
  };
  if (!plain) {
    float bias[KEYS];
    fill_bias(p, row, i, h, at, count, bias, 1);
    const F32 slope = splat(slope_of(p, row.b, h)), distance = splat(static_cast<float>(row.place(i) - at)) - lanes;
    for (int n = 0; n < KEYS; n += W) {
      F32 product = CODES ? load(scores + n) * load(key_scale + n) : load(scores + n);
      if constexpr (WAY == Way::whole) product = product * splat(product_unit);
      store(scores + n, score(p, product, slope, distance - static_cast<float>(n), load(bias + n)));
    }
  }
  const auto scale = [&](int n) {
    const F32 x = splat(plain ? p.scale * product_unit : 1.0f);
    return CODES && plain ? x * load(key_scale + n * W) : x;
  };
  F32 x[KEYS / W], best = splat(EMPTY);
#pragma GCC unroll 4
  for (int n = 0; n < KEYS / W; ++n) {
    x[n] = load(scores + n * W);
    best = max(cut ? masked(x[n] * scale(n), n) : x[n] * scale(n), best);
  }
  const float highest = max_lane(best), next = highest > *top ? highest : *top;
  const float shift = next == EMPTY ? 0.0f : next;
  F32 sums{};
#pragma GCC unroll 4
  for (int n = 0; n < KEYS / W; ++n) {
    // Scaled and shifted in one rounding, of the difference: that of the product would be an error of the exponent.
    const F32 over = fma(x[n], scale(n), splat(-shift));
    F32 y = exp_negative(cut ? masked(over, n) : over);
    sums += y;
    if constexpr (CODES) y = y * load(value_scale + n * W);
    if constexpr (WAY == Way::whole)
      x[n] = y;
    else
      store_weights<WAY == Way::pairs>(scores, n * W, y);
  }
#if defined(__AVX512F__)
  if constexpr (WAY == Way::whole) *weight_unit = store_whole(x, KEYS / W, reinterpret_cast<int16_t*>(scores), 1);
#endif
  *alpha = next == *top ? 1.0f : exp_negative(splat(*top - shift))[0];
  store(total, fma(load(total), splat(*alpha), sums));
  *top = next;
}

template <class Take>
OP_INLINE void with_rows(int64_t rows, Take&& take) {
  switch (rows) {
    case 4: return take(std::integral_constant<int, 4>{});
    case 2: return take(std::integral_constant<int, 2>{});
    default: return take(std::integral_constant<int, 1>{});
  }
}

// Calls take(rows at once, whether they are the first, row) for the rows of a head.
template <class Take>
OP_INLINE void by_rows(int64_t rows, Take&& take) {
  with_rows(rows_at_once(rows, 0), [&](auto R) { take(R, std::true_type{}, 0); });
  for (int64_t r = rows_at_once(rows, 0); r < rows; r += rows_at_once(rows, r))
    with_rows(rows_at_once(rows, r), [&](auto R) { take(R, std::false_type{}, r); });
}

// The keys of a block: those whose lines, with as many ahead, the first cache holds beside all else. Sums of so many
// values are rounded, so that this may depend on nothing but a row's own sizes.
template <class T, Way WAY>
static int block_of(const Attention& p) {
  const int64_t fit = BLOCK_BYTES / (p.kv_heads * p.value_dim * static_cast<int64_t>(sizeof(T)));
  if (WAY == Way::whole && fit >= 32) return 32;  // whole numbers are summed exactly
  return fit >= 16 ? 16 : fit >= 8 ? 8 : 4;
}

// What lies a block or a tile behind keys [j, j + block) of the tile, of some of the unit's heads.
template <class T>
static FetchLines behind(const Heads& x, int64_t dim, const char* const* now, const char* const* then, int j, int count,
                         int block, int64_t head, int64_t heads) {
  const int64_t from = x.head * head * sizeof(T), bytes = (x.head * (heads - 1) + dim) * sizeof(T);
  const int at = j + (heads > 1 ? block : KEYS);
  if (at < KEYS) return FetchLines(now + at, most(0, least(block, count - at)), from, from + bytes);
  return then ? FetchLines(then + at - KEYS, block, from, from + bytes) : FetchLines();
}

template <class T, Way WAY>
static void few(const Unit& u, const Sizes& s, const Scratch& w, int64_t at, int count, bool more) {
  const Attention& p = u.p;
  const int64_t rows = u.row.rows, group = p.heads / p.kv_heads, heads = u.head_end - u.head;
  // Of each block, head after head: visit(first key, keys, head, its offset, ahead) says how many heads it took.
  const auto walk = [&](const Heads& x, int64_t dim, const char* const* now, const char* const* then, int block,
                        auto&& visit) {
    const bool joined = x.head == dim;  // the heads of a token: one run of memory
    FetchLines ahead;
    for (int j = 0; j < count; j += block)
      for (int64_t head = 0; head < heads;) {
        if (head == 0 || !joined)
          ahead = behind<T>(x, dim, now, more ? then : nullptr, j, count, block, u.head + head, joined ? heads : 1);
        head += visit(j, static_cast<int>(least(block, count - j)), head, x.head * (u.head + head) * sizeof(T), ahead);
      }
  };
  const bool whole = count == KEYS && span(p, u.row, 0, at, count).high == count &&
                     span(p, u.row, u.row.queries - 1, at, count).low == 0;
  const auto soften_head = [&](int64_t head) {
    if constexpr (IS_CODE<T>) read_scales(p, w, u.head + head);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r / group, state = head * rows + r;
      soften<WAY, IS_CODE<T>>(p, u.row, i, (u.head + head) * group + r % group, at, count,
                              whole ? Span{0, KEYS} : span(p, u.row, i, at, count), w.scores + state * KEYS,
                              w.key_scale, w.value_scale, WAY == Way::whole ? w.product_unit[state] : 1.0f,
                              w.top + state, w.total + state * W, w.alpha + state, w.weight_unit + state);
    }
  };
  // A head's only row is taken with those of the next heads. Scores become weights with a tile's last keys, while the
  // memory brings the next ones.
  const int block = block_of<T, WAY>(p);
  const int64_t lines = rows == 1 ? heads : rows;
  const int pairs = W / (lines % 4 == 0 ? 4 : lines % 2 == 0 ? 2 : 1);  // keys that the last rows are taken with
  const auto products = [&](int j, int n, int64_t head, int64_t offset, FetchLines& ahead) -> int64_t {
    const auto dots_of = [&](auto R, auto apart, auto first, int64_t state) {
      dots<T, WAY, R, apart, first>(w.q + state * s.q_step, w.now->key + j, offset, p.k.head, n, p.head_dim,
                                    w.scores + state * KEYS + j, ahead);
    };
    const int64_t taken = rows == 1 ? rows_at_once(heads, head) : 1;
    if (rows == 1)
      with_rows(taken, [&](auto R) { dots_of(R, std::true_type{}, std::true_type{}, head); });
    else
      by_rows(rows, [&](auto R, auto first, int64_t r) { dots_of(R, std::false_type{}, first, head * rows + r); });
    for (int64_t one = head; j + n == count && one < head + taken; ++one) soften_head(one);
    return taken;
  };
  walk(p.k, p.head_dim, w.now->key, w.then->key, most(block, pairs), products);
  walk(p.v, p.value_dim, w.now->value, w.then->value, block,
       [&](int j, int n, int64_t head, int64_t offset, FetchLines& ahead) -> int64_t {
         by_rows(rows, [&](auto R, auto first, int64_t r) {
           const int64_t state = head * rows + r;
           weigh<T, WAY, R, first>(w.scores + state * KEYS + (WAY == Way::floats ? j : j / 2), w.now->value + j, offset,
                                   n, p.value_dim, j ? nullptr : w.alpha + state, w.weight_unit + state,
                                   u.c + state * u.c_step, u.c_step, ahead);
         });
         return 1;
       });
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
