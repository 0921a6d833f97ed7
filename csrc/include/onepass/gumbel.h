// softmax((logits + Gumbel noise) / tau) of each group of n, and its gradient.
#pragma once
#include "onepass/rng.h"

namespace onepass {

struct GumbelSoftmax {
  int64_t groups, n, keyed;  // `keyed` groups in a row share a key and count their elements on
  DType dtype;
  const void *logits, *grad;  // [groups, n]; grad null: forward
  Keys keys;
  float tau;
  bool hard;
  void* out;       // as logits
  float* scratch;  // num_threads times n + GUMBEL_MARGIN
  int num_threads;
};

// What a draw may write beyond a row.
inline constexpr int64_t GUMBEL_MARGIN = 192;

struct GumbelKernels {
  void (*softmax)(const GumbelSoftmax&);
};

ONEPASS_KERNELS(GumbelKernels, gumbel)

namespace cuda {
void gumbel_softmax(const GumbelSoftmax&, const Stream&);  // takes no scratch
}

}  // namespace onepass
