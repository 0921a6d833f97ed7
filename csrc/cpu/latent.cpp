// Posterior samples in one pass over mean and logvar, whatever is asked beside them. Bytes: forward reads mean and
// logvar and writes every sample; backward reads them and the samples' gradients and writes two gradients. A tile's
// operands that are chunks in an inner dim are gathered in the first-level cache; noise is drawn there and never
// stored.
#include "onepass/latent.h"

#include "random.h"
#include "range.h"

namespace onepass::ONEPASS_ISA {
namespace {

constexpr int64_t TILE = LATENT_TILE;
constexpr int64_t GRAIN = 8;  // tiles below which a thread is not worth its start
constexpr double LN_2PI = 1.8378770664093453;

// Elements [begin, end) of a row, or all of `rows` short rows.
struct Tile {
  int64_t task, row, rows, begin, end;

  int64_t width() const { return end - begin; }
  int64_t count() const { return rows * width(); }
};

template <class Body>
void for_each_tile(const Latent& p, Body&& body) {
  const int64_t length = p.length(), tiles = (length + TILE - 1) / TILE;
  const int64_t group = length > TILE ? 1 : TILE / length;
  const int64_t tasks = length > TILE ? p.rows * tiles : (p.rows + group - 1) / group;
  parallel_for(tasks, GRAIN, p.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      if (length > TILE) {
        const int64_t begin = task % tiles * TILE, end = begin + TILE < length ? begin + TILE : length;
        body(Tile{task, task / tiles, 1, begin, end});
      } else {
        const int64_t row = task * group, rows = row + group < p.rows ? group : p.rows - row;
        body(Tile{task, row, rows, 0, length});
      }
    }
  });
}

// Whether a tile's elements lie one behind the other.
template <class Rows>
bool dense(const Latent& p, const Rows& x, const Tile& t) {
  return (p.segments == 1 || x.segment == p.run) && (t.rows == 1 || x.row == p.length());
}

// piece(place in the tile, place in the tensor, elements) for every part of a tile that lies in one piece.
template <class Rows, class Piece>
OP_INLINE void pieces(const Latent& p, const Rows& x, const Tile& t, Piece&& piece) {
  int64_t at = 0;
  for (int64_t row = t.row; row < t.row + t.rows; ++row)
    for (int64_t i = t.begin; i < t.end;) {
      const int64_t segment = i / p.run, inside = i - segment * p.run;
      const int64_t n = p.run - inside < t.end - i ? p.run - inside : t.end - i;
      piece(at, row * x.row + segment * x.segment + inside, n);
      i += n;
      at += n;
    }
}

// A tile of an operand, where it lies or gathered into `scratch`.
template <class T>
const T* gather(const Latent& p, const Segments& x, const Tile& t, T* scratch, int64_t skip = 0) {
  if (!x.data) return nullptr;
  const T* from = static_cast<const T*>(x.data) + skip;
  if (dense(p, x, t)) {
    const int64_t segment = t.begin / p.run;
    return from + t.row * x.row + segment * x.segment + (t.begin - segment * p.run);
  }
  pieces(p, x, t, [&](int64_t to, int64_t at, int64_t n) {
    for (int64_t i = 0; i < n; ++i) scratch[to + i] = from[at + i];
  });
  return scratch;
}

// A tile of a result: written where it belongs, or into scratch and scattered at the end.
template <class T>
struct Sink {
  T* at;
  T scratch[TILE];

  void open(const Latent& p, const SegmentsOut& x, const Tile& t) {
    at = nullptr;
    if (!x.data) return;
    const int64_t segment = t.begin / p.run;
    at = dense(p, x, t) ? static_cast<T*>(x.data) + t.row * x.row + segment * x.segment + (t.begin - segment * p.run)
                        : scratch;
  }
  void close(const Latent& p, const SegmentsOut& x, const Tile& t) {
    if (at != scratch) return;
    T* to = static_cast<T*>(x.data);
    pieces(p, x, t, [&](int64_t from, int64_t place, int64_t n) {
      for (int64_t i = 0; i < n; ++i) to[place + i] = scratch[from + i];
    });
  }
};

// The noise of a tile, a sample at a time.
template <class T>
struct Noise {
  T given[TILE];
  alignas(64) float drawn[TILE + 2 * DRAW], row[TILE + 2 * DRAW];
  const T* given_at;
  const float* drawn_at;
  bool negated;

  // Calls ahead(i, n) while it draws elements i to i + n, to fetch what is needed with them.
  template <class Ahead>
  void take(const Latent& p, const Tile& t, int64_t sample, Ahead&& ahead) {
    negated = p.antithetic && sample % 2;
    if (negated) return;
    const int64_t draw = p.antithetic ? sample / 2 : sample;
    if (p.noise.data) {
      given_at = gather(p, p.noise, t, given, draw * p.noise_draw);
      return;
    }
    given_at = nullptr;
    const auto key = [&](int64_t of) {
      Key k = p.keys.at(of);
      k.offset += static_cast<uint64_t>(draw) * LATENT_DRAW;
      return k;
    };
    if (!p.keys_per_row || t.rows == 1) {
      const int64_t start = (p.keys_per_row ? 0 : t.row * p.length()) + t.begin;
      drawn_at = draw_elements<Distribution::normal>(key(p.keys_per_row ? t.row : 0), start, t.count(), drawn, ahead);
      return;
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const float* own = draw_elements<Distribution::normal>(key(t.row + r), 0, t.width(), row);
      for (int64_t i = 0; i < t.width(); ++i) drawn[r * t.width() + i] = own[i];
    }
    drawn_at = drawn;
  }
  F32 at(int64_t i, int n) const {
    const F32 eps = given_at ? load_n(given_at + i, n) : load(drawn_at + i);
    return negated ? -eps : eps;
  }
};

// Mean, logvar and prior of a tile.
template <class T>
struct Posterior {
  T scratch[4][TILE];
  const T *mean, *logvar, *prior_mean, *prior_logvar;
  F32 low, high;

  void open(const Latent& p, const Tile& t) {
    mean = gather(p, p.mean, t, scratch[0]);
    logvar = gather(p, p.logvar, t, scratch[1]);
    prior_mean = gather(p, p.prior_mean, t, scratch[2]);
    prior_logvar = gather(p, p.prior_logvar, t, scratch[3]);
    low = splat(p.clamp_low);
    high = splat(p.clamp_high);
  }
  void fetch_moments(int64_t i, int64_t n) const {
    fetch(mean, i, n);
    fetch(logvar, i, n);
  }
};

// What a vector of elements has.
template <bool PRIOR>
struct Element {
  F32 mean, logvar, std, away, precision, prior_logvar, ratio;  // away = mean - prior's, ratio = exp(logvar - prior's)
  I32 free;                                                     // logvar is inside its clamp

  F32 kl() const {
    if constexpr (PRIOR)
      return 0.5f * fma(away * away, precision, (ratio - 1.0f) + (prior_logvar - logvar));
    else
      return 0.5f * fma(std, std, fma(mean, mean, -1.0f - logvar));
  }
};

template <bool PRIOR, class T>
OP_INLINE Element<PRIOR> element(const Posterior<T>& x, int64_t i, int n) {
  Element<PRIOR> e;
  e.mean = load_n(x.mean + i, n);
  const F32 logvar = load_n(x.logvar + i, n);
  e.free = (logvar >= x.low) & (logvar <= x.high);
  e.logvar = min(x.high, max(x.low, logvar));  // this order keeps NaN
  e.std = exp_half(e.logvar);
  if constexpr (PRIOR) {
    e.prior_logvar = load_n(x.prior_logvar + i, n);
    e.away = e.mean - load_n(x.prior_mean + i, n);
    e.precision = exp(-e.prior_logvar);
    e.ratio = exp(e.logvar - e.prior_logvar);
  } else {
    e.prior_logvar = F32{};
    e.away = e.mean;
    e.precision = splat(1.0f);
    e.ratio = e.std * e.std;
  }
  return e;
}

void sum_rows(const Tile& t, const float* terms, double* sums) {
  for (int64_t r = 0; r < t.rows; ++r) {
    F32 total{};
    sweep(t.width(), [&](int64_t i, int n) { total += load_n(terms + r * t.width() + i, n); });
    sums[r] = sum(total);
  }
}

// The sums of a tile's rows, which are results where a tile holds a whole row.
void finish(const Latent& p, double* sums, int64_t rows, float* results) {
  for (int64_t r = 0; r < rows; ++r)
    results[r] = static_cast<float>(
        p.terms == LatentTerms::row ? p.beta * sums[r] : -0.5 * (sums[r] + static_cast<double>(p.length()) * LN_2PI));
}

template <class T, bool PRIOR>
void forward_as(const Latent& p, const LatentOut& out) {
  const int64_t length = p.length(), tiles = (length + TILE - 1) / TILE;
  const bool far = is_far<T>(p.rows * length);
  for_each_tile(p, [&](const Tile& t) {
    Posterior<T> x;
    Noise<T> noise;
    float first[TILE], second[TILE], std[TILE];  // std: of the first sample, for the others
    double sums[TILE];
    x.open(p, t);
    // Plane `plane` of [.., rows] sums: those of first's samples, then of second's.
    const auto reduce = [&](const float* terms, float* results, int64_t sample, int64_t plane) {
      sum_rows(t, terms, sums);
      if (out.partial)
        out.partial[(plane * p.rows + t.row) * tiles + t.begin / TILE] = sums[0];
      else
        finish(p, sums, t.rows, results + sample * p.rows + t.row);
    };
    for (int64_t s = 0; s < p.samples; ++s) {
      T* z = static_cast<T*>(out.z) + (s * p.rows + t.row) * length + t.begin;
      noise.take(p, t, s, [&](int64_t i, int64_t n) {
        if (!far) return;
        fetch(z, i, n);
        if (s == 0) x.fetch_moments(i, n);
      });
      float* kl = p.terms == LatentTerms::element ? out.first + t.row * length + t.begin : first;
      const bool wants_kl = s == 0 && (p.terms == LatentTerms::row || p.terms == LatentTerms::element);
      const F32 floor = splat(p.free_bits);
      const float factor = p.terms == LatentTerms::element ? p.beta : 1.0f;
      if (s > 0 && p.terms != LatentTerms::weights) {
        sweep(t.count(), [&](int64_t i, int n) {
          store_n(z + i, fma(load_n(std + i, n), noise.at(i, n), load_n(x.mean + i, n)), n);
        });
        continue;
      }
      sweep(t.count(), [&](int64_t i, int n) {
        const auto e = element<PRIOR>(x, i, n);
        const F32 eps = noise.at(i, n), at = fma(e.std, eps, e.mean);
        store_n(std + i, e.std, n);
        store_n(z + i, at, n);
        if (wants_kl) store_n(kl + i, factor * max(floor, e.kl()), n);
        if (p.terms == LatentTerms::weights) {
          const F32 from = fma(e.std, eps, e.away);
          store_n(first + i, fma(eps, eps, e.logvar), n);
          store_n(second + i, fma(from * from, e.precision, e.prior_logvar), n);
        }
      });
      if (p.terms == LatentTerms::row && s == 0) reduce(first, out.first, 0, 0);
      if (p.terms == LatentTerms::weights) {
        reduce(first, out.first, s, s);
        reduce(second, out.second, s, p.samples + s);
      }
    }
  });
  if (!out.partial) return;
  const int64_t planes = p.terms == LatentTerms::row ? 1 : p.samples;
  for (int64_t plane = 0; plane < (p.terms == LatentTerms::row ? 1 : 2) * planes; ++plane)
    for (int64_t row = 0; row < p.rows; ++row) {
      double total = 0;
      for (int64_t i = 0; i < tiles; ++i) total += out.partial[(plane * p.rows + row) * tiles + i];
      finish(p, &total, 1,
             (plane < planes ? out.first + plane * p.rows : out.second + (plane - planes) * p.rows) + row);
    }
}

void forward(const Latent& p, const LatentOut& out) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.prior_mean.data ? forward_as<T, true>(p, out) : forward_as<T, false>(p, out);
  });
}

// A row's number beside each of its elements.
void spread(const Tile& t, const float* rows, float* elements) {
  for (int64_t r = 0; r < t.rows; ++r)
    sweep(t.width(), [&](int64_t i, int n) { store_n(elements + r * t.width() + i, splat(rows[t.row + r]), n); });
}

// Sums over samples, an element each.
struct Sums {
  float dz[TILE], dz_eps[TILE], prior_mean[TILE], prior_logvar[TILE], logvar[TILE], noise[TILE];

  void clear(int64_t count) {
    sweep(count, [&](int64_t i, int n) {
      for (float* x : {dz, dz_eps, prior_mean, prior_logvar, logvar}) store_n(x + i, F32{}, n);
    });
  }
};

OP_INLINE void add(float* to, F32 x, int n) { store_n(to, load_n(to, n) + x, n); }

template <class T, bool PRIOR>
void sum_samples(const Latent& p, const LatentGradIn& in, const LatentGradOut& out, const Tile& t,
                 const Posterior<T>& x, Sums& sums) {
  Noise<T> noise;
  T scratch[TILE];
  float on_first[TILE], on_second[TILE];
  const bool weighted = p.terms == LatentTerms::weights;
  const bool has_first = weighted && in.first, has_second = weighted && in.second;
  const bool far = is_far<T>(p.rows * p.length());
  for (int64_t s = 0; s < p.samples; ++s) {
    const T* grad = gather(p, in.z, t, scratch, s * in.z_sample);
    noise.take(p, t, s, [&](int64_t i, int64_t n) {
      if (!far) return;
      if (grad) fetch(grad, i, n);
      if (s == 0) x.fetch_moments(i, n);
    });
    if (has_first) spread(t, in.first + s * p.rows, on_first);
    if (has_second) spread(t, in.second + s * p.rows, on_second);
    const int64_t draw = p.antithetic ? s / 2 : s;
    T* dnoise = out.noise ? static_cast<T*>(out.noise) + (draw * p.rows + t.row) * p.length() + t.begin : nullptr;
    const bool opens = !p.antithetic || s % 2 == 0, closes = !p.antithetic || s % 2 == 1;
    sweep(t.count(), [&](int64_t i, int n) {
      const F32 eps = noise.at(i, n);
      F32 dz = grad ? load_n(grad + i, n) : F32{}, deps{};
      if (has_second || dnoise) {
        const auto e = element<PRIOR>(x, i, n);
        if (has_second) {
          const F32 on = load_n(on_second + i, n), from = fma(e.std, eps, e.away), pull = on * from * e.precision;
          dz -= pull;
          add(sums.prior_mean + i, pull, n);
          add(sums.prior_logvar + i, 0.5f * fma(pull, from, -on), n);
        }
        deps = dz * e.std;
      }
      if (has_first) {
        const F32 on = load_n(on_first + i, n);
        add(sums.logvar + i, -0.5f * on, n);
        deps -= on * eps;
      }
      add(sums.dz + i, dz, n);
      add(sums.dz_eps + i, dz * eps, n);
      if (!dnoise) return;
      const F32 whole = opens ? deps : load_n(sums.noise + i, n) - deps;
      if (closes)
        store_n(dnoise + i, whole, n);
      else
        store_n(sums.noise + i, whole, n);
    });
  }
}

template <class T, bool PRIOR>
void backward_as(const Latent& p, const LatentGradIn& in, const LatentGradOut& out) {
  for_each_tile(p, [&](const Tile& t) {
    Posterior<T> x;
    Sums sums;
    Sink<T> mean, logvar, prior_mean, prior_logvar;
    float on_rows[TILE];
    x.open(p, t);
    mean.open(p, out.mean, t);
    logvar.open(p, out.logvar, t);
    prior_mean.open(p, out.prior_mean, t);
    prior_logvar.open(p, out.prior_logvar, t);
    sums.clear(t.count());
    const bool weighted = p.terms == LatentTerms::weights;
    if (in.z.data || (weighted && (in.first || in.second))) sum_samples<T, PRIOR>(p, in, out, t, x, sums);
    const float* on_kl = nullptr;
    if (in.first && p.terms == LatentTerms::element) on_kl = in.first + t.row * p.length() + t.begin;
    if (in.first && p.terms == LatentTerms::row) {
      spread(t, in.first, on_rows);
      on_kl = on_rows;
    }
    sweep(t.count(), [&](int64_t i, int n) {
      const auto e = element<PRIOR>(x, i, n);
      F32 dm = load_n(sums.dz + i, n);
      F32 dlv = fma(0.5f * e.std, load_n(sums.dz_eps + i, n), load_n(sums.logvar + i, n));
      F32 dpm = load_n(sums.prior_mean + i, n), dplv = load_n(sums.prior_logvar + i, n);
      if (on_kl) {
        const F32 on = e.kl() >= p.free_bits ? p.beta * load_n(on_kl + i, n) : F32{};
        const F32 slope = on * e.away * e.precision;
        dm += slope;
        dpm -= slope;
        dlv = fma(0.5f * on, e.ratio - 1.0f, dlv);
        dplv = fma(0.5f * on, 1.0f - e.ratio - e.away * e.away * e.precision, dplv);
      }
      store_n(mean.at + i, dm, n);
      store_n(logvar.at + i, e.free ? dlv : F32{}, n);
      if (prior_mean.at) store_n(prior_mean.at + i, dpm, n);
      if (prior_logvar.at) store_n(prior_logvar.at + i, dplv, n);
    });
    mean.close(p, out.mean, t);
    logvar.close(p, out.logvar, t);
    prior_mean.close(p, out.prior_mean, t);
    prior_logvar.close(p, out.prior_logvar, t);
  });
}

void backward(const Latent& p, const LatentGradIn& in, const LatentGradOut& out) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    p.prior_mean.data ? backward_as<T, true>(p, in, out) : backward_as<T, false>(p, in, out);
  });
}

}  // namespace

const LatentKernels latent = {forward, backward};

}  // namespace onepass::ONEPASS_ISA
