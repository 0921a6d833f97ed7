// One denoising step of a batch whose rows may be at different rows of a table of coefficients. The formula is
// engine/reference/denoise.py's.
#pragma once
#include "onepass/rng.h"
#include "onepass/rows.h"

namespace onepass {

inline constexpr int64_t MAX_HISTORY = 8;
inline constexpr uint64_t DENOISE_STREAM = uint64_t{2} << 56;

// Columns of the table; the coefficients of the history follow.
enum Column : int { COL_X, COL_M, COL_U, COL_Z, COL_P, COL_Q, COL_LIMIT, COL_SLOT, COL_NUMBER, COL_HISTORY };

struct Table {
  const double* data;  // [rows, COL_HISTORY + slots]
  int64_t rows, slots;
};

// Element i of row b has mask[b * step + i % period]: a byte (0 or not) or a float in [0, 1]. Null: not there.
struct Mask {
  const void* data;
  bool is_float;
  int64_t step, period;
};

// A number, or values[row * step].
struct Guidance {
  float value;
  const float* values;
  int64_t step;
  ONEPASS_EVERYWHERE float at(int64_t row) const { return values ? values[row * step] : value; }
};

struct Denoise {
  int64_t batch, length;
  DType dtype, model_dtype;                  // equal, or dtype is f32
  RowsIn sample, model, cond, noise, known;  // cond null: no guidance; noise null: normals where a row needs them
  Mask mask;
  Table table;
  KeyPart step;
  Guidance guidance;
  KeyPart seed;
  bool keys_per_row;  // false: the whole batch is one row of random numbers
  void* state;        // [batch, slots, length], null without history
  RowsOut out;        // may be the sample
  int num_threads;
};

struct DenoiseKernels {
  // -1, or the first row of the batch whose step is not in the table; then nothing has been written.
  int64_t (*step)(const Denoise&);
};

ONEPASS_KERNELS(DenoiseKernels, denoise)

namespace cuda {
// Steps on the device are not read here: a row whose step is not in the table is not written. The result is -1, or 0
// where the step is a number that is not in the table.
int64_t denoise_step(const Denoise&, const Stream&);
}  // namespace cuda

}  // namespace onepass
