// What the vectors of a pair decide once for all their elements, in double: the angle between them, the coefficients of
// a point on their great circle, and those of its gradients. The same sums, roots and polynomials on the CPU and in
// CUDA; kernels/interpolate.py follows them. Every function is static, so that each instruction set has its own.
#pragma once
#include <math.h>

#include "onepass/interpolate.h"

#if defined(__CUDACC__)
#define ONEPASS_OWN static __host__ __device__ __forceinline__
#else
#define ONEPASS_OWN static inline
#endif

namespace onepass {

inline constexpr double PI = 3.14159265358979323846;
inline constexpr double PARALLEL = 1e-4;  // radians from 0 or from pi inside which a direction is lost in rounding

enum class Bend : int { none = 0, some, half };  // parallel, of length 0 or not finite; an angle; opposite

struct Pair {
  Bend bend;
  double size_a, size_b, angle, sine, cosine;  // the angle in units of pi
};

// result = a start + b end, and `extra` at `axis` if that is not -1; `copy` and `line` are exact where they meet them.
enum class Blend : int { start = 0, end, line, arc };

struct Point {
  Blend blend;
  float a, b, extra;
  int64_t axis;
};

// Gradients of start and end: own g + aa a + ab b (+ extra at axis), own_b g + ab_b a + bb b. Where only `plain`, the
// first factors alone: then a and b are not read, nor g where its factor is 0.
struct Pull {
  bool plain;
  float g_a, a_a, b_a, g_b, a_b, b_b, extra;
  int64_t axis;
  double weight;
};

// sin(pi x) within 1e-15.
ONEPASS_OWN double sin_pi(double x) {
  const double whole = rint(x), y = PI * (x - whole), z = y * y;
  double p = -1.0 / 25852016738884976640000.0;  // Taylor's, to the 23rd power
  p = p * z + 1.0 / 51090942171709440000.0;
  p = p * z - 1.0 / 121645100408832000.0;
  p = p * z + 1.0 / 355687428096000.0;
  p = p * z - 1.0 / 1307674368000.0;
  p = p * z + 1.0 / 6227020800.0;
  p = p * z - 1.0 / 39916800.0;
  p = p * z + 1.0 / 362880.0;
  p = p * z - 1.0 / 5040.0;
  p = p * z + 1.0 / 120.0;
  p = p * z - 1.0 / 6.0;
  const double sine = y + y * z * p, half = 0.5 * whole;
  return rint(half) == half ? sine : -sine;
}

ONEPASS_OWN double cos_pi(double x) { return sin_pi(x + 0.5); }

// The angle whose cosine and sine these are, 0 <= cosine, 0 <= sine, within 1e-15: three times its half, then Taylor's
// arctangent of at most 0.2.
ONEPASS_OWN double angle_of(double cosine, double sine) {
  double h = sine / (1.0 + cosine);
  h = h / (1.0 + sqrt(1.0 + h * h));
  h = h / (1.0 + sqrt(1.0 + h * h));
  const double z = h * h;
  double p = 1.0 / 23.0;
  p = 1.0 / 21.0 - z * p;
  p = 1.0 / 19.0 - z * p;
  p = 1.0 / 17.0 - z * p;
  p = 1.0 / 15.0 - z * p;
  p = 1.0 / 13.0 - z * p;
  p = 1.0 / 11.0 - z * p;
  p = 1.0 / 9.0 - z * p;
  p = 1.0 / 7.0 - z * p;
  p = 1.0 / 5.0 - z * p;
  p = 1.0 / 3.0 - z * p;
  return 8.0 * (h - h * z * p);
}

// In double the squares of floats neither overflow nor vanish, and 1 - cosine^2 keeps 1e-8 of the smallest angle.
ONEPASS_OWN Pair pair_of(const PairSums& s) {
  Pair x{Bend::none, sqrt(s.aa), sqrt(s.bb), 0, 0, 0};
  const double infinity = static_cast<double>(INFINITY);
  if (!(s.aa > 0 && s.bb > 0 && s.aa < infinity && s.bb < infinity)) return x;
  const double product = x.size_a * x.size_b, square = s.aa * s.bb - s.ab * s.ab;
  x.cosine = s.ab / product;
  x.sine = square > 0 ? sqrt(square) / product : 0.0;
  const double near = angle_of(fabs(x.cosine), x.sine);  // from the line through both
  if (near < PARALLEL) {
    x.bend = x.cosine < 0 ? Bend::half : Bend::none;
    return x;
  }
  x.bend = Bend::some;
  x.angle = x.cosine < 0 ? 1.0 - near / PI : near / PI;
  return x;
}

// Half a turn goes through the axis in which start is smallest, there start / its length = u: the part of the axis
// across start has this length's inverse, 0 in one dimension.
ONEPASS_OWN double across_of(double u) { return 1.0 - u * u > 0 ? 1.0 / sqrt(1.0 - u * u) : 0.0; }

ONEPASS_OWN Point line_point(float t) {
  if (t == 0) return {Blend::start, 1, 0, 0, -1};
  if (t == 1) return {Blend::end, 0, 1, 0, -1};
  return {Blend::line, t, 1 - t, 0, -1};
}

// `smallest`: start's element at `axis`, read of opposite vectors alone.
ONEPASS_OWN Point point_of(const Pair& x, float weight, double smallest, int64_t axis) {
  if (weight == 0 || weight == 1 || x.bend == Bend::none) return line_point(weight);
  const double t = weight;
  if (x.bend == Bend::some) {
    const double a = sin_pi((1.0 - t) * x.angle) / x.sine, b = sin_pi(t * x.angle) / x.sine;
    return {Blend::arc, static_cast<float>(a), static_cast<float>(b), 0, -1};
  }
  const double u = smallest / x.size_a, inverse = across_of(u), size = (1.0 - t) * x.size_a + t * x.size_b;
  const double sine = sin_pi(t) * inverse;
  return {Blend::arc, static_cast<float>((cos_pi(t) - sine * u) * (size / x.size_a)), 0,
          static_cast<float>(sine * size), axis};
}

ONEPASS_OWN Pull line_pull(float weight, const PairSums& s) {
  if (weight == 0) return {true, 1, 0, 0, 0, 0, 0, 0, -1, 0};
  if (weight == 1) return {true, 0, 0, 0, 1, 0, 0, 0, -1, 0};
  return {true, 1 - weight, 0, 0, weight, 0, 0, 0, -1, s.gb - s.ga};
}

// `grad_there`: the gradient's element at `axis`.
ONEPASS_OWN Pull pull_of(const Pair& x, float weight, const PairSums& s, double smallest, double grad_there,
                         int64_t axis) {
  if (weight == 0 || weight == 1 || x.bend == Bend::none) return line_pull(weight, s);
  const double t = weight;
  if (x.bend == Bend::some) {
    const double at_a = (1.0 - t) * x.angle, at_b = t * x.angle, w = PI * x.angle;
    const double a = sin_pi(at_a) / x.sine, b = sin_pi(at_b) / x.sine, cos_a = cos_pi(at_a), cos_b = cos_pi(at_b);
    const double on_angle =
        (((1.0 - t) * cos_a - a * x.cosine) * s.ga + (t * cos_b - b * x.cosine) * s.gb) / x.sine / x.sine;
    const double other = -on_angle / (x.size_a * x.size_b), own = on_angle * x.cosine;
    return {false,
            static_cast<float>(a),
            static_cast<float>(own / s.aa),
            static_cast<float>(other),
            static_cast<float>(b),
            static_cast<float>(other),
            static_cast<float>(own / s.bb),
            0,
            -1,
            w / x.sine * (cos_b * s.gb - cos_a * s.ga)};
  }
  const double u = smallest / x.size_a, inverse = across_of(u), size = (1.0 - t) * x.size_a + t * x.size_b;
  const double cosine = cos_pi(t), sine = sin_pi(t), gu = s.ga / x.size_a;
  const double across = (grad_there - u * gu) * inverse, along = cosine * gu + sine * across;
  const double straight = cosine - sine * inverse * u, to_axis = sine * inverse * (across * inverse * u - gu);
  const double back = straight * gu + to_axis * u, scale = size / x.size_a;
  return {false,
          static_cast<float>(scale * straight),
          static_cast<float>(((1.0 - t) * along - scale * back) / x.size_a),
          0,
          0,
          0,
          static_cast<float>(t * along / x.size_b),
          static_cast<float>(scale * to_axis),
          axis,
          (x.size_b - x.size_a) * along + size * PI * (cosine * across - sine * gu)};
}

}  // namespace onepass
