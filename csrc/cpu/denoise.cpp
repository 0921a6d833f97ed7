// A denoising step in one pass. Bytes: sample, model output and result (12 an element in float32), 4 more with guidance
// or given noise and 8 with history. Drawn noise and the mask go through a tile in the first-level cache.
#include "onepass/denoise.h"

#include "random.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TILE = 2048;
constexpr int64_t GRAIN = 8192;  // elements below which a thread is not worth its start

struct Task {
  int64_t row, begin, count;
};

// What the loop needs of a row of the table, in float32.
struct Coefficients {
  float x, m, u, z, p, q, limit;
  int slot;   // of the history that takes u, or -1
  int terms;  // slots whose coefficient is not 0
  int slots[MAX_HISTORY];
  float history[MAX_HISTORY];
  uint64_t stream;

  Coefficients(const Table& table, int64_t at) {
    const double* c = table.data + at * (COL_HISTORY + table.slots);
    x = static_cast<float>(c[COL_X]);
    m = static_cast<float>(c[COL_M]);
    u = static_cast<float>(c[COL_U]);
    z = static_cast<float>(c[COL_Z]);
    p = static_cast<float>(c[COL_P]);
    q = static_cast<float>(c[COL_Q]);
    limit = static_cast<float>(c[COL_LIMIT]);
    slot = static_cast<int>(c[COL_SLOT]);
    stream = DENOISE_STREAM + static_cast<uint64_t>(c[COL_NUMBER]);
    terms = 0;
    for (int64_t j = 0; j < table.slots && j < MAX_HISTORY; ++j) {
      if (c[COL_HISTORY + j] == 0) continue;
      slots[terms] = static_cast<int>(j);
      history[terms++] = static_cast<float>(c[COL_HISTORY + j]);
    }
  }

  bool remembers() const { return u != 0 || slot >= 0; }
  bool plain() const { return x != 0 && m != 0 && z == 0 && !remembers() && terms == 0; }
  bool clamped() const { return u != 0 && p != 0 && q != 0 && z == 0 && slot < 0 && terms == 0; }
};

template <class T>
const T* at(const RowsIn& rows, const Task& t) {
  return rows.data ? static_cast<const T*>(rows.data) + t.row * rows.step + t.begin : nullptr;
}

// The model's output, with guidance folded in. Only the operands that count are read.
template <class M>
struct Model {
  const M *uncond, *cond;
  F32 guidance;

  Model(const Denoise& p, const Task& t) : uncond(at<M>(p.model, t)), cond(at<M>(p.cond, t)), guidance{} {
    if (!cond) return;
    const float g = p.guidance.at(t.row);
    if (g == 1) uncond = cond;
    if (g == 0 || g == 1) cond = nullptr;
    guidance = splat(g);
  }

  template <bool GUIDED>
  F32 load(int64_t i, int n) const {
    const F32 u = load_n(uncond + i, n);
    if constexpr (GUIDED) return fma(guidance, load_n(cond + i, n) - u, u);
    return u;
  }
};

// Normals of a task. With one key for the whole batch a row may begin inside a block of four. Meanwhile the memory
// brings what the step reads with them.
template <class T, class M>
const float* draw_noise(const Denoise& p, const Task& t, uint64_t stream, const Model<M>& model, const T* out,
                        float* drawn) {
  const Key key{p.seed.at(p.keys_per_row ? t.row : 0), stream, 0};
  const int64_t start = (p.keys_per_row ? 0 : t.row * p.length) + t.begin;
  const T* sample = at<T>(p.sample, t);
  const bool far = is_far<T>(p.batch * p.length);
  return draw_elements<Distribution::normal>(key, start, t.count, drawn, [&](int64_t i, int64_t n) {
    if (!far) return;
    fetch(sample, i, n);
    fetch(model.uncond, i, n);
    if (model.cond) fetch(model.cond, i, n);
    fetch(out, i, n);
  });
}

// The mask of a task as floats.
void unpack_mask(const Mask& mask, const Task& t, float* weights) {
  const int64_t row = t.row * mask.step;
  int64_t from = t.begin % mask.period;
  for (int64_t i = 0; i < t.count;) {
    const int64_t left = mask.period - from, run = left < t.count - i ? left : t.count - i;
    if (mask.is_float) {
      const float* source = static_cast<const float*>(mask.data) + row + from;
      for (int64_t j = 0; j < run; ++j) weights[i + j] = source[j];
    } else {
      const uint8_t* source = static_cast<const uint8_t*>(mask.data) + row + from;
      for (int64_t j = 0; j < run; ++j) weights[i + j] = source[j] ? 1.0f : 0.0f;
    }
    i += run;
    from = 0;
  }
}

// X x + M m: DDIM, Euler and flow matching without a clamp, and most rows of the others.
template <bool GUIDED, class T, class M>
void plain_task(const Denoise& p, const Task& t, const Coefficients& c, const Model<M>& model, T* out) {
  const T* sample = at<T>(p.sample, t);
  const F32 cx = splat(c.x), cm = splat(c.m);
  sweep(t.count, [&](int64_t i, int n) {
    store_n(out + i, fma(cm, model.template load<GUIDED>(i, n), cx * load_n(sample + i, n)), n);
  });
}

// X x + M m + U u with u clamped: DDIM and its kin. The bits of full_task, in a loop that reads no coefficient again:
// on Intel's cores that took 1.3 times as long from the last cache.
template <bool GUIDED, class T, class M>
void clamped_task(const Denoise& p, const Task& t, const Coefficients& c, const Model<M>& model, T* out) {
  const T* sample = at<T>(p.sample, t);
  const F32 cx = splat(c.x), cm = splat(c.m), cu = splat(c.u), cp = splat(c.p), cq = splat(c.q);
  const F32 high = splat(c.limit), low = -high;
  const bool has_x = c.x != 0, has_m = c.m != 0;  // else no operand of theirs may count, an Inf or NaN neither
  sweep(t.count, [&](int64_t i, int n) {
    const F32 x = load_n(sample + i, n), m = model.template load<GUIDED>(i, n);
    F32 prev = has_x ? cx * x : F32{};
    if (has_m) prev = fma(cm, m, prev);
    store_n(out + i, fma(cu, min(high, max(low, fma(cq, m, cp * x))), prev), n);
  });
}

template <bool GUIDED, class T, class M>
void full_task(const Denoise& p, const Task& t, const Coefficients& c, const Model<M>& model, T* out) {
  alignas(64) float drawn[TILE + 2 * DRAW], weights[TILE + W];
  const T *sample = at<T>(p.sample, t), *known = at<T>(p.known, t), *given = at<T>(p.noise, t);
  const float* noise = c.z != 0 && !given ? draw_noise(p, t, c.stream, model, out, drawn) : nullptr;
  if (p.mask.data) unpack_mask(p.mask, t, weights);
  T* state = p.state ? static_cast<T*>(p.state) + t.row * p.table.slots * p.length + t.begin : nullptr;
  const bool u_counts = c.remembers();
  const bool reads_x = c.x != 0 || (u_counts && c.p != 0), reads_m = c.m != 0 || (u_counts && c.q != 0);
  sweep(t.count, [&](int64_t i, int n) {
    const F32 x = reads_x ? load_n(sample + i, n) : F32{};
    const F32 m = reads_m ? model.template load<GUIDED>(i, n) : F32{};
    F32 prev = c.x != 0 ? c.x * x : F32{};
    if (c.m != 0) prev = fma(splat(c.m), m, prev);
    F32 u{};
    if (u_counts) {
      if (c.p != 0) u = c.p * x;
      if (c.q != 0) u = fma(splat(c.q), m, u);
      u = min(splat(c.limit), max(splat(-c.limit), u));  // this order keeps NaN
      if (c.u != 0) prev = fma(splat(c.u), u, prev);
    }
    if (c.z != 0) prev = fma(splat(c.z), given ? load_n(given + i, n) : load(noise + i), prev);
    for (int j = 0; j < c.terms; ++j)
      prev = fma(splat(c.history[j]), load_n(state + c.slots[j] * p.length + i, n), prev);
    if (c.slot >= 0) store_n(state + c.slot * p.length + i, u, n);
    if (p.mask.data) {
      const F32 weight = load(weights + i), old = load_n(known + i, n);
      const F32 mixed = fma(weight, prev - old, old);
      prev = weight == 0.0f ? old : (weight == 1.0f ? prev : mixed);
    }
    store_n(out + i, prev, n);
  });
}

template <class T, class M>
void run_task(const Denoise& p, const Task& t) {
  const Coefficients c(p.table, p.step.values ? p.step.values[t.row * p.step.step] : p.step.value);
  const Model<M> model(p, t);
  T* out = static_cast<T*>(p.out.data) + t.row * p.out.step + t.begin;
  if (c.plain() && !p.mask.data)
    model.cond ? plain_task<true>(p, t, c, model, out) : plain_task<false>(p, t, c, model, out);
  else if (c.clamped() && !p.mask.data)
    model.cond ? clamped_task<true>(p, t, c, model, out) : clamped_task<false>(p, t, c, model, out);
  else
    model.cond ? full_task<true>(p, t, c, model, out) : full_task<false>(p, t, c, model, out);
}

template <class T, class M>
void run(const Denoise& p) {
  const int64_t tiles = (p.length + TILE - 1) / TILE;
  const int64_t size = p.length < TILE ? p.length : TILE;
  parallel_for(p.batch * tiles, GRAIN / size, p.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % tiles * TILE, rest = p.length - begin;
      run_task<T, M>(p, Task{task / tiles, begin, rest < TILE ? rest : TILE});
    }
  });
}

int64_t step(const Denoise& p) {
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t at = static_cast<int64_t>(p.step.at(row));
    if (at < 0 || at >= p.table.rows) return row;
  }
  if (!p.length) return -1;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.dtype == p.model_dtype)
      run<T, T>(p);
    else if (p.model_dtype == DType::bf16)
      run<float, BF16>(p);
    else
      run<float, F16>(p);
  });
  return -1;
}

}  // namespace

const DenoiseKernels denoise = {step};

}  // namespace onepass::ONEPASS_ISA
