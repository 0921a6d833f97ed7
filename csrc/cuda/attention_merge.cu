#include "attention_merge.cuh"

#include <type_traits>

#include "launch.cuh"

namespace onepass::cuda {
namespace {

// Whether every row of channels lies on 16-byte addresses and fills whole ones.
template <class T>
bool wide(const Merge& p, const void* row) {
  const auto fits = [](int64_t elements) { return elements % PACK<T> == 0; };
  return aligned16(p.outs.data) && aligned16(row) && fits(p.dim) && fits(p.part) && fits(p.outs.batch) &&
         fits(p.outs.step) && fits(p.outs.head);
}

// run(T{}, lanes of a row, std::bool_constant<rows are wide>{}): `row` is the other tensor of rows of channels.
template <class Run>
void with_lanes(const Merge& p, const void* row, Run&& run) {
  with_device_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto chosen = [&](auto lanes) {
      if (wide<T>(p, row))
        run(t, lanes, std::true_type{});
      else
        run(t, lanes, std::false_type{});
    };
    if (p.dim <= 8 * PACK<T>)
      chosen(std::integral_constant<int, 8>{});
    else if (p.dim <= 16 * PACK<T>)
      chosen(std::integral_constant<int, 16>{});
    else
      chosen(std::integral_constant<int, WARP>{});
  });
}

unsigned blocks_of(const Merge& p, int lanes) {
  const int64_t rows = p.batch * p.length * p.heads, of_block = SHORT_BLOCK / lanes;
  return grid_size((rows + of_block - 1) / of_block);
}

}  // namespace

void merge_attention(const Merge& p, void* out, float* lse, const Stream& stream) {
  with_lanes(p, out, [&](auto t, auto lanes, auto wide) {
    using T = decltype(t);
    launch(stream, blocks_of(p, lanes), SHORT_BLOCK, 0, merge_parts<T, lanes(), wide()>, p, static_cast<T*>(out), lse);
  });
}

void merge_attention_backward(const MergeBackward& p, const Stream& stream) {
  with_lanes(p.forward, p.grad_out, [&](auto t, auto lanes, auto wide) {
    launch(stream, blocks_of(p.forward, lanes), SHORT_BLOCK, 0, merge_parts_backward<decltype(t), lanes(), wide()>, p);
  });
}

}  // namespace onepass::cuda
