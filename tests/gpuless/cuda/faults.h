// What tests ask of the kernels in faults.cu.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace faults {

std::vector<std::string> names();

// The output of 128 threads on 1, 2, ..., 128, of the kernel as it should be or with its fault.
std::vector<float> run(const std::string& name, bool fault);

// Ten results a thread, one for each kind of shuffle and vote.
std::vector<int> call_warps(const std::vector<int>& in);

// Threads by index modulo 3, the largest index; and all of them in `sum`.
std::vector<int> count(unsigned blocks, unsigned threads, float& sum);

void narrow(const float* in, uint16_t* out, int64_t n, bool bf16);
void widen(const uint16_t* in, float* out, int64_t n, bool bf16);

}  // namespace faults
