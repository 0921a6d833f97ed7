// Threads of a block as fibers: stacks, switching between them, and what the sanitizers are told of it.
#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <utility>

#include "machine.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {
namespace {

constexpr size_t STACK = 256 * 1024;

#if defined(__x86_64__)
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
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

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

}  // namespace

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

}  // namespace emulator
