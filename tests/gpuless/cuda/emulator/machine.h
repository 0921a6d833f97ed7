// What the parts of the emulator share: the threads of the block that runs, as fibers, and how each of them waits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

inline constexpr int BARRIERS = 16;
inline constexpr int POISON = 0xFF;  // a NaN in every float format

enum class State { ready, in_warp_call, at_barrier, done };

#if defined(__x86_64__)
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  Context context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;    // ASan's
  void* race_context = nullptr;  // TSan's
  State state = State::ready;
  const char* name = "";  // of the call it waits in
  Site site{};
  uint32_t mask = 0;
  void* operand = nullptr;
  void (*complete)(void* const*, uint32_t, Site) = nullptr;
  int barrier_id = 0, barrier_count = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> committed_copies;
};

struct Machine {
  std::vector<Fiber> fibers;
  int threads = 0, current = -1;
  Context scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_race_context = nullptr;
  std::string kernel, report;
  bool failed = false;
  const std::function<void()>* body = nullptr;
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  int arrived[BARRIERS] = {};  // threads that were counted without waiting
  Order order = Order::ascending;
  std::mt19937_64 random{1};
  // For ThreadSanitizer. A barrier has two tokens in turn: what a thread does after it has passed is not yet ordered
  // before those that wait.
  char began = 0, ended = 0, stopped = 0, barrier_tokens[BARRIERS][2] = {}, warp_tokens[WARP][2] = {};
  int barrier_turn[BARRIERS] = {}, warp_turn[WARP] = {};
};

extern Machine machine;

// fiber.cpp
void make_fibers(int threads);
void resume(int thread);       // until it waits or ends; throws where it failed
void to_scheduler(bool ends);  // from a fiber, which goes on when it is resumed

// report.cpp
std::string text(Shape);
std::string text(Site);
std::string where();     // kernel and block
std::string everyone();  // "threads 0-31 wait in __syncthreads at a.cu:7; threads 32-63 ended"
[[noreturn]] void stop(const std::string& what);

// wait.cpp: lets go on who waits for nobody any more; false where nobody does
bool release_warp(int warp);
bool release_barriers();

}  // namespace emulator
