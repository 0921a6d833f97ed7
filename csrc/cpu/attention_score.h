// From raw products to scores: scale, softcap, ALiBi, masks; and the exponential of their softmax. Included by
// csrc/cpu/attention_*.h.
#pragma once
#include "attention_work.h"

namespace onepass::ONEPASS_ISA {
namespace {

// ---- the exponential of a softmax ----

// e^x for x <= 0 within 1 + |x| ulp, no more than what a rounding of x is worth; 0 for -inf (without AVX-512 below
// -87.3), NaN for NaN. 2^k times a polynomial of what is above a whole k; with AVX-512 in 10 instructions, as scalef
// takes the whole part of a number as it is.
OP_INLINE F32 exp_negative(F32 x) {
  const F32 exponent = x * 1.44269504f;
#if defined(__AVX512F__)
  constexpr int DOWN_TO_WHOLE = 1;
  const F32 r = _mm512_reduce_ps(exponent, DOWN_TO_WHOLE);
#else
  const F32 bounded = max(splat(-126.5f), exponent), k = round_even(bounded - 0.5f), r = bounded - k;
#endif
  F32 y = splat(2.16129149e-4f);
  y = fma(y, r, splat(1.2467847e-3f));
  y = fma(y, r, splat(9.67544783e-3f));
  y = fma(y, r, splat(5.54852784e-2f));
  y = fma(y, r, splat(0.240229294f));
  y = fma(y, r, splat(0.693147063f));
  y = fma(y, r, splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, exponent);
#else
  return y * as_f32((truncate(x == x ? k : splat(0.0f)) + 127) << 23);
#endif
}

OP_INLINE F32 tanh(F32 x) {
  const F32 size = x < 0.0f ? -x : x;
  const F32 t = expm1(2.0f * min(size, splat(20.0f)));
  const F32 y = t / (t + 2.0f);
  return x == x ? (x < 0.0f ? -y : y) : x;
}

// ---- scores ----

// Nothing but scale, window and causal: scores stay raw products, scaled as they enter the exponential.
static inline bool is_plain(const Attention& p) {
  return p.scale > 0 && !(p.softcap > 0 || p.slopes || p.tree || p.mask.kind != MaskKind::none);
}

// A vector of raw products as scores: `distance` from query to key, `extra` from fill_bias.
OP_INLINE F32 score(const Attention& p, F32 product, F32 slope, F32 distance, F32 extra) {
  F32 x = product * p.scale;
  if (p.softcap > 0) x = p.softcap * tanh(x / p.softcap);
  x = fma(-slope, max(distance, -distance), x);
  return extra == EMPTY ? extra : x + extra;
}

static inline float slope_of(const Attention& p, int64_t b, int64_t h) {
  return p.slopes ? p.slopes[b * p.slopes_batch + h] : 0.0f;
}

// What the scores of query i of head h add, a key each `step` floats: 0 and -inf for a boolean mask, the value of an
// additive one, the tree over a row's last keys.
static void fill_bias(const Attention& p, const Row& row, int64_t i, int64_t h, int64_t at, int count, float* bias,
                      int64_t step) {
  for (int j = 0; j < KEYS; ++j) bias[j * step] = 0;
  if (p.mask.kind != MaskKind::none) {
    const int64_t start = row.b * p.mask.batch + h * p.mask.head + i * p.mask.row + at * p.mask.key;
    if (p.mask.kind == MaskKind::boolean) {
      const uint8_t* seen = static_cast<const uint8_t*>(p.mask.data) + start;
      for (int j = 0; j < count; ++j) bias[j * step] = seen[j * p.mask.key] ? 0 : EMPTY;
    } else {
      const float* extra = static_cast<const float*>(p.mask.data) + start;
      for (int j = 0; j < count; ++j) bias[j * step] = extra[j * p.mask.key];
    }
  }
  if (p.tree) {
    const uint8_t* seen = p.tree + (row.b * p.queries + i) * p.queries;
    const int64_t newest = row.keys - row.queries;
    for (int64_t j = most(0, newest - at); j < count; ++j)
      if (!seen[at + j - newest]) bias[j * step] = EMPTY;
  }
}

static inline void read_scales(const Attention& p, const Scratch& w, int64_t head) {
  for (int j = 0; j < KEYS; ++j) {
    w.key_scale[j] = w.now->key_scale[j][head * p.k_scale.head];
    w.value_scale[j] = w.now->value_scale[j][head * p.v_scale.head];
  }
}

// ---- lanes that are rows ----

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

// What the scores of W rows from `line` have beyond products; lanes beyond the last row repeat it.
struct Terms {
  F32 slope, place;
  float bias[KEYS * W];  // [key][row]

  Terms() {}  // of plain scores, which have nothing else
  Terms(const Unit& u, int64_t line, int64_t at, int count) {
    const int64_t group = u.p.heads / u.p.kv_heads;
    for (int i = 0; i < W; ++i) {
      const int64_t row = least(line + i, u.to - 1), h = u.head * group + row % group;
      slope[i] = slope_of(u.p, u.row.b, h);
      place[i] = static_cast<float>(u.row.place(row / group) - at);
      fill_bias(u.p, u.row, row / group, h, at, count, bias + i, W);
    }
  }
  F32 score_of(const Attention& p, F32 product, int j) const {
    return score(p, product, slope, place - static_cast<float>(j), load(bias + j * W));
  }
  // score - shift, in one rounding of the product where no cap bends it.
  F32 score_above(const Attention& p, F32 product, int j, F32 shift) const {
    if (p.softcap > 0) return score_of(p, product, j) - shift;
    const F32 distance = place - static_cast<float>(j), extra = load(bias + j * W);
    const F32 rest = fma(-slope, max(distance, -distance), extra) - shift;
    return extra == EMPTY ? extra : fma(product, splat(p.scale), rest);
  }
};

}  // namespace
}  // namespace onepass::ONEPASS_ISA
