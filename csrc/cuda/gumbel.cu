#include "gumbel.cuh"

#include "launch.cuh"

namespace onepass::cuda {
namespace {

constexpr int64_t MOST_KEPT = 96 * 1024;  // bytes of shared memory: a block has them on every architecture
constexpr int64_t WIDE_ROW = 4096;        // elements from which a row takes a wide block

template <class T>
void softmax(const GumbelSoftmax& p, const Stream& stream) {
  const int64_t slots = (p.n + 3 + UNIT - 1) / UNIT * UNIT;  // a row begins up to 3 elements inside a block
  const int64_t kept = static_cast<int64_t>(sizeof(float)) * slots * (p.grad ? 2 : 1), warps = SHORT_BLOCK / WARP;
  const auto bytes = static_cast<size_t>(kept);
  if (p.n <= SHORT_ROW)
    launch(stream, grid_size((p.groups + warps - 1) / warps), SHORT_BLOCK, warps * bytes, gumbel_kept<T, WARP>,
           p.groups, p, slots);
  else if (kept > MOST_KEPT)
    launch(stream, grid_size(p.groups), WIDE_BLOCK, 0, gumbel_again<T>, p);
  else if (p.n < WIDE_ROW)
    launch(stream, grid_size(p.groups), BLOCK, bytes, gumbel_kept<T, BLOCK>, p.groups, p, slots);
  else
    launch(stream, grid_size(p.groups), WIDE_BLOCK, bytes, gumbel_kept<T, WIDE_BLOCK>, p.groups, p, slots);
}

}  // namespace

void gumbel_softmax(const GumbelSoftmax& p, const Stream& stream) {
  with_device_dtype(p.dtype, [&](auto t) { softmax<decltype(t)>(p, stream); });
}

}  // namespace onepass::cuda
