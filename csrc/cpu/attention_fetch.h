// Asking for memory ahead of its use. Included by csrc/cpu/attention_*.h.
#pragma once
#include <cstdint>

#include "vec.h"

namespace onepass::ONEPASS_ISA {
namespace {

// The cache lines of bytes [from, to) behind each of some pointers, to be asked for between other work: of a burst of
// them each waits for the others, and the loads of the work for them all.
struct Fetch {
  const char *const *next, *const *last;
  int64_t from, bytes;

  Fetch() : Fetch(nullptr, 0, 0, 0) {}
  Fetch(const char* const* pointers, int64_t count, int64_t from, int64_t to)
      : next(pointers), last(pointers + count), from(from), bytes(to - from) {}
};

// A line at a time, for work that memory bounds.
struct FetchLines : Fetch {
  using Fetch::Fetch;
  const char *at = nullptr, *end = nullptr;
};

// NEAR as __builtin_prefetch counts caches.
template <int NEAR>
OP_INLINE void fetch(FetchLines& f) {
  if (f.at >= f.end) {
    if (f.next == f.last) return;
    f.at = *f.next++ + f.from;
    f.end = f.at + f.bytes;
  }
  __builtin_prefetch(f.at, 0, NEAR);
  f.at += 64;
}

// All lines behind a pointer at once, the pointers in so many times, as evenly as it goes: fewer instructions.
struct FetchRows : Fetch {
  int64_t rows = 0, times = 1, due = 0;

  FetchRows() = default;
  FetchRows(const char* const* pointers, int64_t count, int64_t from, int64_t to, int64_t times)
      : Fetch(pointers, count, from, to), rows(count), times(times) {}
};

OP_INLINE void fetch(FetchRows& f) {
  for (f.due += f.rows; f.due >= f.times && f.next != f.last; f.due -= f.times) {
    const char* at = *f.next++ + f.from;
    for (int64_t i = 0; i < f.bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
  }
}

}  // namespace
}  // namespace onepass::ONEPASS_ISA
