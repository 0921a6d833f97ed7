// Rotary position embedding of one head's channels. Included by csrc/cpu/attention.cpp and kvcache.cpp.
#pragma once
#include "onepass/attention.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

// y = x [dim] in float32, its first 2 * half channels turned by the angles of `position`.
template <class T>
static void rotate(const Rotary& rotary, int64_t position, const T* x, float* y, int64_t dim) {
  for (int64_t d = 0; d < dim; d += W) store(y + d, load_n(x + d, static_cast<int>(dim - d)));
  if (!rotary.cos) return;
  const float *cos = rotary.cos + position * rotary.half, *sin = rotary.sin + position * rotary.half;
  const int64_t step = rotary.interleaved ? 2 : 1, mate = rotary.interleaved ? 1 : rotary.half;
  for (int64_t i = 0; i < rotary.half; ++i) {
    float *a = y + i * step, *b = a + mate;
    const float turned = *a * cos[i] - *b * sin[i];
    *b = *b * cos[i] + *a * sin[i];
    *a = turned;
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
