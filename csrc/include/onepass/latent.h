// Samples of a diagonal Gaussian with a KL divergence or importance weights, and their gradients: what
// engine/reference/latent.py defines.
#pragma once
#include "onepass/rng.h"

namespace onepass {

// Element i of segment s of row r lies at r * row + s * segment + i; null: not there.
struct Segments {
  const void* data;
  int64_t row, segment;
};
struct SegmentsOut {
  void* data;
  int64_t row, segment;
};

enum class LatentTerms : int { none = 0, row, element, weights };

struct Latent {
  int64_t rows, segments, run;  // a row is `segments` segments of `run` elements
  DType dtype;
  Segments mean, logvar, prior_mean, prior_logvar, noise;  // prior null: the standard normal. noise null: drawn
  int64_t noise_draw;                                      // elements from one given draw to the next
  Keys keys;
  bool keys_per_row;  // false: the whole tensor is one row of random numbers
  float clamp_low, clamp_high;
  int64_t samples;  // at least 1
  bool antithetic;
  LatentTerms terms;
  float beta, free_bits;
  int num_threads;

  ONEPASS_EVERYWHERE int64_t length() const { return segments * run; }
};

// Blocks of random numbers between one draw and the next.
inline constexpr uint64_t LATENT_DRAW = uint64_t{1} << 40;
// Elements of a row that are summed together; a longer row has ceil(length / LATENT_TILE) partial sums.
inline constexpr int64_t LATENT_TILE = 1024;

struct LatentOut {
  void* z;          // [samples, rows, length]
  float* first;     // KL [rows] or [rows, length], log q [samples, rows], or null
  float* second;    // log p [samples, rows], or null
  double* partial;  // where rows are summed and longer than LATENT_TILE: a number for each tile, first and second
};

struct LatentGradIn {
  Segments z;  // or null
  int64_t z_sample;
  const float *first, *second;  // as in LatentOut, or null
};

struct LatentGradOut {
  SegmentsOut mean, logvar, prior_mean, prior_logvar;  // the prior's may be null
  void* noise;                                         // [draws, rows, length], or null
};

struct LatentKernels {
  void (*forward)(const Latent&, const LatentOut&);
  void (*backward)(const Latent&, const LatentGradIn&, const LatentGradOut&);
};

ONEPASS_KERNELS(LatentKernels, latent)

namespace cuda {
void latent_forward(const Latent&, const LatentOut&, const Stream&);
void latent_backward(const Latent&, const LatentGradIn&, const LatentGradOut&, const Stream&);
}  // namespace cuda

}  // namespace onepass
