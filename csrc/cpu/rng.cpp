// Fill with random numbers. Bound by arithmetic: ten Philox rounds and one ln (normal: sqrt and sincos too) for four
// bytes written; W blocks at a time keep every lane busy, and the words are woven into element order in registers.
#include "onepass/rng.h"

#include "random.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TILE = 64 * DRAW;  // elements of a row that one task draws

// Whole draws of float32 go where they belong, the rest through a buffer.
template <Distribution D, class T>
void fill_tile(const Key& key, int64_t begin, int64_t end, T* row) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t whole = (end - begin) / DRAW;
    draw<D>(key, static_cast<uint64_t>(begin / 4), whole, row + begin);
    begin += whole * DRAW;
  }
  alignas(64) float drawn[TILE];
  draw<D>(key, static_cast<uint64_t>(begin / 4), (end - begin + DRAW - 1) / DRAW, drawn);
  sweep(end - begin, [&](int64_t i, int n) { store_n(row + begin + i, load(drawn + i), n); });
}

template <Distribution D, class T>
void fill_rows(const Keys& keys, int64_t rows, int64_t length, T* out, int num_threads) {
  const int64_t tiles = (length + TILE - 1) / TILE;
  parallel_for(rows * tiles, length < TILE ? 1 + TILE / (length + 1) : 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, first = task % tiles * TILE;
      fill_tile<D>(keys.at(row), first, first + TILE < length ? first + TILE : length, out + row * length);
    }
  });
}

template <Distribution D>
void fill_as(const Keys& keys, int64_t rows, int64_t length, DType dtype, void* out, int num_threads) {
  with_dtype(dtype, [&](auto t) { fill_rows<D>(keys, rows, length, static_cast<decltype(t)*>(out), num_threads); });
}

void fill(Distribution distribution, const Keys& keys, int64_t rows, int64_t length, DType dtype, void* out,
          int num_threads) {
  switch (distribution) {
    case Distribution::uniform: return fill_as<Distribution::uniform>(keys, rows, length, dtype, out, num_threads);
    case Distribution::normal: return fill_as<Distribution::normal>(keys, rows, length, dtype, out, num_threads);
    case Distribution::gumbel: return fill_as<Distribution::gumbel>(keys, rows, length, dtype, out, num_threads);
    case Distribution::exponential:
      return fill_as<Distribution::exponential>(keys, rows, length, dtype, out, num_threads);
    case Distribution::laplace: return fill_as<Distribution::laplace>(keys, rows, length, dtype, out, num_threads);
    case Distribution::logistic: return fill_as<Distribution::logistic>(keys, rows, length, dtype, out, num_threads);
    case Distribution::bits:
      return fill_rows<Distribution::bits>(keys, rows, length, static_cast<float*>(out), num_threads);
  }
}

}  // namespace

const RngKernels rng = {fill};

}  // namespace onepass::ONEPASS_ISA
