// parallel_for: the only place where threads start. OpenMP (torch's own libgomp when both are loaded), or std::thread
// with ONEPASS_STD_THREADS for ThreadSanitizer.
#pragma once
#include <cstdint>

namespace onepass {

// Calls body(context, begin, end) on up to num_threads threads; the ranges tile [0, n) in steps of at least `grain`.
void run_ranges(int64_t n, int64_t grain, int num_threads, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace onepass
