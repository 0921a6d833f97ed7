// Joins partial attention. Every output row is its own work: parts in ascending order, one that saw no key (lse -inf)
// is not read, and no row's bits depend on another's or on the thread count.
#include "onepass/attention_merge.h"

#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t CHANNELS = 256;  // of a row that are summed at a time
constexpr float EMPTY = -__builtin_inff();

float exp1(float x) { return exp(splat(x))[0]; }

// One row (b, i, h) of the result: where its parts lie and what they weigh.
struct Row {
  const Merge& p;
  int64_t at, h, lse_at;  // at: row of [B, S, H]; lse_at: of [B, H, S]
  const char* outs;
  const float* lses;
  float top, whole, sink;  // of exponentials less the largest: their sum, and what of it the sink holds

  Row(const Merge& call, int64_t index, int64_t bytes) : p(call), at(index), h(index % call.heads) {
    const int64_t i = at / p.heads % p.length, b = at / p.heads / p.length;
    lse_at = (b * p.heads + h) * p.length + i;
    outs = static_cast<const char*>(p.outs.data) + (b * p.outs.batch + i * p.outs.step + h * p.outs.head) * bytes;
    lses = p.lses + b * p.lse_batch + h * p.lse_head + i * p.lse_step;
    top = p.sinks ? p.sinks[h] : EMPTY;
    for (int64_t n = 0; n < p.parts; ++n) top = lses[n * p.lse_part] > top ? lses[n * p.lse_part] : top;
    double total = 0;
    for (int64_t n = 0; n < p.parts; ++n) total += weight(n);
    sink = p.sinks && top != EMPTY ? exp1(p.sinks[h] - top) : 0.0f;
    whole = static_cast<float>(total + sink);
  }

  // e^(lse_n - top): of no key 0.
  float weight(int64_t n) const { return lses[n * p.lse_part] == EMPTY ? 0.0f : exp1(lses[n * p.lse_part] - top); }
  bool none() const { return whole == 0; }
  template <class T>
  const T* part(int64_t n) const {
    return reinterpret_cast<const T*>(outs) + n * p.part;
  }
};

// body(row) for each row of the result, on threads that have at least so many numbers to read.
template <class T, class Body>
void each_row(const Merge& p, Body&& body) {
  const int64_t grain = 1 + 32768 / (1 + p.parts * p.dim);
  parallel_for(p.batch * p.length * p.heads, grain, p.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) body(Row(p, at, sizeof(T)));
  });
}

template <class T>
void forward_as(const Merge& p, T* out, float* lse) {
  each_row<T>(p, [&](const Row& row) {
    lse[row.lse_at] = row.none() ? EMPTY : row.top + static_cast<float>(__builtin_log(row.whole));
    const F32 whole = splat(row.none() ? 1.0f : row.whole);
    float total[CHANNELS];
    for (int64_t from = 0; from < p.dim; from += CHANNELS) {
      const int64_t count = p.dim - from < CHANNELS ? p.dim - from : CHANNELS;
      for (int64_t d = 0; d < count; d += W) store(total + d, F32{});
      for (int64_t n = 0; n < p.parts; ++n) {
        const float weight = row.weight(n);
        if (weight == 0) continue;
        const T* part = row.part<T>(n) + from;
        sweep(count,
              [&](int64_t d, int m) { store(total + d, fma(splat(weight), load_n(part + d, m), load(total + d))); });
      }
      T* target = out + row.at * p.dim + from;
      sweep(count, [&](int64_t d, int m) { store_n(target + d, load(total + d) / whole, m); });
    }
  });
}

// With w_n = e^(lse_n - lse) and s_n = dout . out_n: dout_n = w_n dout, dlse_n = w_n (s_n - sum_m w_m s_m + dlse). The
// result itself is not read: it was rounded.
template <class T>
void backward_as(const MergeBackward& p) {
  const Merge& f = p.forward;
  const int64_t rows = f.batch * f.length * f.heads;
  each_row<T>(f, [&](const Row& row) {
    const T* grad = static_cast<const T*>(p.grad_out) + row.at * f.dim;
    const float on_lse = p.grad_lse ? p.grad_lse[row.lse_at] : 0.0f, whole = row.none() ? 1.0f : row.whole;
    double mean = 0;
    for (int64_t n = 0; n < f.parts; ++n) {
      const float share = row.weight(n) / whole;
      T* target = static_cast<T*>(p.douts) + (n * rows + row.at) * f.dim;
      const T* part = row.part<T>(n);
      float inner = 0;
      for (int64_t from = 0; from < f.dim; from += CHANNELS) {
        F32 dot{};
        sweep(f.dim - from < CHANNELS ? f.dim - from : CHANNELS, [&](int64_t d, int m) {
          const F32 g = load_n(grad + from + d, m);
          if (share != 0) dot = fma(g, load_n(part + from + d, m), dot);
          store_n(target + from + d, share == 0 ? F32{} : splat(share) * g, m);
        });
        inner += sum(dot);
      }
      mean += static_cast<double>(share) * inner;
      p.dlses[n * rows + row.lse_at] = inner;
    }
    for (int64_t n = 0; n < f.parts; ++n) {
      const float share = row.weight(n) / whole;
      float& at = p.dlses[n * rows + row.lse_at];
      at = share == 0 ? 0.0f : share * static_cast<float>(at - mean + on_lse);
    }
    if (p.dsinks) p.dsinks[row.lse_at] = row.sink / whole * static_cast<float>(on_lse - mean);
  });
}

void forward(const Merge& p, void* out, float* lse) {
  with_dtype(p.dtype, [&](auto t) { forward_as(p, static_cast<decltype(t)*>(out), lse); });
}

void backward(const MergeBackward& p) {
  with_dtype(p.forward.dtype, [&](auto t) { backward_as<decltype(t)>(p); });
}

}  // namespace

const MergeKernels attention_merge = {forward, backward};

}  // namespace onepass::ONEPASS_ISA
