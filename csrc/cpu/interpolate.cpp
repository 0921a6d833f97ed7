// Straight lines and great circles between vectors. Bytes: both operands are read once and the path written once (12 an
// element in float32); backward reads the gradient too and writes two (20). A vector that bends is walked twice, for
// its sums and then, from the caches, for its elements; backwards, to begin with what was read last, took 1.1x the
// time. Sums are double, a tile at a time, and tiles are added in ascending order whoever summed them: one thread takes
// whole vectors where they are many, else the threads share the tiles of each.
#include "onepass/great_circle.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TILE = INTERPOLATE_TILE;
constexpr int64_t GRAIN = 16384;  // elements below which a thread is not worth its start

typedef double F64 __attribute__((vector_size(W * 4)));  // half as many lanes as F32

#if defined(__AVX512F__)
OP_INLINE F64 low(F32 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
OP_INLINE F64 high(F32 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#elif defined(__AVX2__)
OP_INLINE F64 low(F32 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
OP_INLINE F64 high(F32 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
#elif defined(__x86_64__)
OP_INLINE F64 low(F32 x) { return _mm_cvtps_pd(x); }
OP_INLINE F64 high(F32 x) { return _mm_cvtps_pd(_mm_movehl_ps(x, x)); }
#elif defined(__aarch64__)
OP_INLINE F64 low(F32 x) { return vcvt_f64_f32(vget_low_f32(x)); }
OP_INLINE F64 high(F32 x) { return vcvt_high_f64_f32(x); }
#else
OP_INLINE F64 low(F32 x) { return F64{x[0], x[1]}; }
OP_INLINE F64 high(F32 x) { return F64{x[2], x[3]}; }
#endif

// A sum of products of floats, each exact in double.
struct Dot {
  F64 even{}, odd{};
  void add(F64 x, F64 y, F64 u, F64 v) {
    even += x * y;
    odd += u * v;
  }
  double total() const {
    const F64 both = even + odd;
    double sum = both[0];
    for (int i = 1; i < W / 2; ++i) sum += both[i];
    return sum;
  }
};

void add(PairSums& to, const PairSums& s) {
  to.aa += s.aa;
  to.bb += s.bb;
  to.ab += s.ab;
  to.ga += s.ga;
  to.gb += s.gb;
}

// ARC: what the angle needs. Lanes beyond the end hold zeros.
template <bool ARC, bool GRAD, class T>
PairSums sums_of(const T* a, const T* b, const T* g, int64_t count) {
  Dot aa, bb, ab, ga, gb;
  sweep(count, [&](int64_t i, int n) {
    const F32 x = load_n(a + i, n), y = load_n(b + i, n);
    const F64 x0 = low(x), x1 = high(x), y0 = low(y), y1 = high(y);
    if constexpr (ARC) {
      aa.add(x0, x0, x1, x1);
      bb.add(y0, y0, y1, y1);
      ab.add(x0, y0, x1, y1);
    }
    if constexpr (GRAD) {
      const F32 z = load_n(g + i, n);
      const F64 z0 = low(z), z1 = high(z);
      ga.add(z0, x0, z1, x1);
      gb.add(z0, y0, z1, y1);
    }
  });
  return {aa.total(), bb.total(), ab.total(), ga.total(), gb.total()};
}

// What does not bend and what has a weight of exactly 0 or 1 needs no sums but those of its weight's gradient.
bool bends(const Interpolate& p, int64_t vector) {
  const float t = p.weight_of(vector);
  return p.arc && t != 0 && t != 1;
}

// Every vector: sum(vector, begin, end) of its tiles where `summed(vector)`, decide(vector, sums) once, and
// put(vector, decision, begin, end) of its tiles.
template <class Summed, class Sum, class Decide, class Put>
void walk(const Interpolate& p, PairSums* partial, Summed&& summed, Sum&& sum, Decide&& decide, Put&& put) {
  const int64_t tiles = (p.length + TILE - 1) / TILE, vectors = p.vectors();
  const auto end_of = [&](int64_t tile) { return tile + 1 < tiles ? (tile + 1) * TILE : p.length; };
  if (tiles == 1 || vectors >= 4 * p.num_threads) {
    parallel_for(vectors, (GRAIN + p.length - 1) / p.length, p.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t vector = first; vector < last; ++vector) {
        PairSums total{};
        if (summed(vector))
          for (int64_t tile = 0; tile < tiles; ++tile) add(total, sum(vector, tile * TILE, end_of(tile)));
        const auto decision = decide(vector, total);
        for (int64_t tile = 0; tile < tiles; ++tile) put(vector, decision, tile * TILE, end_of(tile));
      }
    });
    return;
  }
  for (int64_t vector = 0; vector < vectors; ++vector) {
    PairSums total{};
    if (summed(vector)) {
      parallel_for(tiles, GRAIN / TILE, p.num_threads, [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) partial[tile] = sum(vector, tile * TILE, end_of(tile));
      });
      for (int64_t tile = 0; tile < tiles; ++tile) add(total, partial[tile]);
    }
    const auto decision = decide(vector, total);
    parallel_for(tiles, GRAIN / TILE, p.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) put(vector, decision, tile * TILE, end_of(tile));
    });
  }
}

template <class T>
float at(const T* p) {
  return load_n(p, 1)[0];
}

// The axis in which a vector is smallest, the first of equals.
template <class T>
int64_t smallest(const T* a, int64_t n) {
  int64_t best = 0;
  float least = __builtin_fabsf(at(a));
  for (int64_t i = 1; i < n; ++i)
    if (const float size = __builtin_fabsf(at(a + i)); size < least) {
      least = size;
      best = i;
    }
  return best;
}

template <class T>
struct Operands {
  const T *a, *b, *g;
};

template <class T>
Operands<T> operands(const Interpolate& p, int64_t vector) {
  const auto of = [&](const RowsIn& x) { return static_cast<const T*>(x.data) + p.place(x, vector); };
  return {of(p.start), of(p.end), p.grad.data ? of(p.grad) : nullptr};
}

template <class T>
void put_point(const Point& f, const T* a, const T* b, T* out, int64_t begin, int64_t end) {
  const F32 s = splat(f.a), t = splat(f.b);
  const auto each = [&](auto&& value) {
    sweep(end - begin, [&](int64_t i, int n) { store_n(out + begin + i, value(begin + i, n), n); });
  };
  const auto x = [&](int64_t i, int n) { return load_n(a + i, n); };
  const auto y = [&](int64_t i, int n) { return load_n(b + i, n); };
  switch (f.blend) {
    case Blend::start: return each(x);
    case Blend::end: return each(y);
    case Blend::line:  // from the end that is nearer, as torch.lerp
      if (__builtin_fabsf(f.a) < 0.5f)
        return each([&](int64_t i, int n) { return fma(s, y(i, n) - x(i, n), x(i, n)); });
      return each([&](int64_t i, int n) { return fma(-t, y(i, n) - x(i, n), y(i, n)); });
    case Blend::arc: each([&](int64_t i, int n) { return fma(s, x(i, n), t * y(i, n)); });
  }
  if (f.axis >= begin && f.axis < end) store_n(out + f.axis, splat(f.a * at(a + f.axis) + f.extra), 1);
}

template <class T>
void forward_as(const Interpolate& p, T* out, PairSums* partial) {
  walk(
      p, partial, [&](int64_t vector) { return bends(p, vector); },
      [&](int64_t vector, int64_t begin, int64_t end) {
        const auto x = operands<T>(p, vector);
        return sums_of<true, false>(x.a + begin, x.b + begin, x.g, end - begin);
      },
      [&](int64_t vector, const PairSums& sums) {
        const float t = p.weight_of(vector);
        if (!p.arc) return line_point(t);
        const Pair pair = pair_of(sums);
        if (pair.bend != Bend::half) return point_of(pair, t, 0, -1);
        const T* a = operands<T>(p, vector).a;
        const int64_t axis = smallest(a, p.length);
        return point_of(pair, t, static_cast<double>(at(a + axis)), axis);
      },
      [&](int64_t vector, const Point& f, int64_t begin, int64_t end) {
        const auto x = operands<T>(p, vector);
        put_point(f, x.a, x.b, out + vector * p.length, begin, end);
      });
}

void forward(const Interpolate& p, void* out, PairSums* partial) {
  with_dtype(p.dtype, [&](auto t) { forward_as(p, static_cast<decltype(t)*>(out), partial); });
}

template <class T>
void put_pull(const Pull& f, const Operands<T>& x, T* start, T* end_grad, int64_t begin, int64_t end) {
  const F32 ga = splat(f.g_a), gb = splat(f.g_b), aa = splat(f.a_a), ba = splat(f.b_a), ab = splat(f.a_b),
            bb = splat(f.b_b);
  if (f.plain) {
    const auto scaled = [&](T* out, float factor) {
      sweep(end - begin, [&](int64_t i, int n) {
        store_n(out + begin + i, factor == 0 ? F32{} : splat(factor) * load_n(x.g + begin + i, n), n);
      });
    };
    scaled(start, f.g_a);
    return scaled(end_grad, f.g_b);
  }
  sweep(end - begin, [&](int64_t j, int n) {
    const int64_t i = begin + j;
    const F32 a = load_n(x.a + i, n), b = load_n(x.b + i, n), g = load_n(x.g + i, n);
    store_n(start + i, fma(ga, g, fma(aa, a, ba * b)), n);
    store_n(end_grad + i, fma(gb, g, fma(ab, a, bb * b)), n);
  });
  if (f.axis >= begin && f.axis < end) {
    const float value = f.g_a * at(x.g + f.axis) + f.a_a * at(x.a + f.axis) + f.extra;
    store_n(start + f.axis, splat(value), 1);
  }
}

template <class T>
void backward_as(const Interpolate& p, const InterpolateGradOut& out, PairSums* partial) {
  walk(
      p, partial, [&](int64_t vector) { return out.vectors || bends(p, vector); },
      [&](int64_t vector, int64_t begin, int64_t end) {
        const auto x = operands<T>(p, vector);
        if (p.arc) return sums_of<true, true>(x.a + begin, x.b + begin, x.g + begin, end - begin);
        return sums_of<false, true>(x.a + begin, x.b + begin, x.g + begin, end - begin);
      },
      [&](int64_t vector, const PairSums& sums) {
        const float t = p.weight_of(vector);
        const Pair pair = p.arc ? pair_of(sums) : Pair{};
        const auto x = operands<T>(p, vector);
        Pull f;
        if (pair.bend == Bend::half) {
          const int64_t axis = smallest(x.a, p.length);
          f = pull_of(pair, t, sums, static_cast<double>(at(x.a + axis)), static_cast<double>(at(x.g + axis)), axis);
        } else {
          f = pull_of(pair, t, sums, 0, 0, -1);
        }
        if (out.vectors) out.vectors[vector] = f.weight;
        return f;
      },
      [&](int64_t vector, const Pull& f, int64_t begin, int64_t end) {
        const int64_t at = vector * p.length;
        put_pull(f, operands<T>(p, vector), static_cast<T*>(out.start) + at, static_cast<T*>(out.end) + at, begin, end);
      });
}

void backward(const Interpolate& p, const InterpolateGradOut& out, PairSums* partial) {
  with_dtype(p.dtype, [&](auto t) { backward_as<decltype(t)>(p, out, partial); });
  if (!out.weights) return;
  const int64_t shares = p.weight_step ? p.groups : p.vectors();  // vectors of a weight, added in ascending order
  for (int64_t first = 0; first < p.vectors(); first += shares) {
    double total = 0;
    for (int64_t vector = first; vector < first + shares; ++vector) total += out.vectors[vector];
    out.weights[first / shares] = static_cast<float>(total);
  }
}

}  // namespace

const InterpolateKernels interpolate = {forward, backward};

}  // namespace onepass::ONEPASS_ISA
