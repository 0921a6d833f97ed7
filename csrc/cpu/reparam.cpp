// Reparameterized sampling in one pass. Bytes: forward reads mean and logvar and writes z (12 an element in float32),
// backward reads grad_z, mean and logvar and writes two gradients (20). The noise is never stored: a tile of it is
// drawn into the first-level cache, used, and drawn again in backward, which costs less than reading it from memory.
// A tile's operands are fetched while its noise is drawn, a few lines at a time: that takes 0.8 of the time from memory
// and is left out where all lies in the second cache. Tiles of 4096 elements, too large for the first, took 1.2x.
#include "onepass/reparam.h"

#include "random.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TILE = KL_TILE;
constexpr int64_t GRAIN = 4;  // tiles below which a thread is not worth its start

// Where one task works: elements [begin, end) of row `row`, or all of `rows` rows that lie one behind the other.
struct Tile {
  int64_t row, rows, begin, end;
};

// Normals of a run of elements of a row of random numbers, which may begin inside a block of four.
struct Noise {
  alignas(64) float drawn[TILE + 2 * DRAW];

  template <class Beside>
  const float* of(const Key& key, int64_t start, int64_t count, Beside&& beside) {
    return draw_elements<Distribution::normal>(key, start, count, drawn, beside);
  }
};

// body(partial sum's index, tile, its normals or null). A long row is several tasks; short rows share one, and with one
// key for the whole tensor they share its normals too. Where `dense` they are worked on as if they were one row.
// While a tile's normals are drawn, ahead(tile, i, n) fetches its operands.
template <class Ahead, class Body>
void for_each_tile(const Reparam& p, bool draws, bool dense, Ahead&& ahead, Body&& body) {
  if (p.length > TILE) {
    const int64_t tiles = (p.length + TILE - 1) / TILE;
    parallel_for(p.rows * tiles, GRAIN, p.num_threads, [&](int64_t first, int64_t last) {
      Noise noise;
      for (int64_t task = first; task < last; ++task) {
        const int64_t row = task / tiles, begin = task % tiles * TILE;
        const Tile tile{row, 1, begin, begin + TILE < p.length ? begin + TILE : p.length};
        const int64_t start = (p.keys_per_row ? 0 : row * p.length) + begin;
        const auto beside = [&](int64_t i, int64_t n) { ahead(tile, i, n); };
        const Key key = p.keys.at(p.keys_per_row ? row : 0);
        body(task, tile, draws ? noise.of(key, start, tile.end - begin, beside) : nullptr);
      }
    });
    return;
  }
  const int64_t group = TILE / p.length, groups = (p.rows + group - 1) / group;
  parallel_for(groups, GRAIN, p.num_threads, [&](int64_t first, int64_t last) {
    Noise noise;
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = g * group, end = begin + group < p.rows ? begin + group : p.rows;
      const bool own_keys = draws && p.keys_per_row;
      const float* shared = nullptr;
      const Tile together{begin, end - begin, 0, (end - begin) * p.length};
      const auto beside = [&](int64_t i, int64_t n) { ahead(together, i, n); };
      if (draws && !own_keys) shared = noise.of(p.keys.at(0), begin * p.length, together.end, beside);
      if (dense && !own_keys) {
        body(begin, together, shared);
        continue;
      }
      for (int64_t row = begin; row < end; ++row) {
        const float* own = shared ? shared + (row - begin) * p.length : nullptr;
        const Tile tile{row, 1, 0, p.length};
        if (own_keys) own = noise.of(p.keys.at(row), 0, p.length, [&](int64_t i, int64_t n) { ahead(tile, i, n); });
        body(row, tile, own);
      }
    }
  });
}

// Whether a tensor's rows lie one behind the other, as those that are written do.
bool dense_rows(const Reparam& p, const RowsIn& rows) { return !rows.data || rows.step == p.length; }

template <class T>
const T* row_of(const RowsIn& rows, const Tile& tile) {
  return static_cast<const T*>(rows.data) + tile.row * rows.step + tile.begin;
}

template <class T>
void forward_as(const Reparam& p, T* z, float* kl, double* partial) {
  const bool dense = dense_rows(p, p.mean) && dense_rows(p, p.logvar) && dense_rows(p, p.noise);
  const bool far = is_far<T>(p.rows * p.length);
  const auto ahead = [&](const Tile& tile, int64_t i, int64_t n) {
    if (!far) return;
    fetch(row_of<T>(p.mean, tile), i, n);
    fetch(row_of<T>(p.logvar, tile), i, n);
    fetch(z + tile.row * p.length + tile.begin, i, n);
  };
  for_each_tile(p, !p.noise.data, dense, ahead, [&](int64_t task, const Tile& tile, const float* drawn) {
    const T* given = p.noise.data ? row_of<T>(p.noise, tile) : nullptr;
    const T *mean = row_of<T>(p.mean, tile), *logvar = row_of<T>(p.logvar, tile);
    T* out = z + tile.row * p.length + tile.begin;
    // Writes z and returns twice the KL; lanes beyond n hold exp(0) - 1 = 0.
    const auto step = [&](int64_t i, int n) {
      const F32 m = load_n(mean + i, n), lv = load_n(logvar + i, n);
      const F32 eps = given ? load_n(given + i, n) : load(drawn + i);
      const F32 std = exp_half(lv);
      store_n(out + i, fma(std, eps, m), n);
      return fma(std, std, fma(m, m, -1.0f - lv));
    };
    const int64_t count = tile.end - tile.begin;
    if (!kl) return sweep(count, [&](int64_t i, int n) { step(i, n); });
    if (tile.rows == 1) {
      F32 total{};
      sweep(count, [&](int64_t i, int n) { total += step(i, n); });
      const float half = 0.5f * sum(total);
      if (partial)
        partial[task] = half;
      else
        kl[task] = half;
      return;
    }
    float terms[TILE];
    sweep(count, [&](int64_t i, int n) { store_n(terms + i, step(i, n), n); });
    for (int64_t row = 0; row < tile.rows; ++row) {
      F32 total{};
      sweep(p.length, [&](int64_t i, int n) { total += load_n(terms + row * p.length + i, n); });
      kl[tile.row + row] = 0.5f * sum(total);
    }
  });
}

void forward(const Reparam& p, void* z, float* kl, double* partial) {
  with_dtype(p.dtype, [&](auto t) { forward_as(p, static_cast<decltype(t)*>(z), kl, partial); });
  if (!partial) return;
  const int64_t tiles = (p.length + TILE - 1) / TILE;
  for (int64_t row = 0; row < p.rows; ++row) {
    double total = 0;
    for (int64_t t = 0; t < tiles; ++t) total += partial[row * tiles + t];
    kl[row] = static_cast<float>(total);
  }
}

template <class T>
void backward_as(const Reparam& p, const RowsIn& grad_z, const float* grad_kl, T* grad_mean, T* grad_logvar,
                 T* grad_noise) {
  const bool dense =
      dense_rows(p, p.mean) && dense_rows(p, p.logvar) && dense_rows(p, p.noise) && dense_rows(p, grad_z);
  const bool far = is_far<T>(p.rows * p.length);
  const auto ahead = [&](const Tile& tile, int64_t i, int64_t n) {
    if (!far) return;
    fetch(row_of<T>(p.mean, tile), i, n);
    fetch(row_of<T>(p.logvar, tile), i, n);
    fetch(row_of<T>(grad_z, tile), i, n);
    fetch(grad_mean + tile.row * p.length + tile.begin, i, n);
    fetch(grad_logvar + tile.row * p.length + tile.begin, i, n);
  };
  for_each_tile(p, grad_z.data && !p.noise.data, dense, ahead, [&](int64_t, const Tile& tile, const float* drawn) {
    const T* given = p.noise.data ? row_of<T>(p.noise, tile) : nullptr;
    const T *mean = row_of<T>(p.mean, tile), *logvar = row_of<T>(p.logvar, tile);
    const T* dz = grad_z.data ? row_of<T>(grad_z, tile) : nullptr;
    const int64_t at = tile.row * p.length + tile.begin;
    float spread[TILE];  // grad_kl beside every element, where there are several rows
    if (grad_kl && tile.rows > 1)
      for (int64_t row = 0; row < tile.rows; ++row)
        sweep(p.length,
              [&](int64_t i, int n) { store_n(spread + row * p.length + i, splat(grad_kl[tile.row + row]), n); });
    sweep(tile.end - tile.begin, [&](int64_t i, int n) {
      const F32 lv = load_n(logvar + i, n), std = exp_half(lv);
      F32 dm{}, dlv{};
      if (dz) {
        const F32 eps = given ? load_n(given + i, n) : load(drawn + i);
        dm = load_n(dz + i, n);
        dlv = 0.5f * dm * std * eps;
        if (grad_noise) store_n(grad_noise + at + i, dm * std, n);
      }
      if (grad_kl) {
        const F32 dkl = tile.rows > 1 ? load_n(spread + i, n) : splat(grad_kl[tile.row]);
        dm = fma(dkl, load_n(mean + i, n), dm);
        dlv = fma(0.5f * dkl, fma(std, std, splat(-1.0f)), dlv);
      }
      store_n(grad_mean + at + i, dm, n);
      store_n(grad_logvar + at + i, dlv, n);
    });
  });
}

void backward(const Reparam& p, RowsIn grad_z, const float* grad_kl, void* grad_mean, void* grad_logvar,
              void* grad_noise) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    backward_as(p, grad_z, grad_kl, static_cast<T*>(grad_mean), static_cast<T*>(grad_logvar),
                static_cast<T*>(grad_noise));
  });
}

}  // namespace

const ReparamKernels reparam = {forward, backward};

}  // namespace onepass::ONEPASS_ISA
