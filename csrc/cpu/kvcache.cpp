// The append to a cache: new values are copied or quantized, new keys turned on the way, each to the slot of its
// position.
#include "onepass/attention.h"
#include "quantize.h"
#include "range.h"
#include "rotary.h"

namespace onepass::ONEPASS_ISA {
namespace {

// Where a token goes: its row, and its page (or cache row) and slot there.
struct Place {
  int64_t row, page, slot;
};

template <class T>
T* at(const Heads& cache, const Place& to, int64_t head) {
  return static_cast<T*>(const_cast<void*>(cache.data)) + to.page * cache.batch + to.slot * cache.step +
         head * cache.head;
}

// x [dim] as codes; `buffer` has it in float32, with zeros up to a whole vector.
template <class Code>
void encode(const float* buffer, int64_t dim, const Heads& cache, const Scales& scales, const Place& to, int64_t head) {
  float one = 1;
  float* scale = scales.data ? scales.data + head * scales.head : &one;
  if (scales.per_token) {
    scale += to.page * scales.batch + to.slot * scales.step;
    *scale = largest(buffer, dim) / LARGEST<Code>;
  } else if (scales.data) {
    scale += to.row * scales.batch;
  }
  quantize(buffer, dim, *scale, at<Code>(cache, to, head));
}

template <class T, class C>
void append_as(const Append& p) {
  constexpr bool IS_COPY = std::is_same_v<T, C>;
  const Cache& c = p.cache;
  parallel_for(p.batch, 1, p.num_threads, [&](int64_t begin, int64_t end) {
    float buffer[256 + 16];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = c.cu_seqlens ? c.cu_seqlens[b] : 0;
      const int64_t steps = c.cu_seqlens ? c.cu_seqlens[b + 1] - start : p.steps;
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t position = c.seqlens[b] + t;
        Place to{b, c.batch_idx ? c.batch_idx[b] : b, position};
        if (c.block_table) {
          to.page = c.block_table[b * c.blocks + position / c.slots];
          to.slot = position % c.slots;
        }
        for (int64_t h = 0; h < p.kv_heads; ++h) {
          const auto from = [&](const Heads& x) {
            return static_cast<const T*>(x.data) + (c.cu_seqlens ? start * x.step : b * x.batch) + t * x.step +
                   h * x.head;
          };
          if constexpr (IS_COPY) {
            std::memcpy(at<T>(p.v_cache, to, h), from(p.v), p.value_dim * sizeof(T));
            T* key = at<T>(p.k_cache, to, h);
            std::memcpy(key, from(p.k), p.head_dim * sizeof(T));
            const int64_t turned = 2 * p.rotary.half;
            if (!p.rotary.cos) continue;
            rotate(p.rotary, position, from(p.k), buffer, turned);
            for (int64_t d = 0; d < turned; d += W) store_n(key + d, load(buffer + d), static_cast<int>(turned - d));
          } else {
            rotate(Rotary{}, position, from(p.v), buffer, p.value_dim);
            encode<C>(buffer, p.value_dim, p.v_cache, p.v_scale, to, h);
            rotate(p.rotary, position, from(p.k), buffer, p.head_dim);
            encode<C>(buffer, p.head_dim, p.k_cache, p.k_scale, to, h);
          }
        }
      }
    }
  });
}

void append(const Append& p) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    with_codes<T>(p.codes, [&](auto c) { append_as<T, decltype(c)>(p); });
  });
}

}  // namespace

const KvcacheKernels kvcache = {append};

}  // namespace onepass::ONEPASS_ISA
