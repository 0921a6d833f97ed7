#include "reparam.cuh"

#include "launch.cuh"

namespace onepass::cuda {

void reparam_forward(const Reparam& p, void* z, float* kl, double* partial, const Stream& stream) {
  with_device_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    launch_tiles(stream, p.rows, p.length, KL_TILE, sample<T, WARP>, sample<T, BLOCK>, p, static_cast<T*>(z), kl,
                 partial);
  });
  if (!kl || !partial) return;
  const int64_t tiles = (p.length + KL_TILE - 1) / KL_TILE;
  launch(stream, grid_size((p.rows + BLOCK - 1) / BLOCK), BLOCK, 0, add_partials, partial, p.rows, tiles, kl);
}

void reparam_backward(const Reparam& p, const RowsIn& grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar,
                      void* grad_noise, const Stream& stream) {
  with_device_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    launch_tiles(stream, p.rows, p.length, KL_TILE, sample_backward<T, WARP>, sample_backward<T, BLOCK>, p, grad_z,
                 grad_kl, static_cast<T*>(grad_mean), static_cast<T*>(grad_logvar), static_cast<T*>(grad_noise));
  });
}

}  // namespace onepass::cuda
