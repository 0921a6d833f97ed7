// Straight lines and great circles between vectors, a vector by a warp, by a block, or in tiles by many. Bytes: both
// operands are read once and the path written once (12 an element in float32); backward reads the gradient too and
// writes two (20). A vector that bends is read twice, the second time from the caches; a long one in two launches, of
// sums of at most MOST_PARTS parts and of elements. Parts follow from the vector's length alone.
#pragma once
#include "device.cuh"
#include "onepass/great_circle.h"

namespace onepass::cuda {

inline constexpr int64_t WHOLE_VECTOR = 8192;  // elements of the longest vector that one block takes
inline constexpr int64_t PATH_TILE = 2048;     // elements of a longer one that a block writes
inline constexpr int MOST_PARTS = 256;         // of its sums, BLOCK of them at a time
static_assert(MOST_PARTS <= BLOCK);

// What a part of a vector adds to its sums, and its element of start that is smallest.
struct Part {
  PairSums sums;
  double least;
  int64_t axis;
};

// Elements that a thread takes at a time: half a pack of a half type, so that two operands stay in registers.
inline constexpr int PATH_UNIT = 4;

template <class T>
struct Operands {
  const T *a, *b, *g;
};

template <class T>
__device__ __forceinline__ Operands<T> operands(const Interpolate& p, int64_t vector) {
  return {static_cast<const T*>(p.start.data) + p.place(p.start, vector),
          static_cast<const T*>(p.end.data) + p.place(p.end, vector),
          p.grad.data ? static_cast<const T*>(p.grad.data) + p.place(p.grad, vector) : nullptr};
}

// body(i) for each unit of a thread in elements [begin, end).
template <int THREADS, class Body>
__device__ __forceinline__ void sweep(int64_t begin, int64_t end, Body&& body) {
  for (int64_t i = begin + place_in_group<THREADS>() * PATH_UNIT; i < end; i += THREADS * PATH_UNIT) body(i);
}

// Of all threads of a group, in every thread: the smaller, of equals the first.
template <int THREADS>
__device__ __forceinline__ void least_of_group(double& least, int64_t& axis) {
  const auto take = [&](double other, int64_t at) {
    if (other < least || (other == least && at < axis)) {
      least = other;
      axis = at;
    }
  };
#pragma unroll
  for (int bit = WARP / 2; bit; bit /= 2)
    take(__shfl_xor_sync(ALL_LANES, least, bit), __shfl_xor_sync(ALL_LANES, axis, bit));
  if constexpr (THREADS > WARP) {
    __shared__ double of_warps[THREADS / WARP];
    __shared__ int64_t axes[THREADS / WARP];
    __syncthreads();  // an earlier call's have been read
    if (threadIdx.x % WARP == 0) {
      of_warps[threadIdx.x / WARP] = least;
      axes[threadIdx.x / WARP] = axis;
    }
    __syncthreads();
    for (int warp = 0; warp < THREADS / WARP; ++warp) take(of_warps[warp], axes[warp]);
  }
}

template <int THREADS>
__device__ __forceinline__ Part sum_parts(Part part, bool arc, bool grad) {
  PairSums& s = part.sums;
  if (arc) {
    s.aa = group_sum<THREADS>(s.aa);
    s.bb = group_sum<THREADS>(s.bb);
    s.ab = group_sum<THREADS>(s.ab);
    least_of_group<THREADS>(part.least, part.axis);
  }
  if (grad) {
    s.ga = group_sum<THREADS>(s.ga);
    s.gb = group_sum<THREADS>(s.gb);
  }
  return part;
}

// The part of elements [begin, end), in every thread of the group.
template <class T, int THREADS>
__device__ __forceinline__ Part part_of(const Interpolate& p, const Operands<T>& x, int64_t begin, int64_t end) {
  Part own{{}, static_cast<double>(INFINITY), INT64_MAX};
  sweep<THREADS>(begin, end, [&](int64_t i) {
    float a[PATH_UNIT], b[PATH_UNIT], g[PATH_UNIT];
    load(x.a, i, end, a);
    load(x.b, i, end, b);
    if (x.g) load(x.g, i, end, g);
#pragma unroll
    for (int j = 0; j < PATH_UNIT; ++j) {
      const double wide_a = a[j], wide_b = b[j];
      if (p.arc) {
        own.sums.aa += wide_a * wide_a;
        own.sums.bb += wide_b * wide_b;
        own.sums.ab += wide_a * wide_b;
        const double size = fabsf(a[j]);
        if (i + j < end && size < own.least) {
          own.least = size;
          own.axis = i + j;
        }
      }
      if (x.g) {
        own.sums.ga += g[j] * wide_a;
        own.sums.gb += g[j] * wide_b;
      }
    }
  });
  return sum_parts<THREADS>(own, p.arc, x.g != nullptr);
}

// Elements [begin, end) of the path.
template <class T, int THREADS>
__device__ __forceinline__ void put_point(const Operands<T>& x, const Point& f, T* out, int64_t begin, int64_t end) {
  const bool near = fabsf(f.a) < 0.5f;  // a line goes from the end that is nearer, as torch.lerp's
  sweep<THREADS>(begin, end, [&](int64_t i) {
    float a[PATH_UNIT] = {}, b[PATH_UNIT] = {}, y[PATH_UNIT];
    if (f.blend != Blend::end) load(x.a, i, end, a);
    if (f.blend != Blend::start) load(x.b, i, end, b);
#pragma unroll
    for (int j = 0; j < PATH_UNIT; ++j) {
      if (f.blend == Blend::arc)
        y[j] = fmaf(f.a, a[j], fmaf(f.b, b[j], i + j == f.axis ? f.extra : 0.0f));
      else if (f.blend == Blend::line)
        y[j] = near ? fmaf(f.a, b[j] - a[j], a[j]) : fmaf(-f.b, b[j] - a[j], b[j]);
      else
        y[j] = f.blend == Blend::start ? a[j] : b[j];
    }
    store(out, i, end, y);
  });
}

template <class T, int THREADS>
__device__ __forceinline__ void put_pull(const Operands<T>& x, const Pull& f, T* start, T* end_grad, int64_t begin,
                                         int64_t end) {
  sweep<THREADS>(begin, end, [&](int64_t i) {
    float a[PATH_UNIT] = {}, b[PATH_UNIT] = {}, g[PATH_UNIT], on_a[PATH_UNIT], on_b[PATH_UNIT];
    load(x.g, i, end, g);
    if (!f.plain) {
      load(x.a, i, end, a);
      load(x.b, i, end, b);
    }
#pragma unroll
    for (int j = 0; j < PATH_UNIT; ++j) {
      on_a[j] = f.g_a == 0 && f.plain ? 0.0f : f.g_a * g[j];
      on_b[j] = f.g_b == 0 && f.plain ? 0.0f : f.g_b * g[j];
      if (f.plain) continue;
      on_a[j] = fmaf(f.a_a, a[j], fmaf(f.b_a, b[j], on_a[j])) + (i + j == f.axis ? f.extra : 0.0f);
      on_b[j] = fmaf(f.a_b, a[j], fmaf(f.b_b, b[j], on_b[j]));
    }
    store(start, i, end, on_a);
    store(end_grad, i, end, on_b);
  });
}

__device__ __forceinline__ Pair pair_at(const Interpolate& p, const Part& part) {
  return p.arc ? pair_of(part.sums) : Pair{};
}

template <class T>
__device__ __forceinline__ Point point_at(const Interpolate& p, const Operands<T>& x, const Part& part, float t) {
  const Pair pair = pair_at(p, part);
  const int64_t axis = pair.bend == Bend::half ? part.axis : -1;
  return point_of(pair, t, axis >= 0 ? widen(x.a[axis]) : 0.0, axis);
}

template <class T>
__device__ __forceinline__ Pull pull_at(const Interpolate& p, const Operands<T>& x, const Part& part, float t) {
  const Pair pair = pair_at(p, part);
  const int64_t axis = pair.bend == Bend::half ? part.axis : -1;
  return pull_of(pair, t, part.sums, axis >= 0 ? widen(x.a[axis]) : 0.0, axis >= 0 ? widen(x.g[axis]) : 0.0, axis);
}

// Elements [begin, end) of a vector's results, once its sums are known; `first`: this thread says what is the vector's.
template <class T, int THREADS, bool GRAD>
__device__ __forceinline__ void put(const Interpolate& p, const InterpolateGradOut& out, const Operands<T>& x,
                                    const Part& part, int64_t vector, int64_t begin, int64_t end, bool first) {
  const float t = p.weight_of(vector);
  T* start = static_cast<T*>(out.start) + vector * p.length;
  if constexpr (GRAD) {
    const Pull f = pull_at(p, x, part, t);
    put_pull<T, THREADS>(x, f, start, static_cast<T*>(out.end) + vector * p.length, begin, end);
    if (first && out.vectors) out.vectors[vector] = f.weight;
  } else {
    put_point<T, THREADS>(x, point_at(p, x, part, t), start, begin, end);
  }
}

// A whole vector by a group of threads. Forward's path is out.start.
template <class T, bool GRAD, int THREADS>
__global__ void __launch_bounds__(THREADS == WARP ? SHORT_BLOCK : BLOCK, 2)
    path_whole(int64_t vectors, Interpolate p, InterpolateGradOut out, bool summed) {
  const int64_t vector = group_index<THREADS>();
  if (vector >= vectors) return;
  const auto x = operands<T>(p, vector);
  Part part{{}, 0, -1};
  if (summed) part = part_of<T, THREADS>(p, x, 0, p.length);
  put<T, THREADS, GRAD>(p, out, x, part, vector, 0, p.length, place_in_group<THREADS>() == 0);
}

// A long vector's part of `span` elements by a block.
template <class T>
__global__ void __launch_bounds__(BLOCK, 2) path_parts(Interpolate p, Part* parts, int64_t span) {
  const Tile tile = tile_at(blockIdx.x, p.length, span);
  const Part part = part_of<T, BLOCK>(p, operands<T>(p, tile.row), tile.begin, tile.end);
  if (threadIdx.x == 0) parts[blockIdx.x] = part;
}

// A tile of a long vector by a block, which first joins the vector's `count` parts; 0: no sums are needed.
template <class T, bool GRAD>
__global__ void __launch_bounds__(BLOCK, 2)
    path_tiles(Interpolate p, InterpolateGradOut out, const Part* parts, int64_t count) {
  const Tile tile = tile_at(blockIdx.x, p.length, PATH_TILE);
  const auto x = operands<T>(p, tile.row);
  Part part{{}, static_cast<double>(INFINITY), INT64_MAX};
  if (count) {
    if (threadIdx.x < count) part = parts[tile.row * count + threadIdx.x];
    part = sum_parts<BLOCK>(part, p.arc, GRAD);
  }
  put<T, BLOCK, GRAD>(p, out, x, part, tile.row, tile.begin, tile.end, tile.begin == 0 && threadIdx.x == 0);
}

// What the `shares` vectors of one weight say of it, a block a weight, in an order that their number gives.
__global__ void __launch_bounds__(BLOCK, 2) sum_vectors(InterpolateGradOut out, int64_t shares) {
  const double* own = out.vectors + blockIdx.x * shares;
  double total = 0;
  for (int64_t i = threadIdx.x; i < shares; i += BLOCK) total += own[i];
  total = block_sum<BLOCK>(total);
  if (threadIdx.x == 0) out.weights[blockIdx.x] = static_cast<float>(total);
}

}  // namespace onepass::cuda
