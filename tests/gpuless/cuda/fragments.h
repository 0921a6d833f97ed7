#pragma once
#include <cstdint>

// d = a b, b as [n][k] unless transposed; on a device every pointer is its memory. The code of the launch.
extern "C" int multiply_fragments(const uint16_t* a, const uint16_t* b, float* d, bool bf16, bool transposed);
