// A few rows against a tile of keys: keys and values are used where they lie, each read once, and each read asks for
// what comes in its place next. Lanes are channels in the products and keys in the softmax.
#pragma once
#include "attention_score.h"
#include "attention_words.h"

namespace onepass::ONEPASS_ISA {
namespace {

// The cache that a prefetch fills, as __builtin_prefetch counts: a head's codes fit into the first beside all else.
template <class T>
inline constexpr int NEAR = IS_CODE<T> ? 3 : 2;

// scores[r][j] of R rows of q against `count` keys, W of them (row, key) pairs at a time. Pointers are there for whole
// vectors of keys; with FETCH each line read asks for the same line of the key that comes in its place next.
template <class T, bool DOT, int R, bool FETCH, class Row, class Next>
OP_INLINE void dots(const float* q, int64_t q_step, Row&& row, Next&& next, int count, int64_t dim, float* scores,
                    int64_t scores_step) {
  constexpr int KEYS = W / R, N = W * PER_WORD<T, DOT>, LINE = most(N, 64 / sizeof(T));
  const auto some = [&](int j) {
    const T *key[KEYS], *soon[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < KEYS; ++i) {
      key[i] = row(j + i);
      soon[i] = FETCH ? next(j + i) : nullptr;
    }
    F32 acc[W] = {};
    const auto add = [&](int64_t d, bool fetch, auto&& read) {
      F32 x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(q + r * q_step + d / PER_WORD<T, DOT>);
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; ++i) {
        const F32 y = read(key[i], d);
        if (FETCH && fetch) __builtin_prefetch(soon[i] + d, 0, NEAR<T>);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * KEYS + i] = multiply_add<DOT>(x[r], y, acc[r * KEYS + i]);
      }
    };
    int64_t d = 0;
    for (; d + LINE <= dim; d += LINE)
#pragma GCC unroll 4
      for (int n = 0; n < LINE; n += N)
        add(d + n, n == 0, [](const T* x, int64_t d) { return all_words<T, DOT>(x + d); });
    for (; d < dim; d += N) add(d, true, [&](const T* x, int64_t d) { return words<T, DOT>(x, d, dim); });
    return sums(acc);
  };
  for (int j = 0; j < count; j += W) {
    F32 block[R];
#pragma GCC unroll 1
    for (int g = 0; g < R; ++g) block[g] = j + g * KEYS < count ? some(j + g * KEYS) : F32{};
    turn_blocks(block);
    for (int r = 0; r < R; ++r) store(scores + r * scores_step + j, block[r]);
  }
}

// R rows of c [dim] = alpha c + p v over `count` keys; p holds floats, or with DOT pairs of bfloat16.
template <class T, bool DOT, int R, int N, bool WHOLE, bool FETCH, class Row, class Next>
OP_INLINE void weigh_part(const float* p, int64_t p_step, Row&& row, Next&& next, int count, int64_t dim, int64_t at,
                          const float* alpha, float* c, int64_t c_step) {
  constexpr int PARTS = WAYS<DOT, N>, STEP = CHAIN<DOT> * PER_WORD<T, DOT> * PARTS;
  constexpr int LINE = most(1, 64 / (W * sizeof(T)));  // vectors of 64 bytes
  const auto read = [&](const T* value, int n, auto dot) {
    return WHOLE ? all_words<T, dot>(value + at + n * W) : words<T, dot>(value, at + n * W, dim);
  };
  for (int j = 0; j < count;) {
    const bool first = j == 0;
    const int end = count - j < STEP ? count : j + STEP;
    F32 acc[R][N][PARTS] = {};
#if defined(__AVX512BF16__)
    if constexpr (DOT) {
      const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
      for (; j < end; j += 2) {
        const T *even = row(j), *odd = row(j + 1 < count ? j + 1 : j);
        const bool lone = !IS_CODE<T> && j + 1 >= count;  // Inf times weight 0; codes have none
        if (FETCH)
#pragma GCC unroll 4
          for (int n = 0; n < N; n += LINE) {
            __builtin_prefetch(next(j) + at + n * W, 0, NEAR<T>);
            __builtin_prefetch(next(j + 1) + at + n * W, 0, NEAR<T>);
          }
        F32 pair[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n += 2) {
          if constexpr (WHOLE && std::is_same_v<T, I8>) {
            for (int i = n; i < n + 2; ++i)
              pair[i] = (F32)((U32)load(even + at + i * W) >> 16 | (U32)load(odd + at + i * W));
            continue;
          }
          const __m512i a = (__m512i)read(even, n, std::true_type{});
          const __m512i b = lone ? _mm512_setzero_si512() : (__m512i)read(odd, n, std::true_type{});
          pair[n] = (F32)_mm512_permutex2var_epi16(a, first, b);
          pair[n + 1] = (F32)_mm512_permutex2var_epi16(a, second, b);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[r][n][0] = multiply_add<true>(p + r * p_step + j / 2, pair[n], acc[r][n][0]);
      }
    } else
#endif
    {
      const auto add = [&](int j, int part) {
        const T* value = row(j);
        if (FETCH)
#pragma GCC unroll 4
          for (int n = 0; n < N; n += LINE) __builtin_prefetch(next(j) + at + n * W, 0, NEAR<T>);
        F32 x[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) x[n] = read(value, n, std::false_type{});
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[r][n][part] = multiply_add<false>(p + r * p_step + j, x[n], acc[r][n][part]);
      };
      for (; j + PARTS <= end; j += PARTS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) add(j + part, part);
      for (; j < end; ++j) add(j, 0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* sum = c + r * c_step + at + n * W;
        const F32 added = total(acc[r][n]);
        store(sum, first ? fma(load(sum), splat(alpha[r]), added) : load(sum) + added);
      }
  }
}

template <class T, bool DOT, int R, bool FETCH, class Row, class Next>
OP_INLINE void weigh(const float* p, int64_t p_step, Row&& row, Next&& next, int count, int64_t dim, const float* alpha,
                     float* c, int64_t c_step) {
  constexpr int WIDE = W >= 16 ? 4 : 2, NARROW = DOT ? 2 : 1;
  int64_t at = 0;
  for (; at + WIDE * W <= dim; at += WIDE * W)
    weigh_part<T, DOT, R, WIDE, true, FETCH>(p, p_step, row, next, count, dim, at, alpha, c, c_step);
  for (; at < dim; at += NARROW * W)
    weigh_part<T, DOT, R, NARROW, false, FETCH>(p, p_step, row, next, count, dim, at, alpha, c, c_step);
}

// Turns a row of raw products into weights relative to the row's new maximum, and brings its state up to that. CODES:
// products are of codes, whose scales enter the scores, and the weights are for codes.
template <bool DOT, bool CODES>
static void soften(const Attention& p, const Row& row, int64_t i, int64_t h, int64_t at, int count, float* scores,
                   const float* key_scale, const float* value_scale, float* top, float* total, float* alpha) {
  const Span seen = span(p, row, i, at, count);
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
      const F32 product = CODES ? load(scores + n) * load(key_scale + n) : load(scores + n);
      store(scores + n, score(p, product, slope, distance - static_cast<float>(n), load(bias + n)));
    }
  }
  const auto scale = [&](int n) {
    const F32 x = splat(plain ? p.scale : 1.0f);
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
    F32 y = exp_above<DOT>(x[n], scale(n), splat(shift), [&](F32 over) { return cut ? masked(over, n) : over; });
    sums += y;
    if constexpr (CODES) y = y * load(value_scale + n * W);
    store_weights<DOT>(scores, n * W, y);
  }
  *alpha = next == *top ? 1.0f : exp_negative(splat(*top - shift))[0];
  store(total, fma(load(total), splat(*alpha), sums));
  *top = next;
}

template <class T, bool DOT, int R, bool FETCH>
static void few_rows(const Unit& u, const Sizes& s, const Scratch& w, int64_t head, int64_t at, int count,
                     const Next& coming, int64_t r) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads, state = (head - u.head) * (u.to - u.from) + r;
  const int64_t key_bytes = p.k.head * head * sizeof(T), value_bytes = p.v.head * head * sizeof(T);
  const auto key = [&](int j) { return reinterpret_cast<const T*>(w.now->key[j] + key_bytes); };
  const auto value = [&](int j) { return reinterpret_cast<const T*>(w.now->value[j] + value_bytes); };
  const Places* from = coming.places ? coming.places : w.now;
  const int64_t next_key = p.k.head * coming.head * sizeof(T), next_value = p.v.head * coming.head * sizeof(T);
  const auto key_then = [&](int j) { return reinterpret_cast<const T*>(from->key[j] + next_key); };
  const auto value_then = [&](int j) { return reinterpret_cast<const T*>(from->value[j] + next_value); };
  dots<T, DOT, R, FETCH>(w.q + state * s.q_step, s.q_step, key, key_then, count, p.head_dim, w.scores, KEYS);
  for (int64_t n = 0; n < R; ++n) {
    const int64_t line = u.from + r + n;
    soften<DOT, IS_CODE<T>>(p, u.row, line / group, head * group + line % group, at, count, w.scores + n * KEYS,
                            w.key_scale, w.value_scale, w.top + state + n, w.total + (state + n) * W, w.alpha + n);
  }
  weigh<T, DOT, R, FETCH>(w.scores, KEYS, value, value_then, count, p.value_dim, w.alpha, u.c + state * u.c_step,
                          u.c_step);
}

template <class T, bool DOT>
static void few(const Unit& u, const Sizes& s, const Scratch& w, int64_t head, int64_t at, int count,
                const Next& coming) {
  int64_t r = 0;
  const int64_t rows = u.to - u.from;
  if constexpr (IS_CODE<T>) read_scales(u.p, w, head);
  const auto take = [&](auto fetch) {
    if (r + 4 <= rows) {
      few_rows<T, DOT, 4, fetch>(u, s, w, head, at, count, coming, r);
      r += 4;
    } else if (r + 2 <= rows) {
      few_rows<T, DOT, 2, fetch>(u, s, w, head, at, count, coming, r);
      r += 2;
    } else {
      few_rows<T, DOT, 1, fetch>(u, s, w, head, at, count, coming, r);
      r += 1;
    }
  };
  take(std::true_type{});
  while (r < rows) take(std::false_type{});
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
