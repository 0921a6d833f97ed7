// Attention with an online softmax: each key and value is read once per group of query heads, scores never leave the
// cache. Bytes: keys and values once, so decoding is bound by memory; FLOPs: 2 Sq Sk (D + Dv) a head, half when causal.
//
// A row's work is cut by its own sizes alone, so its bits depend on no neighbour and no thread count:
//  - many rows (queries times heads of a group): tiles of TALL rows against tiles of KEYS keys (attention_many.h);
//  - up to SPLIT rows: also cut along the keys in chunks from the first valid one; the partial results are combined in
//    ascending order;
//  - up to FEW of them: lanes are channels and keys (attention_few.h);
//  - where heads interleave in memory, HEADS of up to SOME rows or all heads of FEW walk the tokens together.
// What comes next is asked for beside the work: of few rows a line at a time, in the order of addresses; of many the
// lines of a key with every few steps of a product. In bursts of a block's keys 32 rows of 8 heads against 4096 keys
// took 1.25 times as long; a line with every other step took 6% of the products of a prefill.
#include "attention_few.h"
#include "attention_many.h"
#include "range.h"
#include "rotary.h"

namespace onepass::ONEPASS_ISA {
namespace {

int64_t workspace_bytes(const Attention& p) { return Layout(p, nullptr).bytes; }

template <class T>
const T* query(const Attention& p, const Row& row, int64_t i, int64_t h) {
  const int64_t start = p.cache.cu_seqlens ? p.cache.cu_seqlens[row.b] * p.q.step : row.b * p.q.batch;
  return static_cast<const T*>(p.q.data) + start + i * p.q.step + h * p.q.head;
}

// The unit's queries as words, and an empty state.
template <class Q, class T, bool DOT>
void begin_rows(const Unit& u, const Sizes& s, const Scratch& w) {
  const Attention& p = u.p;
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  const bool is_few = u.row.rows <= FEW;
  constexpr int PER = PER_WORD<T, DOT>;
  float buffer[MAX_DIM + 2 * W];
  Q rotated[MAX_DIM];
  for (int64_t r = 0; r < rows * (u.head_end - u.head); ++r) {
    const int64_t at = u.from + r % rows;
    const Q* x = query<Q>(p, u.row, at / group, (u.head + r / rows) * group + at % group);
    for (int64_t d = 0; d < p.head_dim; d += 64 / static_cast<int64_t>(sizeof(Q))) __builtin_prefetch(x + d);
  }
  for (int64_t r = 0; r < rows * (u.head_end - u.head); ++r) {
    const int64_t head = r / rows, line = r % rows, at = u.from + line, i = at / group;
    const Q* x = query<Q>(p, u.row, i, (u.head + head) * group + at % group);
    // Few rows: those that are taken at once beside each other. Many: from scores, turned W rows at a time.
    const Together few = together(rows, u.head_end - u.head, r);
    const int64_t beside = is_few ? few.count : 1;
    float* q = is_few ? w.q + few.first * s.q_step + (r - few.first) * W : w.scores + line % W * s.q_step;
    if (p.rotary.cos) {
      rotate(p.rotary, p.cache.seqlens[u.row.b] + (p.rotary_ordered ? i : 0), x, buffer, p.head_dim);
      if constexpr (DOT) {
        for (int64_t d = 0; d < p.head_dim; d += W)
          store_n(rotated + d, load(buffer + d), static_cast<int>(least(W, p.head_dim - d)));
        x = rotated;
      }
    }
#if defined(__AVX512F__)
    if constexpr (WAY_OF<Q, T, DOT> == Way::whole) {
      if (is_few) {
        F32 floats[(MAX_DIM + 2 * W) / W] = {};
        for (int64_t d = 0; d < p.head_dim; d += W)
          floats[d / W] = p.rotary.cos ? words<float, false>(buffer, d, p.head_dim) : words<Q, false>(x, d, p.head_dim);
        w.product_unit[r] = store_whole(floats, s.q_step / W, reinterpret_cast<int16_t*>(q), beside);
        std::memset(u.c + r * u.c_step, 0, s.c_step * sizeof(float));
        continue;
      }
    }
#endif
    for (int64_t k = 0; k < s.q_step; k += W) {
      F32 word{};
      if (k * PER < p.head_dim)
        word =
            !DOT && p.rotary.cos ? words<float, false>(buffer, k, p.head_dim) : words<Q, DOT>(x, k * PER, p.head_dim);
      store(q + k * beside, word);
    }
    if (!is_few && (line % W == W - 1 || line == rows - 1))
      turn(w.scores, s.q_step, line % W + 1, DOT ? s.q_step / 2 : s.q_step, w.of_head(head, s).q + line / W * W, TALL);
    std::memset(u.c + r * u.c_step, 0, s.c_step * sizeof(float));
  }
  const int64_t states = (is_few ? rows : TALL) * (u.head_end - u.head);
  for (int64_t r = 0; r < states; ++r) w.top[r] = EMPTY;
  std::memset(w.total, 0, states * W * sizeof(float));
}

// Pointers to head 0 of keys [at, at + count), the last one repeated to the end of the tile.
template <class T>
void locate(const Attention& p, const Row& row, int64_t at, int64_t count, Places* to) {
  static const float ONE = 1;
  const auto scales_at = [&](const Scales& s, int64_t page, int64_t slot) {
    return s.data ? s.data + (s.per_token ? page * s.batch + slot * s.step : row.b * s.batch) : &ONE;
  };
  const Cache& c = p.cache;
  const int64_t k_step = p.k.step * sizeof(T), v_step = p.v.step * sizeof(T);
  for (int64_t j = 0; j < count;) {
    const int64_t slot = row.first + at + j;
    int64_t page = c.batch_idx ? c.batch_idx[row.b] : row.b, within = slot, run = count;
    if (c.block_table) {
      page = c.block_table[row.b * c.blocks + slot / c.slots];
      within = slot % c.slots;
      run = least(count, j + c.slots - within);
    }
    const char* k = static_cast<const char*>(p.k.data) + page * p.k.batch * sizeof(T) + within * k_step;
    const char* v = static_cast<const char*>(p.v.data) + page * p.v.batch * sizeof(T) + within * v_step;
    for (; j < run; ++j, ++within, k += k_step, v += v_step) {
      to->key[j] = k;
      to->value[j] = v;
      if constexpr (IS_CODE<T>) {
        to->key_scale[j] = scales_at(p.k_scale, page, within);
        to->value_scale[j] = scales_at(p.v_scale, page, within);
      }
    }
  }
  for (int64_t j = count; count && j < KEYS; ++j) {
    to->key[j] = to->key[count - 1];
    to->value[j] = to->value[count - 1];
    if constexpr (IS_CODE<T>) {
      to->key_scale[j] = to->key_scale[count - 1];
      to->value_scale[j] = to->value_scale[count - 1];
    }
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

template <class Q, class T, bool DOT>
void run(const Unit& u, const Sizes& s, Scratch& w) {
  const Attention& p = u.p;
  begin_rows<Q, T, DOT>(u, s, w);
  const bool is_few = u.row.rows <= FEW;
  int64_t located = 0;
  for (int64_t at = u.begin; at < u.end; at += KEYS) {
    const int count = static_cast<int>(least(KEYS, u.end - at));
    // The next tile may belong to the next chunk, which this thread does next.
    if (located)
      w.advance();
    else
      locate<T>(p, u.row, at, count, w.now);
    const int ahead = static_cast<int>(most(0, least(KEYS, u.row.end - at - KEYS)));
    locate<T>(p, u.row, at + KEYS, ahead, w.then);
    located = ahead;
    if (is_few) {
      few<T, WAY_OF<Q, T, DOT>>(u, s, w, at, count, ahead > 0);
      continue;
    }
    for (int64_t head = u.head; head < u.head_end; ++head) {
      // The next head of this tile, or the first of the next one: what comes next, and no more than the cache can hold.
      const bool turn = head + 1 == u.head_end;
      const Next next{turn ? (ahead ? w.then : nullptr) : w.now, turn ? u.head : head + 1};
      many<T, DOT>(u.of_head(head), s, w.of_head(head - u.head, s), at, count, next);
    }
  }
  const int64_t group = p.heads / p.kv_heads, rows = u.to - u.from;
  for (int64_t r = 0; r < rows * (u.head_end - u.head); ++r) {
    const int64_t line = u.from + r % rows, head = r / rows, state = is_few ? r : head * TALL + r % rows;
    const float top = w.top[state], total = is_few ? sum(load(w.total + r * W)) : w.total[state];
    if (u.row.chunks == 1) {
      const int64_t h = (u.head + head) * group + line % group;
      finish_row<Q>(p, u.row, line / group, h, u.c + r * u.c_step, top, total);
      continue;
    }
    u.c[r * s.part + s.c_step] = top;
    u.c[r * s.part + s.c_step + 1] = total;
  }
}

constexpr int64_t COMBINE_BYTES = 256 << 10;  // that a thread is started for

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

// Unit `at` of a row: of a tall row a tile of a head, else a chunk of a head or of all.
Unit unit_of(const Attention& p, const Row& row, int64_t at, const Sizes& s, const Scratch& w, float* parts) {
  Unit u{p, row, 0, p.kv_heads, 0, row.rows, row.begin, row.end, 0, w.c, s.c_step};
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
  u.head = at * row.heads;
  u.head_end = least(p.kv_heads, u.head + row.heads);
  if (row.chunks > 1) {
    u.c = parts + (u.chunk * p.kv_heads + u.head) * row.rows * s.part;
    u.c_step = s.part;
  }
  return u;
}

template <class Q, class T, bool DOT>
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
      Scratch w(arena, s);
      int64_t unit = even ? units * thread / team : __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      const int64_t last = even ? units * (thread + 1) / team : units;
      while (unit < last) {
        int64_t low = 0, high = p.batch;  // the row b with unit_start[b] <= unit < unit_start[b + 1]
        while (high - low > 1) {
          const int64_t middle = (low + high) / 2;
          (layout.unit_start[middle] <= unit ? low : high) = middle;
        }
        const Row row(p, low);
        run<Q, T, DOT>(
            unit_of(p, row, unit - layout.unit_start[low], s, w, layout.parts + layout.part_start[low] * s.part), s, w);
        unit = even ? unit + 1 : __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      }
    }
  });
  if (!parts) return;
  // Of little memory on this thread: starting the others again costs a busy machine a whole time slice.
  const int64_t head_bytes = parts * s.part * static_cast<int64_t>(sizeof(float)) / (p.batch * p.kv_heads);
  parallel_for(p.batch * p.kv_heads, COMBINE_BYTES / most(1, head_bytes), p.num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t at = begin; at < end; ++at) {
                   const Row row(p, at / p.kv_heads);
                   for (int64_t line = 0; row.chunks > 1 && line < row.rows; ++line)
                     combine<Q>(p, row, s, layout.parts + layout.part_start[row.b] * s.part, at % p.kv_heads, line);
                 }
               });
}

void forward(const Attention& p, void* workspace) {
  with_dtype(p.dtype, [&](auto t) {
    using Q = decltype(t);
    with_codes<Q>(p.codes,
                  [&](auto c) { forward_as<Q, decltype(c), HAS_DOT && std::is_same_v<Q, BF16>>(p, workspace); });
  });
}

}  // namespace

const AttentionKernels attention = {workspace_bytes, forward};

}  // namespace onepass::ONEPASS_ISA
