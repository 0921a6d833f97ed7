// Calls in which a thread waits for others: warp-wide ones and barriers; and how they order memory for ThreadSanitizer.
#include <algorithm>
#include <cstring>

#include "machine.h"
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {
namespace {

// What lanes hand to one another is the emulator's own memory: ThreadSanitizer looks away.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#endif
};

}  // namespace

bool release_warp(int warp) {
  const int begin = warp * WARP, end = std::min(begin + WARP, machine.threads);
  bool released = false;
  for (int first = begin; first < end; ++first) {
    const Fiber& caller = machine.fibers[first];
    if (caller.state != State::in_warp_call) continue;
    const uint32_t mask = caller.mask;
    const int lanes = end - begin;
    if (lanes < WARP && mask >> lanes && mask != ~0u)  // a full mask stands for every lane there is
      stop(std::string(caller.name) + " at " + text(caller.site) + " names lanes beyond the block's last thread");
    bool all_here = true;
    void* operands[WARP] = {};
    for (int t = begin; t < end; ++t) {
      if (!(mask >> (t - begin) & 1)) continue;
      const Fiber& other = machine.fibers[t];
      if (other.state == State::done)
        stop("thread " + std::to_string(t) + " ended, but " + caller.name + " at " + text(caller.site) +
             " names it in its mask");
      if (other.state != State::in_warp_call) {
        all_here = false;
        break;
      }
      if (other.mask != mask || std::strcmp(other.name, caller.name) != 0)
        stop("threads " + std::to_string(first) + " and " + std::to_string(t) +
             " of a warp meet in different calls: " + caller.name + " at " + text(caller.site) + " and " + other.name +
             " at " + text(other.site) + ", or with different masks");
      operands[t - begin] = other.operand;
    }
    if (!all_here) continue;
    {
      [[maybe_unused]] const Unwatched unwatched;
      caller.complete(operands, mask, caller.site);
    }
    machine.warp_turn[warp] ^= 1;
    for (int t = begin; t < end; ++t)
      if (operands[t - begin]) machine.fibers[t].state = State::ready;
    released = true;
  }
  return released;
}

bool release_barriers() {
  bool released = false;
  for (int id = 0; id < BARRIERS; ++id) {
    int count = machine.arrived[id], expected = 0;
    const Fiber* first = nullptr;
    for (int t = 0; t < machine.threads; ++t) {
      const Fiber& fiber = machine.fibers[t];
      if (fiber.state != State::at_barrier || fiber.barrier_id != id) continue;
      if (!first) first = &fiber;
      expected = fiber.barrier_count;
      ++count;
      if (fiber.barrier_count != first->barrier_count || std::strcmp(fiber.name, first->name) != 0)
        stop("barrier " + std::to_string(id) + " is used in two ways at once: " + everyone());
    }
    if (!first || count < expected) continue;
    if (count > expected) stop("barrier " + std::to_string(id) + " has more threads than it counts: " + everyone());
    for (int t = 0; t < machine.threads; ++t) {
      Fiber& fiber = machine.fibers[t];
      if (fiber.state != State::at_barrier || fiber.barrier_id != id) continue;
      // Undefined on a device as soon as one warp takes both branches; never intended.
      if (expected == machine.threads && (fiber.site.line != first->site.line || fiber.site.file != first->site.file))
        stop("divergent barrier: " + everyone());
      fiber.state = State::ready;
    }
    machine.arrived[id] = 0;
    machine.barrier_turn[id] ^= 1;
    released = true;
  }
  return released;
}

void warp_call(const char* name, uint32_t mask, void* operand, void (*complete)(void* const*, uint32_t, Site),
               Site site) {
  Fiber& me = machine.fibers[machine.current];
  if (!(mask >> lane() & 1))
    fail(std::string(name) + " is called by lane " + std::to_string(lane()) + ", which its mask leaves out,", site);
  me.state = State::in_warp_call;
  me.name = name;
  me.site = site;
  me.mask = mask;
  me.operand = operand;
  me.complete = complete;
  to_scheduler(false);
}

void barrier(const char* name, int id, int count, bool arrives, Site site) {
  if (id < 0 || id >= BARRIERS) fail("barrier " + std::to_string(id) + " does not exist (there are 16),", site);
  if (count % WARP != 0) fail("a barrier counts whole warps, not " + std::to_string(count) + " threads,", site);
  char* token = &machine.barrier_tokens[id][machine.barrier_turn[id]];
  release(token);
  if (arrives) {
    ++machine.arrived[id];
    return;
  }
  Fiber& me = machine.fibers[machine.current];
  me.state = State::at_barrier;
  me.name = name;
  me.site = site;
  me.barrier_id = id;
  me.barrier_count = count ? count : machine.threads;
  to_scheduler(false);
  acquire(token);
}

void acquire([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(token);
#endif
}

void release([[maybe_unused]] void* token) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(token);
#endif
}

void* warp_token() {
  const int warp = machine.current / WARP;
  return &machine.warp_tokens[warp][machine.warp_turn[warp]];
}

}  // namespace emulator
