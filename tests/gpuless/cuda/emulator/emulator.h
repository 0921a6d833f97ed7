// Runs CUDA device code on the CPU: a fiber for each thread of a block, blocks one after another. The headers beside
// this one stand in for the toolkit's, so that a .cu file compiles as it is.
//
// What it checks: barriers and warp-wide calls that not every thread reaches (with the block, the threads and the
// lines), shuffles from lanes outside the mask, misaligned and out-of-bounds accesses, copies used before they were
// waited for. Three orders of threads, warps and blocks expose what only one order gets right; built for
// ThreadSanitizer it reports every pair of accesses that no barrier orders.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

inline constexpr int WARP = 32;

enum class Order : int { ascending = 0, descending, shuffled };

// The order in which threads, warps and blocks run from now on.
void set_order(Order, uint64_t seed);

// Where device code called: as a parameter's default it is the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define EMULATOR_SITE ::emulator::Site site = ::emulator::Site::here()

struct Shape {
  unsigned x, y, z;
};

// Runs body once for each thread. Throws std::runtime_error with a report of what went wrong.
void launch(Shape grid, Shape block, size_t dynamic_bytes, const char* kernel, const std::function<void()>& body);

// ---- called by device code ----

// Ends the launch with this report; `what` is preceded by kernel, block and thread.
[[noreturn]] void fail(const std::string& what, Site);

// Waits until all `mask` lanes of the warp have called it under the same name with the same mask, then `complete` runs
// once for all of them: operands[lane] is what the lane gave, null outside the mask.
void warp_call(const char* name, uint32_t mask, void* operand,
               void (*complete)(void* const* operands, uint32_t mask, Site), Site);

// Waits for `count` threads (0: all of the block) at barrier `id`; `arrives`: is counted and does not wait.
void barrier(const char* name, int id, int count, bool arrives, Site);

// Orders this thread's memory accesses for ThreadSanitizer after those that others released there.
void acquire(void* token);
void release(void* token);
void* warp_token();  // of this warp's next __syncwarp

int lane();
unsigned char* dynamic_shared();  // of this launch, full of 0xFF when a block begins

// cp.async: the destination holds 0xFF from the call to the wait, for data may arrive at any time between.
void copy_async(void* to, const void* from, int bytes, int valid, Site);
void commit_copies();
void wait_copies(int newest_left);  // -1: all, committed or not

}  // namespace emulator
