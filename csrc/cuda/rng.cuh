// Random numbers in order. Bytes: each element is written once, with 16-byte stores where a row begins at a multiple.
#pragma once
#include "random.cuh"

namespace onepass::cuda {

inline constexpr int64_t DRAW_TILE = 4096;

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK)
    fill(int64_t groups, Distribution distribution, Keys keys, int64_t length, T* out) {
  const int64_t index = group_index<THREADS>();
  if (index >= groups) return;
  const Tile tile = tile_at(index, length, DRAW_TILE);
  const Key key = keys.at(tile.row);
  T* row = out + tile.row * length;
  for (int64_t i = tile.begin + place_in_group<THREADS>() * PACK<T>; i < tile.end; i += THREADS * PACK<T>) {
    float x[PACK<T>];
#pragma unroll
    for (int j = 0; j < PACK<T>; j += 4)
      draw(distribution, key, key.offset + static_cast<uint64_t>((i + j) / 4), x + j);
    store(row, i, tile.end, x);
  }
}

}  // namespace onepass::cuda
