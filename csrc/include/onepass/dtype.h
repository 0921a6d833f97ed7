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

// Codes of a quantized cache: a value is code * scale.
struct I8 {
  int8_t bits;
};
struct E4M3 {
  uint8_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Codes : int { none = 0, i8 = 1, e4m3 = 2 };  // none: values as they are

}  // namespace onepass
