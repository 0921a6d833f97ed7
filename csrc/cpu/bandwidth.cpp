// Read and copy as fast as memory allows. A read keeps eight vectors in flight and folds them into one word; a copy
// stores past the caches, which saves fetching the target's lines first: 2 bytes moved for each byte copied, not 3.
#include "onepass/bandwidth.h"

#include "range.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t STEP = 8 * W;  // words
constexpr int64_t GRAIN = int64_t{1} << 16;

OP_INLINE U32 words(const uint32_t* p) {
  U32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

OP_INLINE void stream(uint32_t* p, U32 v) {  // p is aligned to the vector
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

uint32_t read_range(const uint32_t* p, int64_t n) {
  U32 sum[8] = {};
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP)
    for (int j = 0; j < 8; ++j) sum[j] ^= words(p + i + j * W);
  uint32_t total = 0;
  for (; i < n; ++i) total ^= p[i];
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < W; ++lane) total ^= sum[j][lane];
  return total;
}

uint32_t read(const void* source, int64_t bytes, int num_threads) {
  const auto* p = static_cast<const uint32_t*>(source);
  uint32_t total = 0;
  parallel_for(bytes / 4, GRAIN, num_threads, [&](int64_t begin, int64_t end) {
    __atomic_fetch_xor(&total, read_range(p + begin, end - begin), __ATOMIC_RELAXED);
  });
  return total;
}

void copy_range(const char* from, char* to, int64_t n) {
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % sizeof(U32));
  int64_t i = misaligned ? static_cast<int64_t>(sizeof(U32)) - misaligned : 0;
  if (i > n) i = n;
  std::memcpy(to, from, static_cast<size_t>(i));
  constexpr int64_t step = 4 * STEP;
  for (; i + step <= n; i += step) {
    U32 v[8];
    std::memcpy(v, from + i, sizeof v);
    for (int j = 0; j < 8; ++j) stream(reinterpret_cast<uint32_t*>(to + i) + j * W, v[j]);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i));
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores are ordered with nothing else
#endif
}

void copy(const void* source, void* target, int64_t bytes, int num_threads) {
  parallel_for(bytes, 4 * GRAIN, num_threads, [&](int64_t begin, int64_t end) {
    copy_range(static_cast<const char*>(source) + begin, static_cast<char*>(target) + begin, end - begin);
  });
}

}  // namespace

const BandwidthKernels bandwidth = {read, copy};

}  // namespace onepass::ONEPASS_ISA
