// out = sum_n e^(lse_n - lse) out_n: attention over disjoint sets of keys joined into one; and its gradient.
#pragma once
#include "onepass/attention.h"

namespace onepass {

struct Merge {
  int64_t parts, batch, length, heads, dim;
  DType dtype;        // of outs and out
  Heads outs;         // of part 0
  int64_t part;       // elements from a part to the next
  const float* lses;  // of part 0
  int64_t lse_part, lse_batch, lse_head, lse_step;
  const float* sinks;  // [H], may be null
  int num_threads;
};

struct MergeBackward {
  Merge forward;
  const void* grad_out;   // [B, S, H, D]
  const float* grad_lse;  // [B, H, S], may be null
  void* douts;            // [N, B, S, H, D]
  float *dlses, *dsinks;  // [N, B, H, S]; [B, H, S] where there are sinks: of each row its own
};

struct MergeKernels {
  void (*forward)(const Merge&, void* out, float* lse);  // [B, S, H, D], [B, H, S]
  void (*backward)(const MergeBackward&);
};

ONEPASS_KERNELS(MergeKernels, attention_merge)

namespace cuda {
void merge_attention(const Merge&, void* out, float* lse, const Stream&);
void merge_attention_backward(const MergeBackward&, const Stream&);
}  // namespace cuda

}  // namespace onepass
