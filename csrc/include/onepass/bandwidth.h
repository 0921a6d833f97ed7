// What memory can do: the loops that benchmarks are held against.
#pragma once
#include <cstdint>

#include "onepass/isa.h"

namespace onepass {

struct BandwidthKernels {
  // The exclusive or of all 32-bit words, so that every byte has to arrive. `bytes` is a multiple of 4.
  uint32_t (*read)(const void* source, int64_t bytes, int num_threads);
  // Copies past the caches where the instruction set can; source and target do not overlap.
  void (*copy)(const void* source, void* target, int64_t bytes, int num_threads);
};

ONEPASS_KERNELS(BandwidthKernels, bandwidth)

}  // namespace onepass
