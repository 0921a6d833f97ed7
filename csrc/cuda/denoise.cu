#include "denoise.cuh"

#include "launch.cuh"

namespace onepass::cuda {
namespace {

template <class T, class M>
void run(const Denoise& p, const Stream& stream) {
  launch_tiles(stream, p.batch, p.length, STEP_TILE, step<T, M, WARP>, step<T, M, BLOCK>, p);
}

}  // namespace

int64_t denoise_step(const Denoise& p, const Stream& stream) {
  if (!p.step.values && (p.step.value < 0 || p.step.value >= p.table.rows)) return p.batch ? 0 : -1;
  if (!p.batch || !p.length) return -1;
  with_device_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.dtype == p.model_dtype)
      run<T, T>(p, stream);
    else if (p.model_dtype == DType::bf16)
      run<float, __nv_bfloat16>(p, stream);
    else
      run<float, __half>(p, stream);
  });
  return -1;
}

}  // namespace onepass::cuda
