// Counter-based random numbers. The recipe is engine/reference/rng.py's, bit for bit.
#pragma once
#include <cstdint>

#include "onepass/cuda.h"
#include "onepass/dtype.h"
#include "onepass/isa.h"

namespace onepass {

// bits: the words themselves, 32 bits an element.
enum class Distribution : int { uniform = 0, normal, gumbel, exponential, laplace, logistic, bits };

// A row's key. Element i of the row is word i % 4 of Philox block `offset + i / 4`.
struct Key {
  uint64_t seed, stream, offset;
};

// A key for each row: a value, or values[row * step] (step 0 for one value shared by all rows).
struct KeyPart {
  int64_t value;
  const int64_t* values;  // null: `value` counts
  int64_t step;
  ONEPASS_EVERYWHERE uint64_t at(int64_t row) const {
    return static_cast<uint64_t>(values ? values[row * step] : value);
  }
};

struct Keys {
  KeyPart seed, stream, offset;
  ONEPASS_EVERYWHERE Key at(int64_t row) const { return {seed.at(row), stream.at(row), offset.at(row)}; }
};

struct RngKernels {
  // out[rows, length] contiguous.
  void (*fill)(Distribution, const Keys&, int64_t rows, int64_t length, DType, void* out, int num_threads);
};

ONEPASS_KERNELS(RngKernels, rng)

namespace cuda {
void rng_fill(Distribution, const Keys&, int64_t rows, int64_t length, DType, void* out, const Stream&);
}

}  // namespace onepass
