// Attention with an online softmax: each key and value is read once per group of query heads, scores never leave the
// cache. Bytes: keys and values once, so decoding is bound by memory; FLOPs: 2 Sq Sk (D + Dv) a head, half when causal.
//
// A row's work is cut by its own sizes alone, so its bits depend on no neighbour and no thread count:
//  - many rows (queries times heads of a group): tiles of TALL rows, keys and values packed per tile of keys, products
//    in register blocks of ROWS rows whose scores are used at once;
//  - up to FEW_KEYS_SPLIT rows: also cut along the keys in chunks from the first valid one; the partial results are
//    combined in ascending order;
//  - up to FEW of them: nothing is packed, and where heads interleave in memory all heads walk the tokens together, one
//    tile ahead of the prefetches (one head at a time reaches half the bandwidth).
#include "onepass/attention.h"

#include "attention_block.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TALL = 96, SPLIT = 64, FEW = 8;  // rows
constexpr int KEYS = 64;                           // of a tile
constexpr int64_t MAX_DIM = 256;
constexpr float EMPTY = -__builtin_inff();

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A row of the batch: its sizes, how its work is cut, and where its parts begin.
struct Row {
  int64_t b, queries, keys, first, begin, end, rows, chunks, chunk, tiles;
  bool together;  // all heads in one unit

  Row(const Attention& p, int64_t index) : b(index) {
    const Cache& c = p.cache;
    queries = c.cu_seqlens ? c.cu_seqlens[b + 1] - c.cu_seqlens[b] : p.queries;
    first = c.leftpad ? c.leftpad[b] : 0;
    keys = (c.seqlens ? c.seqlens[b] : c.keys) + (c.appended < 0 ? queries : c.appended) - first;
    rows = queries * (p.heads / p.kv_heads);
    begin = p.window_left < 0 ? 0 : most(0, keys - queries - p.window_left);
    end = p.window_right < 0 ? keys : least(keys, keys + p.window_right);
    if (end < begin) end = begin;
    const bool split = rows <= SPLIT;
    together = rows <= FEW && p.k.head < p.k.step;
    chunk = split ? most(128, round_up((end - begin + 31) / 32, KEYS)) : most(end - begin, 1);
    chunks = split ? most(1, (end - begin + chunk - 1) / chunk) : 1;
    tiles = split ? (rows ? 1 : 0) : (rows + TALL - 1) / TALL;
  }
  int64_t units(const Attention& p) const { return chunks * tiles * (together ? 1 : p.kv_heads); }
  int64_t parts(const Attention& p) const { return chunks > 1 ? chunks * p.kv_heads * rows : 0; }
  // The key that query i sits at.
  int64_t place(int64_t i) const { return keys - queries + i; }
};

struct Sizes {
  int64_t q_step, c_step, state_rows, part;

  explicit Sizes(const Attention& p) {
    q_step = round_up(p.head_dim, 2 * W);
    c_step = round_up(p.value_dim, 2 * W);
    state_rows = most(TALL, p.kv_heads * FEW);
    part = c_step + 2 * W;
  }
};

// Cuts one block of memory into arrays, each on its own cache line.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* start = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return start;
  }
};

// What a thread works in: the state of the rows at hand, a tile of keys.
struct Scratch {
  float *q, *c, *top, *total, *alpha, *scores, *keys, *values;
  const char **key, **value;  // this tile's keys, then the next one's

  Scratch(Arena& arena, const Sizes& s) {
    q = arena.take<float>(s.state_rows * s.q_step);
    c = arena.take<float>(s.state_rows * s.c_step);
    top = arena.take<float>(s.state_rows);
    total = arena.take<float>(s.state_rows);
    alpha = arena.take<float>(FEW);
    scores = arena.take<float>(FEW * KEYS);
    keys = arena.take<float>(s.q_step * KEYS);
    values = arena.take<float>(s.c_step * KEYS);
    key = arena.take<const char*>(2 * KEYS);
    value = arena.take<const char*>(2 * KEYS);
  }
};

struct Layout {
  int64_t *unit_start, *part_start;
  float* parts;
  char* scratch;
  int64_t scratch_bytes, bytes;

  Layout(const Attention& p, void* workspace) {
    const Sizes s(p);
    int64_t parts_count = 0;
    for (int64_t b = 0; b < p.batch; ++b) parts_count += Row(p, b).parts(p);
    Arena arena{static_cast<char*>(workspace)};
    unit_start = arena.take<int64_t>(p.batch + 1);
    part_start = arena.take<int64_t>(p.batch + 1);
    parts = arena.take<float>(parts_count * s.part);
    scratch = arena.at;
    Scratch one(arena, s);
    scratch_bytes = arena.at - scratch;
    bytes = scratch - static_cast<char*>(workspace) + scratch_bytes * most(1, p.num_threads);
  }
};

int64_t workspace_bytes(const Attention& p) { return Layout(p, nullptr).bytes; }

// One unit of work: rows [from, to) of each head in [head, head_end) against keys [begin, end).
struct Unit {
  const Attention& p;
  const Row& row;
  int64_t head, head_end, from, to, begin, end, chunk;
};

template <class T>
void rotate(const Rotary& rotary, int64_t position, const T* x, float* y, int64_t dim) {
  for (int64_t d = 0; d < dim; d += W) store(y + d, load_n(x + d, static_cast<int>(least(W, dim - d))));
  if (!rotary.cos) return;
  const float *cos = rotary.cos + position * rotary.half, *sin = rotary.sin + position * rotary.half;
  const int64_t step = rotary.interleaved ? 2 : 1, mate = rotary.interleaved ? 1 : rotary.half;
  for (int64_t i = 0; i < rotary.half; ++i) {
    float *a = y + i * step, *b = a + mate;
    const float turned = *a * cos[i] - *b * sin[i];
    *b = *b * cos[i] + *a * sin[i];
    *a = turned;
  }
}

template <class T>
const T* query(const Attention& p, const Row& row, int64_t i, int64_t h) {
  const int64_t start = p.cache.cu_seqlens ? p.cache.cu_seqlens[row.b] * p.q.step : row.b * p.q.batch;
  return static_cast<const T*>(p.q.data) + start + i * p.q.step + h * p.q.head;
}

// The unit's queries as words, and an empty state.
template <class T, bool DOT>
void begin_rows(const Unit& u, const Sizes& s, const Scratch& w) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  float buffer[MAX_DIM + 2 * 16];
  for (int64_t r = 0; r < rows * (u.head_end - u.head); ++r) {
    const int64_t at = u.from + r % rows, i = at / group, h = (u.head + r / rows) * group + at % group;
    const int64_t before = p.rotary.cos ? p.cache.seqlens[u.row.b] + (p.rotary_ordered ? i : 0) : 0;
    rotate(p.rotary, before, query<T>(p, u.row, i, h), buffer, p.head_dim);
    for (int64_t d = p.head_dim; d < s.q_step; ++d) buffer[d] = 0;
    float* q = w.q + r * s.q_step;
    for (int64_t d = 0; d < s.q_step; d += W) {
      if constexpr (DOT)
        store(reinterpret_cast<BF16*>(q) + d, load(buffer + d));
      else
        store(q + d, load(buffer + d));
    }
    w.top[r] = EMPTY;
    w.total[r] = 0;
    std::memset(w.c + r * s.c_step, 0, s.c_step * sizeof(float));
  }
}

// Pointers to head 0 of keys [at, at + count).
template <class T>
void locate(const Attention& p, const Row& row, int64_t at, int64_t count, const char** key, const char** value) {
  const Cache& c = p.cache;
  const T *k = static_cast<const T*>(p.k.data), *v = static_cast<const T*>(p.v.data);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t slot = row.first + at + j;
    int64_t page = c.batch_idx ? c.batch_idx[row.b] : row.b, within = slot;
    if (c.block_table) {
      page = c.block_table[row.b * c.blocks + slot / c.slots];
      within = slot % c.slots;
    }
    key[j] = reinterpret_cast<const char*>(k + page * p.k.batch + within * p.k.step);
    value[j] = reinterpret_cast<const char*>(v + page * p.v.batch + within * p.v.step);
  }
}

// What a score adds: 0 and -inf for a boolean mask, the value of an additive one, the tree over a row's last keys.
void fill_bias(const Attention& p, const Row& row, int64_t i, int64_t h, int64_t at, int count, float* bias) {
  for (int j = 0; j < KEYS; ++j) bias[j] = 0;
  if (p.mask.kind != MaskKind::none) {
    const int64_t start = row.b * p.mask.batch + h * p.mask.head + i * p.mask.row + at * p.mask.key;
    if (p.mask.kind == MaskKind::boolean) {
      const uint8_t* seen = static_cast<const uint8_t*>(p.mask.data) + start;
      for (int j = 0; j < count; ++j) bias[j] = seen[j * p.mask.key] ? 0 : EMPTY;
    } else {
      const float* extra = static_cast<const float*>(p.mask.data) + start;
      for (int j = 0; j < count; ++j) bias[j] = extra[j * p.mask.key];
    }
  }
  if (p.tree) {
    const uint8_t* seen = p.tree + (row.b * p.queries + i) * p.queries;
    const int64_t newest = row.keys - row.queries;
    for (int64_t j = most(0, newest - at); j < count; ++j)
      if (!seen[at + j - newest]) bias[j] = EMPTY;
  }
}

// The keys of the tile at `at` that query i may see, as [low, high) of the tile.
struct Span {
  int low, high;
};

Span span(const Attention& p, const Row& row, int64_t i, int64_t at, int count) {
  const int64_t place = row.place(i) - at;
  const int64_t low = p.window_left < 0 ? 0 : most(0, place - p.window_left);
  const int64_t high = p.window_right < 0 ? count : least(count, place + p.window_right + 1);
  return {static_cast<int>(least(low, count)), static_cast<int>(most(high, 0))};
}

// Turns a row of raw scores into weights relative to the row's new maximum, and brings its state up to that.
template <bool DOT>
void soften(const Attention& p, const Row& row, int64_t i, int64_t h, int64_t at, int count, float* scores, float* top,
            float* total, float* alpha) {
  const Span seen = span(p, row, i, at, count);
  const bool biased = p.mask.kind != MaskKind::none || p.tree;
  const bool cut = seen.low > 0 || seen.high < KEYS;
  const float slope = p.slopes ? p.slopes[row.b * p.slopes_batch + h] : 0.0f;
  float bias[KEYS];
  if (biased) fill_bias(p, row, i, h, at, count, bias);
  const F32 lanes = to_f32((I32)iota());
  const F32 low = splat(static_cast<float>(seen.low)), high = splat(static_cast<float>(seen.high));
  const F32 distance = splat(static_cast<float>(row.place(i) - at)) - lanes;
  const bool plain = !(p.softcap > 0 || p.slopes || biased);
  const auto masked = [&](F32 y, int n) {
    const F32 key = lanes + static_cast<float>(n * W);
    y = key < low ? splat(EMPTY) : y;
    return key < high ? y : splat(EMPTY);
  };
  F32 x[KEYS / W], best = splat(EMPTY);
#pragma GCC unroll 4
  for (int n = 0; n < KEYS / W; ++n) {
    const F32 score = load(scores + n * W);
    x[n] = score * p.scale;
    if (p.softcap > 0) x[n] = p.softcap * tanh(x[n] / p.softcap);
    if (p.slopes) {
      const F32 away = distance - static_cast<float>(n * W);
      x[n] = fma(splat(-slope), max(away, -away), x[n]);
    }
    if (biased) {
      const F32 extra = load(bias + n * W);
      x[n] = extra == EMPTY ? splat(EMPTY) : x[n] + extra;
    }
    if (cut) x[n] = masked(x[n], n);
    best = max(x[n], best);
    if (plain) x[n] = score;
  }
  const float highest = max_lane(best), next = highest > *top ? highest : *top;
  const float shift = next == EMPTY ? 0.0f : next;
  F32 sums{};
#pragma GCC unroll 4
  for (int n = 0; n < KEYS / W; ++n) {
    // Scaled and shifted in one rounding, of the difference: that of the product would be an error of the exponent.
    F32 over = plain ? fma(x[n], splat(p.scale), splat(-shift)) : x[n] - shift;
    if (plain && cut) over = masked(over, n);
    const F32 y = exp_negative(over);
    sums += y;
    if constexpr (DOT)
      store(reinterpret_cast<BF16*>(scores) + n * W, y);
    else
      store(scores + n * W, y);
  }
  *alpha = exp_negative(splat(*top - shift))[0];
  *total = fma(splat(*total), splat(*alpha), splat(sum(sums)))[0];
  *top = next;
}

template <class T, bool DOT, int R>
void few_rows(const Unit& u, const Sizes& s, const Scratch& w, int64_t head, int64_t at, int count, int ahead,
              int64_t r) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads, state = (head - u.head) * (u.to - u.from) + r;
  const int64_t key_bytes = p.k.head * head * sizeof(T), value_bytes = p.v.head * head * sizeof(T);
  const auto key = [&](int j) { return reinterpret_cast<const T*>(w.key[j] + key_bytes); };
  const auto value = [&](int j) { return reinterpret_cast<const T*>(w.value[j] + value_bytes); };
  const auto fetch = [&](int j, int n) {  // the same keys of the next tile, once a tile and head
    for (int i = j; r == 0 && i < j + n && i < ahead; ++i) {
      for (int64_t d = 0; d < p.head_dim * static_cast<int64_t>(sizeof(T)); d += 64)
        __builtin_prefetch(w.key[KEYS + i] + key_bytes + d, 0, 2);
      for (int64_t d = 0; d < p.value_dim * static_cast<int64_t>(sizeof(T)); d += 64)
        __builtin_prefetch(w.value[KEYS + i] + value_bytes + d, 0, 2);
    }
  };
  dots<T, DOT, R>(w.q + state * s.q_step, s.q_step, key, fetch, count, p.head_dim, w.scores, KEYS);
  for (int64_t n = 0; n < R; ++n) {
    const int64_t line = u.from + r + n;
    soften<DOT>(p, u.row, line / group, head * group + line % group, at, count, w.scores + n * KEYS, w.top + state + n,
                w.total + state + n, w.alpha + n);
  }
  weigh<T, DOT, R>(w.scores, KEYS, value, count, p.value_dim, w.alpha, w.c + state * s.c_step, s.c_step);
}

template <class T, bool DOT>
void few(const Unit& u, const Sizes& s, const Scratch& w, int64_t head, int64_t at, int count, int ahead) {
  int64_t r = 0;
  const int64_t rows = u.to - u.from;
  for (; r + 4 <= rows; r += 4) few_rows<T, DOT, 4>(u, s, w, head, at, count, ahead, r);
  if (r + 2 <= rows) {
    few_rows<T, DOT, 2>(u, s, w, head, at, count, ahead, r);
    r += 2;
  }
  if (r < rows) few_rows<T, DOT, 1>(u, s, w, head, at, count, ahead, r);
}

template <class T, bool DOT>
void many(const Unit& u, const Sizes& s, const Scratch& w, int64_t at, int count) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  const int64_t key_bytes = p.k.head * u.head * sizeof(T), value_bytes = p.v.head * u.head * sizeof(T);
  pack_keys<T, DOT>([&](int j) { return reinterpret_cast<const T*>(w.key[j] + key_bytes); }, count, KEYS, p.head_dim,
                    w.keys);
  pack_values<T, DOT>([&](int j) { return reinterpret_cast<const T*>(w.value[j] + value_bytes); }, count, p.value_dim,
                      s.c_step, w.values);
  constexpr int PAIR = DOT ? 2 : 1;
  const int64_t vectors = (p.value_dim + W - 1) / W, words = (p.head_dim + PAIR - 1) / PAIR;
  for (int64_t r = 0; r < rows; r += ROWS) {
    const int n = static_cast<int>(least(ROWS, rows - r));
    const int64_t line = u.from + r;
    const int low = span(p, u.row, line / group, at, count).low;
    const int high = span(p, u.row, (line + n - 1) / group, at, count).high;
    if (low >= high) continue;  // no row of the block sees the tile: their states stay
    product<DOT>(n, w.q + r * s.q_step, s.q_step, w.keys, KEYS, words, nullptr, w.scores, KEYS, KEYS / W);
    for (int m = 0; m < n; ++m)
      soften<DOT>(p, u.row, (line + m) / group, u.head * group + (line + m) % group, at, count, w.scores + m * KEYS,
                  w.top + r + m, w.total + r + m, w.alpha + m);
    const int start = low / PAIR, depth = (high + PAIR - 1) / PAIR - start;
    product<DOT>(n, w.scores + start, KEYS, w.values + start * s.c_step, s.c_step, depth, w.alpha, w.c + r * s.c_step,
                 s.c_step, vectors);
  }
}

// out and lse of one row from its state; the sink enters here.
template <class T>
void finish_row(const Attention& p, const Row& row, int64_t i, int64_t h, const float* c, float top, float total) {
  float shrink = 1;
  if (p.sinks) {
    const float sink = p.sinks[h], next = sink > top ? sink : top;
    if (next != EMPTY) {
      shrink = exp_negative(splat(top - next))[0];
      total = total * shrink + exp_negative(splat(sink - next))[0];
    }
    top = next;
  }
  const bool none = total == 0;
  const F32 kept = splat(none ? 0.0f : shrink), whole = splat(none ? 1.0f : total);
  const bool ragged = p.cache.cu_seqlens != nullptr;
  const int64_t token = ragged ? p.cache.cu_seqlens[row.b] + i : i;
  T* out = static_cast<T*>(const_cast<void*>(p.out.data)) + (ragged ? 0 : row.b * p.out.batch) + token * p.out.step +
           h * p.out.head;
  for (int64_t d = 0; d < p.value_dim; d += W)
    store_n(out + d, load(c + d) * kept / whole, static_cast<int>(least(W, p.value_dim - d)));
  const int64_t at = ragged ? h * p.tokens + token : (row.b * p.heads + h) * p.queries + i;
  p.lse[at] = none ? EMPTY : top + static_cast<float>(__builtin_log(static_cast<double>(total)));
}

template <class T, bool DOT>
void run(const Unit& u, const Sizes& s, const Scratch& w, float* parts) {
  const Attention& p = u.p;
  begin_rows<T, DOT>(u, s, w);
  const bool is_few = u.row.rows <= FEW;
  int64_t located = 0;
  for (int64_t at = u.begin; at < u.end; at += KEYS) {
    const int count = static_cast<int>(least(KEYS, u.end - at));
    if (!is_few) {
      locate<T>(p, u.row, at, count, w.key, w.value);
      many<T, DOT>(u, s, w, at, count);
      continue;
    }
    // The next tile may belong to the next chunk, which this thread does next.
    if (located) {
      std::memcpy(w.key, w.key + KEYS, KEYS * sizeof *w.key);
      std::memcpy(w.value, w.value + KEYS, KEYS * sizeof *w.value);
    } else {
      locate<T>(p, u.row, at, count, w.key, w.value);
    }
    const int ahead = static_cast<int>(most(0, least(KEYS, u.row.end - at - KEYS)));
    locate<T>(p, u.row, at + KEYS, ahead, w.key + KEYS, w.value + KEYS);
    located = ahead;
    for (int64_t head = u.head; head < u.head_end; ++head) few<T, DOT>(u, s, w, head, at, count, ahead);
  }
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  for (int64_t r = 0; r < rows * (u.head_end - u.head); ++r) {
    const int64_t line = u.from + r % rows, head = u.head + r / rows;
    if (u.row.chunks == 1) {
      finish_row<T>(p, u.row, line / group, head * group + line % group, w.c + r * s.c_step, w.top[r], w.total[r]);
      continue;
    }
    float* part = parts + ((u.chunk * p.kv_heads + head) * u.row.rows + line) * s.part;
    std::memcpy(part, w.c + r * s.c_step, s.c_step * sizeof(float));
    part[s.c_step] = w.top[r];
    part[s.c_step + 1] = w.total[r];
  }
}

// Partial results of row `line` of a head, in ascending order of their chunks.
template <class T>
void combine(const Attention& p, const Row& row, const Sizes& s, float* parts, int64_t head, int64_t line) {
  const int64_t group = p.heads / p.kv_heads, step = p.kv_heads * row.rows * s.part;
  float* first = parts + (head * row.rows + line) * s.part;
  float top = EMPTY, total = 0;
  for (int64_t n = 0; n < row.chunks; ++n) top = first[n * step + s.c_step] > top ? first[n * step + s.c_step] : top;
  const float shift = top == EMPTY ? 0.0f : top;
  for (int64_t n = 0; n < row.chunks; ++n) {
    const float* part = first + n * step;
    const F32 weight = exp_negative(splat(part[s.c_step] - shift));
    total += part[s.c_step + 1] * weight[0];
    for (int64_t d = 0; d < p.value_dim; d += W)
      store(first + d, n ? fma(weight, load(part + d), load(first + d)) : weight * load(part + d));
  }
  finish_row<T>(p, row, line / group, head * group + line % group, first, top, total);
}

template <class T, bool DOT>
void forward_as(const Attention& p, void* workspace) {
  const Sizes s(p);
  const Layout layout(p, workspace);
  int64_t units = 0, parts = 0;
  bool even = true;  // every unit costs about the same: a thread takes a run of them, else the next one
  for (int64_t b = 0; b < p.batch; ++b) {
    const Row row(p, b);
    layout.unit_start[b] = units;
    layout.part_start[b] = parts;
    units += row.units(p);
    parts += row.parts(p);
    even = even && row.rows <= SPLIT;
  }
  layout.unit_start[p.batch] = units;
  int64_t next = 0;
  const int64_t team = most(1, least(p.num_threads, units));
  parallel_for(team, 1, static_cast<int>(team), [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Arena arena{layout.scratch + thread * layout.scratch_bytes};
      const Scratch w(arena, s);
      int64_t unit = even ? units * thread / team : __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      const int64_t last = even ? units * (thread + 1) / team : units;
      while (unit < last) {
        int64_t low = 0, high = p.batch;  // the row b with unit_start[b] <= unit < unit_start[b + 1]
        while (high - low > 1) {
          const int64_t middle = (low + high) / 2;
          (layout.unit_start[middle] <= unit ? low : high) = middle;
        }
        const Row row(p, low);
        int64_t at = unit - layout.unit_start[low];
        Unit u{p, row, 0, p.kv_heads, 0, row.rows, row.begin, row.end, 0};
        if (row.tiles > 1) {  // the last rows see the most keys: they come first
          const int64_t tile = row.tiles - 1 - at / p.kv_heads, group = p.heads / p.kv_heads;
          u.from = tile * TALL;
          u.to = least(row.rows, u.from + TALL);
          if (p.window_left >= 0) u.begin = most(0, row.place(u.from / group) - p.window_left);
          if (p.window_right >= 0) u.end = least(row.keys, row.place((u.to - 1) / group) + p.window_right + 1);
          at %= p.kv_heads;
        } else {
          u.chunk = at % row.chunks;
          u.begin = row.begin + u.chunk * row.chunk;
          u.end = least(row.end, u.begin + row.chunk);
          at /= row.chunks;
        }
        if (!row.together) {
          u.head = at;
          u.head_end = at + 1;
        }
        run<T, DOT>(u, s, w, layout.parts + layout.part_start[low] * s.part);
        unit = even ? unit + 1 : __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      }
    }
  });
  if (!parts) return;
  // Of a few heads on this thread: starting the others again costs a busy machine a whole time slice.
  parallel_for(p.batch * p.kv_heads, 32, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Row row(p, at / p.kv_heads);
      for (int64_t line = 0; row.chunks > 1 && line < row.rows; ++line)
        combine<T>(p, row, s, layout.parts + layout.part_start[row.b] * s.part, at % p.kv_heads, line);
    }
  });
}

void forward(const Attention& p, void* workspace) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    forward_as<T, HAS_DOT && std::is_same_v<T, BF16>>(p, workspace);
  });
}

template <class T>
void append_as(const Append& p) {
  const Cache& c = p.cache;
  parallel_for(p.batch, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    float buffer[MAX_DIM + 16];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = c.cu_seqlens ? c.cu_seqlens[b] : 0;
      const int64_t steps = c.cu_seqlens ? c.cu_seqlens[b + 1] - start : p.steps;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t position = c.seqlens[b] + t;
        int64_t page = c.batch_idx ? c.batch_idx[b] : b, within = position;
        if (c.block_table) {
          page = c.block_table[b * c.blocks + position / c.slots];
          within = position % c.slots;
        }
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          const auto from = [&](const Heads& x) {
            return static_cast<const T*>(x.data) + (c.cu_seqlens ? start * x.step : b * x.batch) + t * x.step +
                   h * x.head;
          };
          const auto to = [&](const Heads& x) {
            return static_cast<T*>(const_cast<void*>(x.data)) + page * x.batch + within * x.step + h * x.head;
          };
          std::memcpy(to(p.v_cache), from(p.v), p.value_dim * sizeof(T));
          T* key = to(p.k_cache);
          std::memcpy(key, from(p.k), p.head_dim * sizeof(T));
          const int64_t turned = 2 * p.rotary.half;
          if (!p.rotary.cos) continue;
          rotate(p.rotary, position, from(p.k), buffer, turned);
          for (int64_t d = 0; d < turned; d += W)
            store_n(key + d, load(buffer + d), static_cast<int>(least(W, turned - d)));
        }
      }
    }
  });
}

void append(const Append& p) {
  with_dtype(p.dtype, [&](auto t) { append_as<decltype(t)>(p); });
}

}  // namespace

const AttentionKernels attention = {workspace_bytes, forward, append};

}  // namespace onepass::ONEPASS_ISA
