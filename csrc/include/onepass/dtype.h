// Element types as they lie in memory. Arithmetic is in float32.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_EVERYWHERE __host__ __device__
#else
#define ONEPASS_EVERYWHERE
#endif

namespace onepass {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace onepass
