// cp.async: data arrives at the wait that covers it, and not before.
#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace emulator {
namespace {

void arrive(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    std::memset(static_cast<char*>(c.to) + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
  }
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int valid, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async copies 4, 8 or 16 bytes, not " + std::to_string(bytes), site);
  if (valid < 0 || valid > bytes) fail("cp.async cannot read " + std::to_string(valid) + " bytes", site);
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<size_t>(bytes) != 0;
  };
  if (misaligned(to) || (valid && misaligned(from))) fail("misaligned cp.async", site);
  std::memset(to, POISON, static_cast<size_t>(bytes));
  machine.fibers[machine.current].open_copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Fiber& me = machine.fibers[machine.current];
  me.committed_copies.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void wait_copies(int newest_left) {
  Fiber& me = machine.fibers[machine.current];
  if (newest_left < 0) commit_copies();
  while (static_cast<int>(me.committed_copies.size()) > std::max(newest_left, 0)) {
    arrive(me.committed_copies.front());
    me.committed_copies.pop_front();
  }
}

}  // namespace emulator
