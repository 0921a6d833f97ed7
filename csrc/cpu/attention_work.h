// How attention's work is cut, by a row's own sizes alone, and the memory that a thread works in. Included by
// csrc/cpu/attention_*.h.
#pragma once
#include "onepass/attention.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

// Rows; lanes are rows only of more than FEW: of those that fill them, narrow ones one and a half times.
constexpr int64_t TALL = 96, SPLIT = 64, FEW = W == 16 ? W - 1 : 3 * W / 2;
// A thread walks the tokens with so many few rows of all heads, and so many bytes of their keys of a token,
constexpr int64_t STATES = 256, TOKEN_BYTES = 8 << 10;
// or, of up to so many rows, with so many heads.
constexpr int64_t SOME = 2 * W, HEADS = 4;
constexpr int KEYS = 64;  // of a tile
static_assert(TALL % W == 0 && KEYS % W == 0);
constexpr int64_t MAX_DIM = 256;
constexpr float EMPTY = -__builtin_inff();

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// A row of the batch: its sizes, how its work is cut, and where its parts begin.
struct Row {
  int64_t b, queries, keys, first, begin, end, rows, chunks, chunk, tiles;
  int64_t heads;  // of a unit: several where they interleave in memory

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
    // Partial results are written and read again: many of them are cut into fewer chunks. With eight heads four chunks
    // are still work for 32 threads.
    const int64_t pieces = most(p.kv_heads < 8 ? 8 : 4, least(32, 256 / most(1, rows * p.kv_heads)));
    chunk = split ? most(128, round_up((end - begin + pieces - 1) / pieces, KEYS)) : most(end - begin, 1);
    chunks = split ? most(1, (end - begin + chunk - 1) / chunk) : 1;
    const int64_t key_bytes = p.head_dim * (p.codes != Codes::none ? 1 : p.dtype == DType::f32 ? 4 : 2);
    heads = p.k.head >= p.k.step || p.v.head >= p.v.step ? 1
            : rows > FEW ? (rows <= SOME ? HEADS : 1)
                         : most(1, least(STATES / most(1, rows), TOKEN_BYTES / key_bytes));
    heads = least(heads, p.kv_heads);
    // Fewer of them where threads would have too little: no bit depends on that.
    while (heads > 1 && p.batch * chunks * p.kv_heads < 2 * heads * p.num_threads) heads = (heads + 1) / 2;
    tiles = split ? (rows ? 1 : 0) : (rows + TALL - 1) / TALL;
  }
  int64_t units(const Attention& p) const { return chunks * tiles * ((p.kv_heads + heads - 1) / heads); }
  int64_t parts(const Attention& p) const { return chunks > 1 ? chunks * p.kv_heads * rows : 0; }
  // The key that query i sits at.
  int64_t place(int64_t i) const { return keys - queries + i; }
};

// Steps between rows of the scratch arrays, in floats.
struct Sizes {
  int64_t q_step, c_step, state_rows, part;

  explicit Sizes(const Attention& p) {
    q_step = round_up(p.head_dim, 2 * W);
    c_step = round_up(p.value_dim, 2 * W);
    state_rows = most(HEADS * TALL, least(STATES, p.kv_heads * FEW));
    part = c_step + W;
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

// Where head 0 of a tile's keys is: each key and value, and with codes their scales.
struct Places {
  const char *key[KEYS], *value[KEYS];
  const float *key_scale[KEYS], *value_scale[KEYS];
};

// What a thread works in: the state of the rows at hand, a tile of keys.
struct Scratch {
  float *q, *c, *top, *total, *alpha, *scores, *keys, *values;
  float *key_scale, *value_scale;     // of the head at hand
  float *product_unit, *weight_unit;  // few rows: what 1 stands for, where products and weights are whole numbers
  Places *now, *then;                 // this tile and the next one

  // Of many rows: the same with the state of the unit's head `head`.
  Scratch of_head(int64_t head, const Sizes& s) const {
    Scratch other = *this;
    other.q += head * TALL * s.q_step;
    other.top += head * TALL;
    other.total += head * TALL;
    return other;
  }

  void advance() {
    Places* const next = then;
    then = now;
    now = next;
  }

  Scratch(Arena& arena, const Sizes& s) {
    q = arena.take<float>(s.state_rows * s.q_step);  // few rows: [row][word]; many: [word][row], TALL rows a head
    c = arena.take<float>(s.state_rows * s.c_step);
    top = arena.take<float>(s.state_rows);
    total = arena.take<float>(s.state_rows * W);  // few rows: W lanes each
    alpha = arena.take<float>(s.state_rows);
    scores = arena.take<float>(s.state_rows * KEYS);
    keys = arena.take<float>(s.q_step * KEYS);
    values = arena.take<float>(s.c_step * KEYS);
    key_scale = arena.take<float>(KEYS);
    value_scale = arena.take<float>(KEYS);
    product_unit = arena.take<float>(s.state_rows);
    weight_unit = arena.take<float>(s.state_rows);
    now = arena.take<Places>(1);
    then = arena.take<Places>(1);
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

// One unit of work: rows [from, to) of each head in [head, head_end) against keys [begin, end).
struct Unit {
  const Attention& p;
  const Row& row;
  int64_t head, head_end, from, to, begin, end, chunk;
  float* c;  // the sums of row r at c + r * c_step: in scratch, or where the partial result is to lie
  int64_t c_step;

  Unit of_head(int64_t one) const {
    Unit other = *this;
    other.c += (one - head) * (to - from) * c_step;
    other.head = one;
    other.head_end = one + 1;
    return other;
  }
};

// The keys and values that come next: of which head, null at the end.
struct Next {
  const Places* places;
  int64_t head;
};

// Keys [low, high) of the tile at `at`, `count` long, are those that query i may see.
struct Span {
  int low, high;
};

static inline Span span(const Attention& p, const Row& row, int64_t i, int64_t at, int count) {
  const int64_t place = row.place(i) - at;
  const int64_t low = p.window_left < 0 ? 0 : most(0, place - p.window_left);
  const int64_t high = p.window_right < 0 ? count : least(count, place + p.window_right + 1);
  return {static_cast<int>(least(low, count)), static_cast<int>(most(high, 0))};
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
