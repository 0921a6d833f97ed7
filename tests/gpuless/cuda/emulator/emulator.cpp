#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int BARRIERS = 16;
constexpr int POISON = 0xFF;  // a NaN in every float format

enum class State { ready, in_warp_call, at_barrier, done };

// ---- switching from one stack to another ----

#if defined(__x86_64__)
using Context = void*;
extern "C" void onepass_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl onepass_emulator_switch
.type onepass_emulator_switch,@function
onepass_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size onepass_emulator_switch, .-onepass_emulator_switch
)");
void switch_context(Context& from, Context& to) { onepass_emulator_switch(&from, to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t{15});
  *--top = nullptr;  // entry never returns; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
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

Machine machine;

// ---- fibers ----

void to_scheduler(bool ends) {
  Fiber& me = machine.fibers[machine.current];
  release(&machine.stopped);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &me.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.scheduler_race_context, __tsan_switch_to_fiber_no_sync);
#endif
  (void)ends;
  switch_context(me.context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  acquire(&machine.began);
  (*machine.body)();
  release(&machine.ended);
  machine.fibers[machine.current].state = State::done;
  to_scheduler(true);
  __builtin_trap();
}

void resume(int thread) {
  machine.current = thread;
  const unsigned x = blockDim.x, y = blockDim.y, t = static_cast<unsigned>(thread);
  threadIdx = {t % x, t / x % y, t / (x * y)};
  Fiber& fiber = machine.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, STACK);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.race_context, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(machine.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.current = -1;
  if (machine.failed) {
    acquire(&machine.stopped);
    throw std::runtime_error(machine.report);
  }
}

void make_fibers(int threads) {
  while (static_cast<int>(machine.fibers.size()) < threads) {
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    Fiber fiber;
    fiber.stack = static_cast<char*>(stack);
#if defined(__SANITIZE_THREAD__)
    fiber.race_context = __tsan_create_fiber(0);
#endif
    machine.fibers.push_back(std::move(fiber));
  }
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.state = State::ready;
    fiber.fake_stack = nullptr;
    fiber.open_copies.clear();
    fiber.committed_copies.clear();
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, STACK);
#endif
    prepare(fiber.context, fiber.stack, fiber_entry);
  }
}

// ---- reports ----

std::string text(Shape s) {
  return "(" + std::to_string(s.x) + ", " + std::to_string(s.y) + ", " + std::to_string(s.z) + ")";
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string where() { return machine.kernel + " in block " + text(Shape{blockIdx.x, blockIdx.y, blockIdx.z}); }

std::string doing(const Fiber& fiber) {
  if (fiber.state == State::done) return "ended";
  return std::string("wait in ") + fiber.name + " at " + text(fiber.site);
}

// "threads 0-31 wait in __syncthreads at a.cu:7; threads 32-63 ended"
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

[[noreturn]] void stop(const std::string& what) {
  acquire(&machine.stopped);
  throw std::runtime_error(where() + ": " + what);
}

// ---- warp-wide calls and barriers ----

// What lanes hand to one another is the emulator's own memory: ThreadSanitizer looks away.
struct Unwatched {
#if defined(__SANITIZE_THREAD__)
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#endif
};

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

// ---- blocks ----

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

void arrive(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    std::memset(static_cast<char*>(c.to) + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
  }
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

int lane() { return machine.current % WARP; }

unsigned char* dynamic_shared() { return machine.dynamic; }

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

void* warp_token() {
  const int warp = machine.current / WARP;
  return &machine.warp_tokens[warp][machine.warp_turn[warp]];
}

}  // namespace emulator

// ---- what -fsanitize=alignment,bounds calls: reports with block and thread, no library needed ----

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
