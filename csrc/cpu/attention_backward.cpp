// The gradient of attention, probabilities recomputed from lse (Dao et al. 2022, appendix B.2): ds = p (dp - delta)
// with dp = dout v^T and delta = sum_d dout out - dlse. Five products a pair of query and key; no score matrix is
// stored.
//
// A unit is a row's key-value head: tiles of keys, against each of them tiles of TALL queries, lanes are queries, which
// are widened and turned once a unit (once a tile of keys took an eighth of the time). The sums of a tile of keys stay
// in scratch; those of queries are added to dq tile after tile. So every gradient is summed in one order, whatever the
// batch and the threads.
//
// lse and out are rounded to float32, which bends every probability of a query, and delta, by more than PyTorch's
// error. So float32 sweeps over the keys twice: first for each query's largest score (`top`), the sum of e^(score -
// top) (`excess`) and delta = sum p dp; half types take lse, 1 and what the forward returned. delta of out would save
// a product of seven, but dq of 70 keys had 2.1 times PyTorch's error.
#include "attention_products.h"
#include "attention_score.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

struct Tiles {
  int64_t q_step, v_step;
  float *q, *grad, *q_turned, *grad_turned;        // a unit's queries: [row][channel] and [tile][channel][row]
  float *k, *v, *dk, *dv, *dk_lost, *dv_lost;      // [key][channel]; lost: by the rounding of dk and dv
  float* tile;                                     // [ROWS keys][channel]: what one tile of queries adds to them
  float *probabilities, *grad_probabilities, *dq;  // [key][row] twice, [row][channel]
  float *delta, *shift, *share;                    // [row]; share: 1 / excess

  Tiles(char* memory, const Attention& p) : q_step(round_up(p.head_dim, W)), v_step(round_up(p.value_dim, W)) {
    Arena arena{memory};
    const int64_t longest = p.cache.cu_seqlens ? least(p.queries, p.tokens) : p.queries;
    const int64_t rows = round_up(longest * (p.heads / p.kv_heads), TALL);
    q = arena.take<float>(rows * q_step);
    grad = arena.take<float>(rows * v_step);
    q_turned = arena.take<float>(rows * q_step);
    grad_turned = arena.take<float>(rows * v_step);
    k = arena.take<float>(KEYS * q_step);
    v = arena.take<float>(KEYS * v_step);
    dk = arena.take<float>(KEYS * q_step);
    dv = arena.take<float>(KEYS * v_step);
    dk_lost = arena.take<float>(KEYS * q_step);
    dv_lost = arena.take<float>(KEYS * v_step);
    tile = arena.take<float>(ROWS * most(q_step, v_step));
    probabilities = arena.take<float>(KEYS * TALL);
    grad_probabilities = arena.take<float>(KEYS * TALL);
    dq = arena.take<float>(TALL * q_step);
    delta = arena.take<float>(TALL);
    shift = arena.take<float>(TALL);
    share = arena.take<float>(TALL);
    bytes = arena.at - memory;
  }
  int64_t bytes;
};

// Threads that have a unit: memory for the others would grow with the length of the rows.
int64_t team_of(const Attention& p) { return most(1, least(p.num_threads, p.batch * p.kv_heads)); }

int64_t workspace_bytes(const Attention& p) { return Tiles(nullptr, p).bytes * team_of(p); }

int64_t token_of(const Attention& p, const Row& row, int64_t i) {
  return p.cache.cu_seqlens ? p.cache.cu_seqlens[row.b] + i : i;
}
int64_t batch_of(const Attention& p, const Row& row) { return p.cache.cu_seqlens ? 0 : row.b; }

// Element (i, h) of lse and delta.
int64_t line_at(const Attention& p, const Row& row, int64_t i, int64_t h) {
  return p.cache.cu_seqlens ? h * p.tokens + token_of(p, row, i) : (row.b * p.heads + h) * p.queries + i;
}

template <class T>
T* head_at(const Attention& p, const Row& row, const Heads& x, int64_t i, int64_t h) {
  return static_cast<T*>(const_cast<void*>(x.data)) + batch_of(p, row) * x.batch + token_of(p, row, i) * x.step +
         h * x.head;
}

template <class T>
T* key_at(const Row& row, const Heads& x, int64_t j, int64_t head) {
  return static_cast<T*>(const_cast<void*>(x.data)) + row.b * x.batch + (row.first + j) * x.step + head * x.head;
}

template <class T>
void widen_row(const T* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += W) store(to + d, words<T, false>(from, d, dim));
}

// Visits every query of a unit: f(i, h, its place in lse and delta).
template <class F>
void each_query(const Attention& p, const Row& row, int64_t head, F&& f) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t line = 0; line < row.rows; ++line) {
    const int64_t i = line / group, h = head * group + line % group;
    f(i, h, line_at(p, row, i, h));
  }
}

// delta from what the forward returned.
template <class T>
void delta_of_out(const AttentionBackward& b, const Row& row, int64_t head) {
  const Attention& p = b.forward;
  each_query(p, row, head, [&](int64_t i, int64_t h, int64_t at) {
    const T *grad = head_at<T>(p, row, b.grad_out, i, h), *out = head_at<T>(p, row, p.out, i, h);
    F32 dot{};
    for (int64_t d = 0; d < p.value_dim; d += W)
      dot = fma(words<T, false>(grad, d, p.value_dim), words<T, false>(out, d, p.value_dim), dot);
    b.delta[at] = sum(dot) - (b.grad_lse ? b.grad_lse[at] : 0.0f);
    b.top[at] = p.lse[at];
    b.excess[at] = 1;
  });
}

// The queries of a tile as rows and turned.
template <class T>
void load_queries(const AttentionBackward& b, const Unit& u, const Tiles& t) {
  const Attention& p = b.forward;
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  float *q = t.q + u.from * t.q_step, *grad = t.grad + u.from * t.v_step;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = (u.from + r) / group, h = u.head * group + (u.from + r) % group;
    widen_row(head_at<T>(p, u.row, p.q, i, h), p.head_dim, q + r * t.q_step);
    widen_row(head_at<T>(p, u.row, b.grad_out, i, h), p.value_dim, grad + r * t.v_step);
  }
  for (int64_t r = 0; r < rows; r += W) {
    const int64_t n = least(W, rows - r);
    turn(q + r * t.q_step, t.q_step, n, t.q_step, t.q_turned + u.from * t.q_step + r, TALL);
    turn(grad + r * t.v_step, t.v_step, n, t.v_step, t.grad_turned + u.from * t.v_step + r, TALL);
  }
}

// What is known of each query of a tile.
void load_sums(const AttentionBackward& b, const Unit& u, const Tiles& t) {
  const Attention& p = b.forward;
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = line_at(p, u.row, (u.from + r) / group, u.head * group + (u.from + r) % group);
    t.delta[r] = b.delta[at];
    t.shift[r] = b.top[at] == EMPTY ? 0.0f : b.top[at];  // a query without keys: every score is masked
    t.share[r] = b.excess[at] > 0 ? 1 / b.excess[at] : 1.0f;
  }
  for (int64_t r = rows; r < round_up(rows, W); ++r) t.delta[r] = t.shift[r] = t.share[r] = 0;
}

// score - shift of key j for W rows, -inf where a row does not see it.
OP_INLINE F32 score_above(const Attention& p, F32 product, int j, const Seen& seen, const Terms* terms, F32 shift) {
  F32 over = terms ? terms->score_above(p, product, j, shift) : fma(product, splat(p.scale), -shift);
  const F32 key = splat(static_cast<float>(j));
  over = key < seen.low ? splat(EMPTY) : over;
  return key < seen.high ? over : splat(EMPTY);
}

// A tile of keys against a tile of queries.
template <class T>
class Pair {
 public:
  Pair(const AttentionBackward& backward, const Unit& unit, const Tiles& tiles, int64_t from, int keys)
      : b(backward), p(backward.forward), u(unit), t(tiles), at(from), count(keys) {
    for (int64_t g = 0; g < groups; ++g) {
      seen[g] = seen_by(u, u.from + g * W, at, count);
      any = any || seen[g].from < seen[g].to;
    }
  }

  // One more tile of keys in every query's top, excess and delta, as the forward pass adds them up.
  void add_up() const {
    if (!any) return;
    products();
    for (int64_t g = 0; g < groups; ++g)
      with_terms(g, [&](const Terms* terms) {
        const int64_t n = least(W, rows - g * W);
        F32 top = splat(EMPTY), excess{}, delta{};
        for (int64_t r = 0; r < n; ++r) {
          const int64_t at = line(g * W + r);
          top[r] = b.top[at];
          excess[r] = b.excess[at];
          delta[r] = b.delta[at];
        }
        F32 best = top;
        for (int j = seen[g].from; j < seen[g].to; ++j)
          best = max(score_above(p, load(t.probabilities + j * TALL + g * W), j, seen[g], terms, F32{}), best);
        const F32 shift = best == EMPTY ? F32{} : best, keep = exp_negative(top - shift);
        F32 sums[4] = {}, dots[4] = {};  // short chains: see CHAIN
        for (int j = seen[g].from; j < seen[g].to; ++j) {
          const int64_t x = j * TALL + g * W;
          const F32 y = exp_negative(score_above(p, load(t.probabilities + x), j, seen[g], terms, shift));
          sums[j % 4] += y;
          dots[j % 4] += y == 0.0f ? F32{} : y * load(t.grad_probabilities + x);  // what is masked may hold NaN
        }
        excess = fma(excess, keep, total(sums));
        delta = fma(delta, keep, total(dots));
        for (int64_t r = 0; r < n; ++r) {
          const int64_t at = line(g * W + r);
          b.top[at] = best[r];
          b.excess[at] = excess[r];
          b.delta[at] = delta[r];
        }
      });
  }

  void differentiate() const {
    if (!any) return;
    load_sums(b, u, t);
    products();
    for (int64_t g = 0; g < groups; ++g) with_terms(g, [&](const Terms* terms) { probabilities(g, terms); });

    for (int64_t j = 0; j < count; j += ROWS) {
      add_to_keys(j, t.probabilities, t.grad + u.from * t.v_step, t.v_step, t.dv, t.dv_lost);
      add_to_keys(j, t.grad_probabilities, t.q + u.from * t.q_step, t.q_step, t.dk, t.dk_lost);
    }
    FetchRows nothing;
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int n = static_cast<int>(least(ROWS, rows - r));
      values_product<false, false>(n, t.grad_probabilities + r, TALL, t.k, t.q_step, count, nullptr,
                                   t.dq + r * t.q_step, t.q_step, t.q_step / W, nothing);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = head_at<float>(p, u.row, b.dq, (u.from + r) / group, u.head * group + (u.from + r) % group);
      for (int64_t d = 0; d < p.head_dim; d += W) {
        const int n = static_cast<int>(least(W, p.head_dim - d));
        store_n(to + d, load_n(to + d, n) + load(t.dq + r * t.q_step + d), n);
      }
    }
  }

 private:
  const AttentionBackward& b;
  const Attention& p;
  const Unit& u;
  const Tiles& t;
  const int64_t at;
  const int count;
  const int64_t rows = u.to - u.from, groups = (rows + W - 1) / W, group = p.heads / p.kv_heads;
  Seen seen[TALL / W];
  bool any = false;

  int64_t line(int64_t r) const {
    return line_at(p, u.row, (u.from + r) / group, u.head * group + (u.from + r) % group);
  }

  template <class F>
  void with_terms(int64_t g, F&& f) const {
    if (is_plain(p)) return f(nullptr);
    const Terms terms(u, u.from + g * W, at, count);
    f(&terms);
  }

  void product(const float* keys, int64_t step, const float* turned, int64_t dim, float* result) const {
    const float* key[KEYS];
    for (int j = 0; j < KEYS; ++j) key[j] = keys + least(j, count - 1) * step;
    FetchRows nothing;
    scores_product<false>(key, count, turned, groups, dim, result, nothing,
                          [&](int64_t g, int j) { return seen[g].to <= j || seen[g].from >= j + KEY_ROWS; });
  }

  // sum [key][channel] += weights [key][query] x [query][channel] of keys j ... j + ROWS - 1, with the error of the sum
  // so far (Kahan 1965): a key that all queries see has more tiles to add than rounding allows.
  void add_to_keys(int64_t j, const float* weights, const float* x, int64_t step, float* sum, float* lost) const {
    const int64_t n = least(ROWS, count - j);
    FetchRows nothing;
    values_product<false, true>(static_cast<int>(n), weights + j * TALL, TALL, x, step, rows, nullptr, t.tile, step,
                                step / W, nothing);
    for (int64_t d = 0; d < n * step; d += W) {
      const F32 old = load(sum + j * step + d), more = load(t.tile + d) - load(lost + j * step + d), now = old + more;
      store(lost + j * step + d, (now - old) - more);
      store(sum + j * step + d, now);
    }
  }

  void products() const {
    product(t.k, t.q_step, t.q_turned + u.from * t.q_step, p.head_dim, t.probabilities);
    product(t.v, t.v_step, t.grad_turned + u.from * t.v_step, p.value_dim, t.grad_probabilities);
  }

  // In place: products to probabilities, gradients of those to gradients of products; zero where none is seen.
  void probabilities(int64_t g, const Terms* terms) const {
    const F32 delta = load(t.delta + g * W), shift = load(t.shift + g * W), share = load(t.share + g * W);
    for (int j = 0; j < count; ++j) {
      float *s = t.probabilities + j * TALL + g * W, *d = t.grad_probabilities + j * TALL + g * W;
      if (j < seen[g].from || j >= seen[g].to) {
        store(s, F32{});
        store(d, F32{});
        continue;
      }
      const F32 product = load(s), y = exp_negative(score_above(p, product, j, seen[g], terms, shift)) * share;
      F32 grad = (load(d) - delta) * p.scale;
      if (p.softcap > 0) {
        const F32 bent = tanh(product * p.scale / p.softcap);
        grad = grad * (1.0f - bent * bent);
      }
      store(s, y);
      store(d, y == 0.0f ? F32{} : y * grad);  // what is masked may hold NaN
    }
  }
};

template <class T>
void backward_unit(const AttentionBackward& b, const Row& row, int64_t head, const Tiles& t) {
  const Attention& p = b.forward;
  const auto each_tile = [&](auto&& visit) {
    for (int64_t from = 0; from < row.rows; from += TALL)
      visit(Unit{p, row, head, head + 1, from, least(row.rows, from + TALL), 0, row.keys, 0, nullptr, 0});
  };
  const auto sweep = [&](int64_t at, int count, auto&& visit) {
    for (int64_t j = 0; j < count; ++j) {
      widen_row(key_at<T>(row, p.k, at + j, head), p.head_dim, t.k + j * t.q_step);
      widen_row(key_at<T>(row, p.v, at + j, head), p.value_dim, t.v + j * t.v_step);
    }
    each_tile([&](const Unit& u) { visit(Pair<T>(b, u, t, at, count)); });
  };
  each_tile([&](const Unit& u) { load_queries<T>(b, u, t); });
  if constexpr (std::is_same_v<T, float>) {
    each_query(p, row, head, [&](int64_t, int64_t h, int64_t at) {
      const bool sink = p.sinks && p.sinks[h] != EMPTY;
      b.top[at] = sink ? p.sinks[h] : EMPTY;
      b.excess[at] = sink ? 1.0f : 0.0f;
      b.delta[at] = 0;
    });
    for (int64_t at = 0; at < row.keys; at += KEYS)
      sweep(at, static_cast<int>(least(KEYS, row.keys - at)), [](const Pair<T>& pair) { pair.add_up(); });
    each_query(p, row, head, [&](int64_t, int64_t, int64_t at) {
      b.delta[at] = (b.excess[at] > 0 ? b.delta[at] / b.excess[at] : 0.0f) - (b.grad_lse ? b.grad_lse[at] : 0.0f);
    });
  } else {
    delta_of_out<T>(b, row, head);
  }
  for (int64_t at = 0; at < row.keys; at += KEYS) {
    const int count = static_cast<int>(least(KEYS, row.keys - at));
    for (float* sums : {t.dk, t.dk_lost}) std::memset(sums, 0, KEYS * t.q_step * sizeof(float));
    for (float* sums : {t.dv, t.dv_lost}) std::memset(sums, 0, KEYS * t.v_step * sizeof(float));
    sweep(at, count, [](const Pair<T>& pair) { pair.differentiate(); });
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < p.head_dim; d += W)
        store_n(key_at<T>(row, b.dk, at + j, head) + d, load(t.dk + j * t.q_step + d),
                static_cast<int>(least(W, p.head_dim - d)));
      for (int64_t d = 0; d < p.value_dim; d += W)
        store_n(key_at<T>(row, b.dv, at + j, head) + d, load(t.dv + j * t.v_step + d),
                static_cast<int>(least(W, p.value_dim - d)));
    }
  }
}

void backward(const AttentionBackward& b, void* workspace) {
  const Attention& p = b.forward;
  const int64_t bytes = Tiles(nullptr, p).bytes, units = p.batch * p.kv_heads;
  const int64_t team = team_of(p);
  int64_t next = 0;
  parallel_for(team, 1, static_cast<int>(team), [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Tiles t(static_cast<char*>(workspace) + thread * bytes, p);
      for (int64_t unit; (unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < units;) {
        const Row row(p, unit / p.kv_heads);
        with_dtype(p.dtype, [&](auto x) { backward_unit<decltype(x)>(b, row, unit % p.kv_heads, t); });
      }
    }
  });
}

}  // namespace

const AttentionBackwardKernels attention_backward = {workspace_bytes, backward};

}  // namespace onepass::ONEPASS_ISA
