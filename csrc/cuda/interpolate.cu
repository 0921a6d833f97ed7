#include "interpolate.cuh"

#include "launch.cuh"

namespace onepass::cuda {
namespace {

template <class T, bool GRAD>
void path(const Interpolate& p, const InterpolateGradOut& out, void* partial, const Stream& stream) {
  const bool summed = p.arc || out.vectors;
  const int64_t vectors = p.vectors(), warps = SHORT_BLOCK / WARP;
  if (p.length <= SHORT_ROW)
    return launch(stream, grid_size((vectors + warps - 1) / warps), SHORT_BLOCK, 0, path_whole<T, GRAD, WARP>, vectors,
                  p, out, summed);
  if (p.length <= WHOLE_VECTOR)
    return launch(stream, grid_size(vectors), BLOCK, 0, path_whole<T, GRAD, BLOCK>, vectors, p, out, summed);
  int64_t count = 0;
  if (summed) {
    const int64_t tiles = (p.length + PATH_TILE - 1) / PATH_TILE, each = (tiles + MOST_PARTS - 1) / MOST_PARTS;
    count = (tiles + each - 1) / each;
    launch(stream, grid_size(vectors * count), BLOCK, 0, path_parts<T>, p, static_cast<Part*>(partial),
           each * PATH_TILE);
  }
  launch(stream, grid_size(vectors * ((p.length + PATH_TILE - 1) / PATH_TILE)), BLOCK, 0, path_tiles<T, GRAD>, p, out,
         static_cast<const Part*>(partial), count);
}

}  // namespace

int64_t interpolate_workspace(const Interpolate& p) {
  const int64_t tiles = p.length > WHOLE_VECTOR ? (p.length + PATH_TILE - 1) / PATH_TILE : 0;
  return p.vectors() * static_cast<int64_t>(sizeof(Part)) * (tiles < MOST_PARTS ? tiles : MOST_PARTS);
}

void interpolate_forward(const Interpolate& p, void* out, void* partial, const Stream& stream) {
  with_device_dtype(p.dtype,
                    [&](auto t) { path<decltype(t), false>(p, {out, nullptr, nullptr, nullptr}, partial, stream); });
}

void interpolate_backward(const Interpolate& p, const InterpolateGradOut& out, void* partial, const Stream& stream) {
  with_device_dtype(p.dtype, [&](auto t) { path<decltype(t), true>(p, out, partial, stream); });
  if (!out.weights) return;
  const int64_t shares = p.weight_step ? p.groups : p.vectors();
  launch(stream, grid_size(p.vectors() / shares), BLOCK, 0, sum_vectors, out, shares);
}

}  // namespace onepass::cuda
