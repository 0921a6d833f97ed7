// Launches: the order of blocks, warps and lanes, and shared memory that is poisoned for each block.
#include "emulator.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "machine.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

std::vector<int> ordered(int count) {
  std::vector<int> list(count);
  for (int i = 0; i < count; ++i) list[i] = machine.order == Order::descending ? count - 1 - i : i;
  if (machine.order == Order::shuffled) std::shuffle(list.begin(), list.end(), machine.random);
  return list;
}

// Every ready lane until it waits or ends.
bool run_lanes(int warp) {
  bool ran = false;
  for (int lane : ordered(WARP)) {
    const int t = warp * WARP + lane;
    if (t >= machine.threads || machine.fibers[t].state != State::ready) continue;
    resume(t);
    ran = true;
  }
  return ran;
}

void run_block() {
  make_fibers(machine.threads);
  std::fill_n(machine.arrived, BARRIERS, 0);
  const int warps = (machine.threads + WARP - 1) / WARP;
  for (;;) {
    // A warp runs as far ahead as it can: what a missing barrier lets it overtake is overtaken. Shuffled, the warps
    // take turns at each call that makes one wait.
    bool ran = true;
    while (ran) {
      ran = false;
      for (int warp : ordered(warps)) {
        bool more = true;
        while (more) {
          more = run_lanes(warp);
          if (release_warp(warp)) more = true;
          ran |= more;
          if (machine.order == Order::shuffled) break;
        }
      }
    }
    const auto ends = [](const Fiber& f) { return f.state == State::done; };
    if (std::all_of(machine.fibers.begin(), machine.fibers.begin() + machine.threads, ends)) return;
    if (!release_barriers()) stop("deadlock: " + everyone());
  }
}

thread_local volatile char anchor;  // writing it makes this thread have its copies

// __shared__ variables are the thread-local ones of this library (see cuda_runtime.h), which holds device code and the
// emulator alone: each block finds them full of NaN.
void poison_shared() {
  anchor = 1;
#if !defined(__SANITIZE_ADDRESS__)
  const auto visit = [](dl_phdr_info* info, size_t, void*) {
    const auto inside = [&](const void* p) {
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const auto begin = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
        if (header.p_type == PT_LOAD && p >= begin && p < begin + header.p_memsz) return true;
      }
      return false;
    };
    if (!inside(reinterpret_cast<const void*>(&poison_shared)) || !info->dlpi_tls_data) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_TLS) std::memset(info->dlpi_tls_data, POISON, info->dlpi_phdr[i].p_memsz);
    return 1;
  };
  dl_iterate_phdr(visit, nullptr);
#endif
  if (machine.dynamic) std::memset(machine.dynamic, POISON, machine.dynamic_bytes);
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.random.seed(seed);
}

void launch(Shape grid, Shape block, size_t dynamic_bytes, const char* kernel, const std::function<void()>& body) {
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  machine.kernel = kernel;
  machine.failed = false;
  machine.body = &body;
  machine.dynamic_bytes = dynamic_bytes;
#if defined(__SANITIZE_THREAD__)
  machine.scheduler_race_context = __tsan_get_current_fiber();
#endif
  struct Buffer {
    Buffer(size_t bytes) : data(bytes ? std::aligned_alloc(128, (bytes + 127) / 128 * 128) : nullptr) {}
    ~Buffer() { std::free(data); }
    void* data;
  } buffer(dynamic_bytes);
  machine.dynamic = static_cast<unsigned char*>(buffer.data);
#if defined(__SANITIZE_ADDRESS__)
  if (dynamic_bytes) ASAN_POISON_MEMORY_REGION(machine.dynamic + dynamic_bytes, (128 - dynamic_bytes % 128) % 128);
#endif
  const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
  for (int i : ordered(blocks)) {
    const auto b = static_cast<unsigned>(i);
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    poison_shared();
    release(&machine.began);
    run_block();
    acquire(&machine.ended);
  }
}

int lane() { return machine.current % WARP; }

unsigned char* dynamic_shared() { return machine.dynamic; }

}  // namespace emulator
