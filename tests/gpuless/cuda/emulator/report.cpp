// What went wrong, with kernel, block, threads and lines.
#include <cstring>
#include <stdexcept>

#include "machine.h"

namespace emulator {
namespace {

std::string doing(const Fiber& fiber) {
  if (fiber.state == State::done) return "ended";
  return std::string("wait in ") + fiber.name + " at " + text(fiber.site);
}

}  // namespace

std::string text(Shape s) {
  return "(" + std::to_string(s.x) + ", " + std::to_string(s.y) + ", " + std::to_string(s.z) + ")";
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string where() { return machine.kernel + " in block " + text(Shape{blockIdx.x, blockIdx.y, blockIdx.z}); }

std::string everyone() {
  std::string all;
  for (int t = 0; t < machine.threads;) {
    const std::string what = doing(machine.fibers[t]);
    int last = t;
    while (last + 1 < machine.threads && doing(machine.fibers[last + 1]) == what) ++last;
    all += (all.empty() ? "" : "; ") + std::string(last > t ? "threads " : "thread ") + std::to_string(t) +
           (last > t ? "-" + std::to_string(last) : "") + " " + what;
    t = last + 1;
  }
  return all;
}

void stop(const std::string& what) {
  acquire(&machine.stopped);
  throw std::runtime_error(where() + ": " + what);
}

void fail(const std::string& what, Site site) {
  machine.report =
      where() + ", thread " + text(Shape{threadIdx.x, threadIdx.y, threadIdx.z}) + ": " + what + " at " + text(site);
  if (machine.current < 0) {  // in a completed warp call: on the scheduler's stack
    acquire(&machine.stopped);
    throw std::runtime_error(machine.report);
  }
  machine.failed = true;
  to_scheduler(false);
  __builtin_trap();
}

}  // namespace emulator

// What -fsanitize=alignment,bounds calls: reports with block and thread, no library needed.

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};
struct Mismatch {
  Location location;
  void* type;
  unsigned char log_alignment, kind;
};
struct OutOfBounds {
  Location location;
};

emulator::Site site(const Location& l) { return {l.file, static_cast<int>(l.line)}; }

}  // namespace

extern "C" {
__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(Mismatch* m, uintptr_t pointer) {
  const auto alignment = uintptr_t{1} << m->log_alignment;
  if (!pointer) emulator::fail("null pointer", site(m->location));
  emulator::fail("misaligned access: address " + std::to_string(pointer % 4096) + " (mod 4096) is no multiple of " +
                     std::to_string(alignment),
                 site(m->location));
}
__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(OutOfBounds* o, uintptr_t index) {
  emulator::fail("index " + std::to_string(static_cast<intptr_t>(index)) + " is out of the array's bounds",
                 site(o->location));
}
}
