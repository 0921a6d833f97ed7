// The append to a cache: new values are copied, new keys turned on the way, each to the slot of its position.
#include "onepass/attention.h"
#include "range.h"
#include "rotary.h"

namespace onepass::ONEPASS_ISA {
namespace {

template <class T>
void append_as(const Append& p) {
  const Cache& c = p.cache;
  parallel_for(p.batch, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    float buffer[256 + 16];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = c.cu_seqlens ? c.cu_seqlens[b] : 0;
      const int64_t steps = c.cu_seqlens ? c.cu_seqlens[b + 1] - start : p.steps;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t position = c.seqlens[b] + t;
        int64_t page = c.batch_idx ? c.batch_idx[b] : b, within = position;
        if (c.block_table) {
          page = c.block_table[b * c.blocks + position / c.slots];
          within = position % c.slots;
        }
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          const auto from = [&](const Heads& x) {
            return static_cast<const T*>(x.data) + (c.cu_seqlens ? start * x.step : b * x.batch) + t * x.step +
                   h * x.head;
          };
          const auto to = [&](const Heads& x) {
            return static_cast<T*>(const_cast<void*>(x.data)) + page * x.batch + within * x.step + h * x.head;
          };
          std::memcpy(to(p.v_cache), from(p.v), p.value_dim * sizeof(T));
          T* key = to(p.k_cache);
          std::memcpy(key, from(p.k), p.head_dim * sizeof(T));
          const int64_t turned = 2 * p.rotary.half;
          if (!p.rotary.cos) continue;
          rotate(p.rotary, position, from(p.k), buffer, turned);
          for (int64_t d = 0; d < turned; d += W) store_n(key + d, load(buffer + d), static_cast<int>(turned - d));
        }
      }
    }
  });
}

void append(const Append& p) {
  with_dtype(p.dtype, [&](auto t) { append_as<decltype(t)>(p); });
}

}  // namespace

const KvcacheKernels kvcache = {append};

}  // namespace onepass::ONEPASS_ISA
