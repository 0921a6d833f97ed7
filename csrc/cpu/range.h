// parallel_for over a lambda, loops over vectors, and dispatch on the element type. Included by csrc/cpu/*.cpp alone.
#pragma once
#include <type_traits>

#include "onepass/dtype.h"
#include "onepass/parallel.h"
#include "vec.h"

namespace onepass::ONEPASS_ISA {

// body(begin, end) over tiles of [0, n). The thread count never changes what is computed, only who computes it.
template <class Body>
static void parallel_for(int64_t n, int64_t grain, int num_threads, Body&& body) {
  using Callable = std::remove_reference_t<Body>;
  run_ranges(
      n, grain, num_threads, [](void* f, int64_t begin, int64_t end) { (*static_cast<Callable*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// step(i, n) on elements i to i + n, a vector at a time.
template <class Step>
OP_INLINE void sweep(int64_t count, Step&& step) {
  int64_t i = 0;
  for (; i + W <= count; i += W) step(i, W);
  if (i < count) step(i, static_cast<int>(count - i));
}

// f(T{}) with T the C++ type of dtype.
template <class F>
static void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(BF16{});
    case DType::f16: return f(F16{});
  }
}

// f(T{}) with T what a cache of codes holds, or Value where there are none.
template <class Value, class F>
static void with_codes(Codes codes, F&& f) {
  switch (codes) {
    case Codes::none: return f(Value{});
    case Codes::i8: return f(I8{});
    case Codes::e4m3: return f(E4M3{});
  }
}

}  // namespace onepass::ONEPASS_ISA
