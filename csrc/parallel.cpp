#include "onepass/parallel.h"

#ifdef ONEPASS_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace onepass {

void run_ranges(int64_t n, int64_t grain, int num_threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  if (grain < 1) grain = 1;
  const int64_t useful = n / grain + (n % grain != 0);
  const int64_t team = num_threads < 1 ? 1 : (num_threads < useful ? num_threads : useful);
  if (team == 1) return body(context, 0, n);
  // The split is by count, so it depends on the thread count: a kernel must not let a result depend on its range.
  const auto range = [=](int64_t t) { return t * (n / team) + (t < n % team ? t : n % team); };
#ifdef ONEPASS_STD_THREADS
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < team; ++t) threads.emplace_back([=] { body(context, range(t), range(t + 1)); });
  for (auto& thread : threads) thread.join();
#else
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
  for (int64_t t = 0; t < team; ++t) body(context, range(t), range(t + 1));
#endif
}

}  // namespace onepass
