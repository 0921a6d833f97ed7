// Emission-absorption compositing of the samples along rays, and its gradients; engine/reference/volrend.py defines it.
#pragma once
#include <cstdint>

#include "onepass/cuda.h"
#include "onepass/dtype.h"
#include "onepass/isa.h"

namespace onepass {

// One value (or n_channels of them) a sample, with unit stride inside a ray. Dense: ray r starts at data + r * step
// elements; packed: at data + ray_offsets[r] (times n_channels). Null: not there.
struct Samples {
  const void* data;
  int64_t step;
  DType dtype;
};

enum class Depth : int { expected = 0, normalized = 1, median = 2 };

struct Composite {
  int64_t n_rays, n_samples, n_channels;  // n_samples: of each ray, or of the longest where packed
  const int64_t* ray_offsets;             // [n_rays + 1], checked; null: dense
  Samples sigmas, alphas;                 // one of them; the other is null, of the same dtype
  Samples features, t_starts, t_ends;
  const float* background;  // row r at background + r * background_step; null: none
  int64_t background_step;
  const float* prefix_trans;  // [n_rays]; null: ones
  float early_stop_eps;
  Depth depth;
  int num_threads, tasks;  // tasks: rays are split into so many ranges, each with its own scratch
  float* scratch;          // tasks * composite_scratch(n_samples) floats
};

// Contiguous, in the dtype of features (features), t_starts (depth, distortion), sigmas or alphas (the others).
struct CompositeOut {
  void *features, *depth, *opacity, *weights, *distortion;
};  // the last two may be null

// What comes from behind: [n_rays, ...] in float32, contiguous, or null for zeros.
struct CompositeGradIn {
  const float *features, *depth, *opacity, *distortion;
  Samples weights;
};

// Contiguous, in the dtype of what each belongs to; background and prefix_trans in float32. Null: not wanted.
// `left` [n_rays] receives the transmittance behind each ray.
struct CompositeGradOut {
  void *sigmas, *features, *t_starts, *t_ends, *alphas;
  float *background, *prefix_trans, *left;
};

constexpr int64_t composite_scratch(int64_t longest) { return 6 * (longest + 64); }

struct CompositeKernels {
  void (*forward)(const Composite&, const CompositeOut&);
  void (*backward)(const Composite&, const CompositeGradIn&, const CompositeGradOut&);
};

ONEPASS_KERNELS(CompositeKernels, composite)

// On a device ray_offsets are not read by the host: packed, n_samples is that of all rays together; a ray whose offsets
// do not ascend inside them is not written. tasks is not read; scratch has composite_scratch floats.
namespace cuda {
int64_t composite_scratch(int64_t samples, int64_t n_rays, int64_t n_channels, bool backward);
void composite_forward(const Composite&, const CompositeOut&, const Stream&);
void composite_backward(const Composite&, const CompositeGradIn&, const CompositeGradOut&, const Stream&);
}  // namespace cuda

}  // namespace onepass
