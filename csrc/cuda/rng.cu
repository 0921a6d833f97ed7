#include "rng.cuh"

#include "launch.cuh"

namespace onepass::cuda {

void rng_fill(Distribution distribution, const Keys& keys, int64_t rows, int64_t length, DType dtype, void* out,
              const Stream& stream) {
  with_device_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch_tiles(stream, rows, length, DRAW_TILE, fill<T, WARP>, fill<T, BLOCK>, distribution, keys, length,
                 static_cast<T*>(out));
  });
}

}  // namespace onepass::cuda
