// z = mean + exp(logvar / 2) noise, with KL(N(mean, exp(logvar)) || N(0, 1)) of each row, and their gradients.
#pragma once
#include "onepass/rng.h"
#include "onepass/rows.h"

namespace onepass {

struct Reparam {
  int64_t rows, length;
  DType dtype;
  RowsIn mean, logvar, noise;  // noise null: normals from `keys`
  Keys keys;
  bool keys_per_row;  // false: the whole tensor is one row of random numbers
  int num_threads;
};

// Elements of a row that are summed together; a row has ceil(length / KL_TILE) partial sums. On a CPU a tile's noise
// and operands stay in the first-level cache.
inline constexpr int64_t KL_TILE = 1024;

struct ReparamKernels {
  // z [rows, length] contiguous. kl [rows] float32, or null. partial [rows, ceil(length / KL_TILE)] where kl is wanted
  // of rows longer than KL_TILE, else null.
  void (*forward)(const Reparam&, void* z, float* kl, double* partial);
  // grad_z as z or null; grad_kl [rows] or null. grad_noise null unless noise is given and its gradient is wanted.
  void (*backward)(const Reparam&, RowsIn grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar,
                   void* grad_noise);
};

ONEPASS_KERNELS(ReparamKernels, reparam)

namespace cuda {
inline constexpr int64_t KL_TILE = 4096;
void reparam_forward(const Reparam&, void* z, float* kl, double* partial, const Stream&);
void reparam_backward(const Reparam&, const RowsIn& grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar,
                      void* grad_noise, const Stream&);
}  // namespace cuda

}  // namespace onepass
