// The Gumbel softmax, a row at a time. Bytes: logits are read once and the sample written once (8 an element in
// float32; backward reads the gradient too, 12); the noise and the sum live in a row of scratch in the caches.
#include "onepass/gumbel.h"

#include "random.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

static_assert(2 * DRAW + W <= GUMBEL_MARGIN);

// The soft sample of a row, in scratch.
template <class T>
float* soften(const GumbelSoftmax& p, int64_t group, float* scratch) {
  const T* logits = static_cast<const T*>(p.logits) + group * p.n;
  const int64_t row = group / p.keyed, start = (group - row * p.keyed) * p.n;
  float* x = const_cast<float*>(draw_elements<Distribution::gumbel>(p.keys.at(row), start, p.n, scratch));
  F32 largest = splat(-__builtin_inff());
  sweep(p.n, [&](int64_t i, int n) {
    const F32 y = (load_n(logits + i, n) + load(x + i)) / p.tau;
    store_n(x + i, y, n);
    largest = max(largest, n < W ? ((I32)iota() < n ? y : largest) : y);
  });
  const F32 top = splat(max_lane(largest));
  F32 total{};
  sweep(p.n, [&](int64_t i, int n) {
    const F32 e = exp(load_n(x + i, n) - top);
    store_n(x + i, e, n);
    total += (I32)iota() < n ? e : F32{};
  });
  const float factor = 1.0f / sum(total);
  sweep(p.n, [&](int64_t i, int n) { store_n(x + i, load_n(x + i, n) * factor, n); });
  return x;
}

int64_t first_largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i)
    if (x[i] > x[best] || (x[i] != x[i] && x[best] == x[best])) best = i;  // a NaN is the largest, as in argmax
  return best;
}

template <class T>
void sample(const GumbelSoftmax& p, int64_t group, const float* soft) {
  T* out = static_cast<T*>(p.out) + group * p.n;
  if (!p.hard) return sweep(p.n, [&](int64_t i, int n) { store_n(out + i, load_n(soft + i, n), n); });
  sweep(p.n, [&](int64_t i, int n) { store_n(out + i, F32{}, n); });
  store_n(out + first_largest(soft, p.n), splat(1.0f), 1);
}

template <class T>
void differentiate(const GumbelSoftmax& p, int64_t group, const float* soft) {
  const T* grad = static_cast<const T*>(p.grad) + group * p.n;
  T* out = static_cast<T*>(p.out) + group * p.n;
  F32 dot{};
  sweep(p.n, [&](int64_t i, int n) { dot = fma(load_n(grad + i, n), load_n(soft + i, n), dot); });
  const F32 mean = splat(sum(dot));
  sweep(p.n,
        [&](int64_t i, int n) { store_n(out + i, load_n(soft + i, n) * (load_n(grad + i, n) - mean) / p.tau, n); });
}

template <class T>
void softmax_as(const GumbelSoftmax& p) {
  // A task is a thread: each has its own row of scratch.
  parallel_for(p.num_threads, 1, p.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      float* scratch = p.scratch + thread * (p.n + GUMBEL_MARGIN);
      const int64_t end = p.groups * (thread + 1) / p.num_threads;
      for (int64_t group = p.groups * thread / p.num_threads; group < end; ++group) {
        const float* soft = soften<T>(p, group, scratch);
        p.grad ? differentiate<T>(p, group, soft) : sample<T>(p, group, soft);
      }
    }
  });
}

void softmax(const GumbelSoftmax& p) {
  with_dtype(p.dtype, [&](auto t) { softmax_as<decltype(t)>(p); });
}

}  // namespace

const GumbelKernels gumbel = {softmax};

}  // namespace onepass::ONEPASS_ISA
