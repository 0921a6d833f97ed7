// Straight lines and great circles between vectors, and their gradients: what engine/reference/interpolate.py defines.
#pragma once
#include <cstdint>

#include "onepass/cuda.h"
#include "onepass/dtype.h"
#include "onepass/isa.h"
#include "onepass/rows.h"

namespace onepass {

struct Interpolate {
  int64_t rows, groups, length;  // `groups` vectors of `length` elements in a row share a weight
  DType dtype;
  RowsIn start, end, grad;  // a step from the first of a weight's vectors to the next weight's; grad null: forward
  float weight;
  const float* weights;  // null: `weight` counts
  int64_t weight_step;   // 0: all share one
  bool arc;              // a great circle, else a straight line
  int num_threads;

  ONEPASS_EVERYWHERE int64_t vectors() const { return rows * groups; }
  ONEPASS_EVERYWHERE float weight_of(int64_t vector) const {
    return weights ? weights[vector / groups * weight_step] : weight;
  }
  // Where a vector begins.
  ONEPASS_EVERYWHERE int64_t place(const RowsIn& x, int64_t vector) const {
    const int64_t row = vector / groups;
    return row * x.step + (vector - row * groups) * length;
  }
};

// What a vector's sums tell of a pair, in the order of its tiles: an arc needs the first three, backward the last two.
struct PairSums {
  double aa, bb, ab, ga, gb;
};

struct InterpolateGradOut {
  void *start, *end;  // as the operands, contiguous
  float* weights;     // as weights, or null
  double* vectors;    // where weights is wanted: a number for each vector
};

inline constexpr int64_t INTERPOLATE_TILE = 4096;  // elements of a vector that are summed together

// Bytes of `partial` for a call of the CPU's kernels that sums: a place for each tile of a vector that has several.
inline int64_t interpolate_workspace(const Interpolate& p) {
  const int64_t tiles = (p.length + INTERPOLATE_TILE - 1) / INTERPOLATE_TILE;
  return tiles > 1 ? tiles * static_cast<int64_t>(sizeof(PairSums)) : 0;
}

struct InterpolateKernels {
  // out contiguous; partial of interpolate_workspace.
  void (*forward)(const Interpolate&, void* out, PairSums* partial);
  void (*backward)(const Interpolate&, const InterpolateGradOut&, PairSums* partial);
};

ONEPASS_KERNELS(InterpolateKernels, interpolate)

namespace cuda {
int64_t interpolate_workspace(const Interpolate&);  // bytes of `partial`
void interpolate_forward(const Interpolate&, void* out, void* partial, const Stream&);
void interpolate_backward(const Interpolate&, const InterpolateGradOut&, void* partial, const Stream&);
}  // namespace cuda

}  // namespace onepass
