// The FFN activations, element by element, for the CPU and for CUDA: one struct per activation over a math policy.
//
// Straight-line code with selects instead of branches, so that compilers vectorise it. All math is fp32. NaN in gives
// NaN out; +-inf follows IEEE arithmetic on the formula, except where a comment takes the limit.
//
// A functor (X is a name of LING_FOR_EACH_ACTIVATION) has
//   X<Math>::gated, X<Math>::max_scalars            whether it takes (g, u) or x; slots of the scalars' gradients
//   X<Math>(params, scalars, num_scalars)           uses no Math: may be built on the host or on the device
//   forward(g, u)  or  forward(x)                   the activation
//   backward(g, u, dy, dg, du, dscalars)  or  backward(x, dy, dx, dscalars)
//                                                   returns the activation too (for the router weight's gradient) and
//                                                   adds to dscalars[0 .. max_scalars)
//   slot(i, num_scalars)                            where in dscalars the gradient of scalars[i] is
// and without scalars also first(), its function of g or x alone; a gated one goes on from that function's value by
// forward_from and backward_from.
//
// Math is a struct of static functions of float:
//   log2(x)                       x positive and finite, denormal too; anything else gives any value, without trapping
//   sigmoid(x), sigmoid(x, complement)              complement = 1 - sigmoid(x), without cancellation
//   tanh(x), tanh(x, slope)                         slope = 1 - tanh(x)^2, without cancellation
//   expm1(x, exp)                 exp(x) - 1 and exp(x) for x <= 0
//   gaussian(x)                   exp(-x^2 / 2)
//   normal_cdf(x, gaussian)       Phi(x) = erfc(-x / sqrt(2)) / 2 with relative accuracy in the left tail
#pragma once

#if defined(__CUDACC__)
#define LING_HD __host__ __device__ __forceinline__
#else
// always inlined: no copy compiled for one instruction set may be shared with code for another
#define LING_HD inline __attribute__((always_inline))
#endif

// X(name of the operator's argument, functor). `series` appears once per rho: see functor_name.
#define LING_FOR_EACH_ACTIVATION(X)  \
  X("powlu", PowLU)                  \
  X("swiglu", SwiGLU)                \
  X("geglu", GEGLU)                  \
  X("geglu_tanh", GEGLUTanh)         \
  X("quick_geglu", QuickGEGLU)       \
  X("reglu", ReGLU)                  \
  X("swiglu_clip", SwiGLUClip)       \
  X("swiglu_clip_post", SwiGLUClipPost) \
  X("situ_glu", SiTUGLU)             \
  X("fatreglu", FATReGLU)            \
  X("relu", ReLU)                    \
  X("relu2", ReLU2)                  \
  X("gelu", GELU)                    \
  X("silu", SiLU)                    \
  X("elu", ELU)                      \
  X("selu", SELU)                    \
  X("leaky_relu", LeakyReLU)         \
  X("polyrelu", PolyReLU)            \
  X("crrelu", CRReLU)                \
  X("series_gelu", SeriesGELU)       \
  X("series_relu", SeriesReLU)       \
  X("series_silu", SeriesSiLU)       \
  X("series_tanh", SeriesTanh)

namespace ling {

// Comparisons are written so that NaN passes through.
LING_HD float at_most(float x, float limit) { return x > limit ? limit : x; }
LING_HD float at_least(float x, float limit) { return x < limit ? limit : x; }
LING_HD float clip(float x, float limit) { return at_least(at_most(x, limit), -limit); }
// 1 where x > 0, 0 where x <= 0
LING_HD float step(float x) { return x > 0.0f ? 1.0f : (x <= 0.0f ? 0.0f : x); }
// 1 where x <= limit, 0 above
LING_HD float within(float x, float limit) { return x <= limit ? 1.0f : (x > limit ? 0.0f : x); }
LING_HD float within_both(float x, float limit) { return within(x, limit) * within(-x, limit); }

// ---- Functions of one number: phi(x) and phi(x, slope), which also gives phi'(x). ----

template <class Math>
struct Identity {
  LING_HD explicit Identity(const float*) {}
  LING_HD float operator()(float x) const { return x; }
  LING_HD float operator()(float x, float& slope) const { return slope = 1.0f, x; }
};

// x^(m/(sqrt(x)+1)) sigmoid(x) for x > 0, x sigmoid(x) else (arXiv 2605.25704). Its limit at +inf is 1.
//
// With e = e^-|x|, one division by 1 + e serves the power and the sigmoid: x^p / (1 + e) to the right of 0, x e / (1 + e)
// to the left. This is for HostMath, whose scaled functions it uses; FastMath has a PowLUGate of its own.
template <class Math>
struct PowLUGate {
  static constexpr float kSmallest = 1.401298464e-45f, kLargest = 3.4028234663852886e38f;
  float m, edge;

  LING_HD explicit PowLUGate(const float* params) : m(params[0]), edge(params[0] < 1.0f ? kSmallest : 1.0f) {}

  LING_HD float operator()(float g) const {
    const float power = Math::scaled_exp2(m / (Math::sqrt(g) + 1.0f) * Math::log2(g));
    const float e = Math::scaled_exp(Math::minus_magnitude(g));
    return (g > 0.0f ? power : g * e) / (Math::kScale + e);
  }

  // f' = sigmoid(x) x^(p-1) (p (1 - ln(x)/2 sqrt(x)/(sqrt(x)+1)) + x (1 - sigmoid(x))), p = m/(sqrt(x)+1): unlike
  // f (p/x + p' ln x + 1 - sigmoid(x)) it has no p/x, which overflows at denormals. The power computed is x^(p-1) below
  // an edge, since x^p underflows first there, and x^p from there on, since x^(p-1) underflows. The edge is 1; for m < 1,
  // where x^(p-1) grows towards 0, all of x > 0 is beyond it.
  LING_HD float operator()(float g, float& slope) const {
    constexpr float kHalfLn2 = 0.34657359027997264f;
    const float x = at_most(g, kLargest);
    const float root = Math::sqrt(x);
    const float shrink = 1.0f / (root + 1.0f);
    const float p = m * shrink;
    const float log2_x = Math::log2(x);
    const float e = Math::scaled_exp(Math::minus_magnitude(x));
    const bool right = g > 0.0f, below = !(g >= edge);
    const float power = Math::scaled_exp2((p - (below ? 1.0f : 0.0f)) * log2_x);
    const float inverse = 1.0f / (Math::kScale + e);
    const float quotient = (right ? power : e) * inverse;  // the value, or below the edge value / x
    const float factor = right ? p * (1.0f - kHalfLn2 * log2_x * (root * shrink)) : 1.0f;
    const float complement = (right ? e : Math::kScale) * inverse;
    slope = quotient / (below ? 1.0f : x) * (factor + x * complement);
    return quotient * (below ? x : 1.0f);
  }
};

template <class Math>
struct SiLUOf {
  LING_HD explicit SiLUOf(const float*) {}
  LING_HD float operator()(float x) const { return x * Math::sigmoid(x); }
  LING_HD float operator()(float x, float& slope) const {
    float complement;
    const float sigma = Math::sigmoid(x, complement);
    slope = sigma * (1.0f + x * complement);
    return x * sigma;
  }
};

template <class Math>
struct GELUOf {
  LING_HD explicit GELUOf(const float*) {}
  LING_HD float operator()(float x) const {
    float gaussian;
    return x * Math::normal_cdf(x, gaussian);
  }
  LING_HD float operator()(float x, float& slope) const {
    constexpr float kInverseRoot2Pi = 0.3989422804014327f;
    float gaussian;
    const float cdf = Math::normal_cdf(x, gaussian);
    slope = cdf + x * (gaussian * kInverseRoot2Pi);
    return x * cdf;
  }
};

// x/2 (1 + tanh(z/2)) = x sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3): the sigmoid keeps the left tail's accuracy
template <class Math>
struct GELUTanhOf {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = 0.07135481282784394f;
  LING_HD explicit GELUTanhOf(const float*) {}
  LING_HD float operator()(float x) const {
    const float c = clip(x, 32.0f);  // the sigmoid is 0 or 1 beyond; x^3 must not overflow
    return x * Math::sigmoid(c * (kLinear + kCubic * c * c));
  }
  LING_HD float operator()(float x, float& slope) const {
    const float c = clip(x, 32.0f);
    float complement;
    const float sigma = Math::sigmoid(c * (kLinear + kCubic * c * c), complement);
    slope = sigma * (1.0f + x * complement * (kLinear + 3.0f * kCubic * c * c));
    return x * sigma;
  }
};

template <class Math>
struct QuickGELUOf {
  static constexpr float kAlpha = 1.702f;
  LING_HD explicit QuickGELUOf(const float*) {}
  LING_HD float operator()(float x) const { return x * Math::sigmoid(kAlpha * x); }
  LING_HD float operator()(float x, float& slope) const {
    float complement;
    const float sigma = Math::sigmoid(kAlpha * x, complement);
    slope = sigma * (1.0f + kAlpha * x * complement);
    return x * sigma;
  }
};

template <class Math>
struct ReLUOf {
  LING_HD explicit ReLUOf(const float*) {}
  LING_HD float operator()(float x) const { return at_least(x, 0.0f); }
  LING_HD float operator()(float x, float& slope) const { return slope = step(x), at_least(x, 0.0f); }
};

template <class Math>
struct ReLU2Of {
  LING_HD explicit ReLU2Of(const float*) {}
  LING_HD float operator()(float x) const {
    const float r = at_least(x, 0.0f);
    return r * r;
  }
  LING_HD float operator()(float x, float& slope) const {
    const float r = at_least(x, 0.0f);
    slope = 2.0f * r;
    return r * r;
  }
};

// x where x >= t, else 0
template <class Math>
struct FATReLUOf {
  float t;
  LING_HD explicit FATReLUOf(const float* params) : t(params[0]) {}
  LING_HD float operator()(float x) const { return x < t ? 0.0f : x; }
  LING_HD float operator()(float x, float& slope) const {
    slope = x < t ? 0.0f : (x >= t ? 1.0f : x);
    return x < t ? 0.0f : x;
  }
};

// scale * (x for x > 0, alpha (e^x - 1) else)
template <class Math>
LING_HD float scaled_elu(float x, float scale, float alpha, float& slope) {
  float exp;
  const float expm1 = Math::expm1(at_most(x, 0.0f), exp);
  slope = scale * (x > 0.0f ? 1.0f : alpha * exp);
  return scale * (x > 0.0f ? x : alpha * expm1);
}

template <class Math>
struct ELUOf {
  LING_HD explicit ELUOf(const float*) {}
  LING_HD float operator()(float x) const {
    float slope;
    return (*this)(x, slope);
  }
  LING_HD float operator()(float x, float& slope) const { return scaled_elu<Math>(x, 1.0f, 1.0f, slope); }
};

template <class Math>
struct SELUOf {
  LING_HD explicit SELUOf(const float*) {}
  LING_HD float operator()(float x) const {
    float slope;
    return (*this)(x, slope);
  }
  LING_HD float operator()(float x, float& slope) const {
    return scaled_elu<Math>(x, 1.0507009873554805f, 1.6732632423543772f, slope);
  }
};

template <class Math>
struct TanhOf {
  LING_HD explicit TanhOf(const float*) {}
  LING_HD float operator()(float x) const { return Math::tanh(x); }
  LING_HD float operator()(float x, float& slope) const { return Math::tanh(x, slope); }
};

// g' sigmoid(alpha g'), g' = min(g, limit)
template <class Math>
struct ClippedGate {
  float limit, alpha;
  LING_HD explicit ClippedGate(const float* params) : limit(params[0]), alpha(params[1]) {}
  LING_HD float operator()(float g) const {
    const float x = at_most(g, limit);
    return x * Math::sigmoid(alpha * x);
  }
  LING_HD float operator()(float g, float& slope) const {
    const float x = at_most(g, limit);
    float complement;
    const float sigma = Math::sigmoid(alpha * x, complement);
    slope = sigma * (1.0f + alpha * x * complement) * within(g, limit);
    return x * sigma;
  }
};

// clip(u, -limit, limit) + beta
template <class Math>
struct ShiftedClip {
  float limit, beta;
  LING_HD explicit ShiftedClip(const float* params) : limit(params[0]), beta(params[2]) {}
  LING_HD float operator()(float u) const { return clip(u, limit) + beta; }
  LING_HD float operator()(float u, float& slope) const { return slope = within_both(u, limit), clip(u, limit) + beta; }
};

// min(SiLU(g), limit)
template <class Math>
struct LimitedSiLU {
  float limit;
  LING_HD explicit LimitedSiLU(const float* params) : limit(params[0]) {}
  LING_HD float operator()(float g) const { return at_most(g * Math::sigmoid(g), limit); }
  LING_HD float operator()(float g, float& slope) const {
    const float value = SiLUOf<Math>(nullptr)(g, slope);
    slope *= within(value, limit);
    return at_most(value, limit);
  }
};

template <class Math>
struct Clip {
  float limit;
  LING_HD explicit Clip(const float* params) : limit(params[0]) {}
  LING_HD float operator()(float u) const { return clip(u, limit); }
  LING_HD float operator()(float u, float& slope) const { return slope = within_both(u, limit), clip(u, limit); }
};

// beta1 tanh(g / beta1) sigmoid(g)
template <class Math>
struct SiTUGate {
  float beta, inverse;
  LING_HD explicit SiTUGate(const float* params) : beta(params[0]), inverse(1.0f / params[0]) {}
  LING_HD float operator()(float g) const { return beta * Math::tanh(g * inverse) * Math::sigmoid(g); }
  LING_HD float operator()(float g, float& slope) const {
    float tanh_slope, complement;
    const float bounded = beta * Math::tanh(g * inverse, tanh_slope);
    const float sigma = Math::sigmoid(g, complement);
    slope = sigma * (tanh_slope + bounded * complement);
    return bounded * sigma;
  }
};

// beta2 tanh(u / beta2)
template <class Math>
struct SiTUUp {
  float beta, inverse;
  LING_HD explicit SiTUUp(const float* params) : beta(params[1]), inverse(1.0f / params[1]) {}
  LING_HD float operator()(float u) const { return beta * Math::tanh(u * inverse); }
  LING_HD float operator()(float u, float& slope) const { return beta * Math::tanh(u * inverse, slope); }
};

// ---- The activations. ----

template <class Gate, class Up>
struct Gated {
  static constexpr bool gated = true;
  static constexpr int max_scalars = 0;
  Gate gate;
  Up up;

  LING_HD Gated(const float* params, const float*, int) : gate(params), up(params) {}
  LING_HD static int slot(int i, int) { return i; }
  LING_HD const Gate& first() const { return gate; }
  LING_HD float forward(float g, float u) const { return forward_from(gate(g), u); }
  LING_HD float forward_from(float gate_value, float u) const { return gate_value * up(u); }
  LING_HD float backward(float g, float u, float dy, float& dg, float& du, float*) const {
    float gate_slope;
    const float gate_value = gate(g, gate_slope);
    return backward_from(gate_value, gate_slope, u, dy, dg, du);
  }
  LING_HD float backward_from(float gate_value, float gate_slope, float u, float dy, float& dg, float& du) const {
    float up_slope;
    const float up_value = up(u, up_slope);
    dg = dy * up_value * gate_slope;
    du = dy * gate_value * up_slope;
    return gate_value * up_value;
  }
};

template <class Phi>
struct Ungated {
  static constexpr bool gated = false;
  static constexpr int max_scalars = 0;
  Phi phi;

  LING_HD Ungated(const float* params, const float*, int) : phi(params) {}
  LING_HD static int slot(int i, int) { return i; }
  LING_HD const Phi& first() const { return phi; }
  LING_HD float forward(float x) const { return phi(x); }
  LING_HD float backward(float x, float dy, float& dx, float*) const {
    float slope;
    const float value = phi(x, slope);
    dx = dy * slope;
    return value;
  }
};

template <class Math> using PowLU = Gated<PowLUGate<Math>, Identity<Math>>;
template <class Math> using SwiGLU = Gated<SiLUOf<Math>, Identity<Math>>;
template <class Math> using GEGLU = Gated<GELUOf<Math>, Identity<Math>>;
template <class Math> using GEGLUTanh = Gated<GELUTanhOf<Math>, Identity<Math>>;
template <class Math> using QuickGEGLU = Gated<QuickGELUOf<Math>, Identity<Math>>;
template <class Math> using ReGLU = Gated<ReLUOf<Math>, Identity<Math>>;
template <class Math> using SwiGLUClip = Gated<ClippedGate<Math>, ShiftedClip<Math>>;
template <class Math> using SwiGLUClipPost = Gated<LimitedSiLU<Math>, Clip<Math>>;
template <class Math> using SiTUGLU = Gated<SiTUGate<Math>, SiTUUp<Math>>;
template <class Math> using FATReGLU = Gated<FATReLUOf<Math>, Identity<Math>>;

template <class Math> using ReLU = Ungated<ReLUOf<Math>>;
template <class Math> using ReLU2 = Ungated<ReLU2Of<Math>>;
template <class Math> using GELU = Ungated<GELUOf<Math>>;
template <class Math> using SiLU = Ungated<SiLUOf<Math>>;
template <class Math> using ELU = Ungated<ELUOf<Math>>;
template <class Math> using SELU = Ungated<SELUOf<Math>>;

// x > 0: x, else s x; scalars [s]
template <class Math>
struct LeakyReLU {
  static constexpr bool gated = false;
  static constexpr int max_scalars = 1;
  float s;

  LING_HD LeakyReLU(const float*, const float* scalars, int) : s(scalars[0]) {}
  LING_HD static int slot(int i, int) { return i; }
  LING_HD float forward(float x) const { return x > 0.0f ? x : s * x; }
  LING_HD float backward(float x, float dy, float& dx, float* dscalars) const {
    dx = x > 0.0f ? dy : s * dy;
    dscalars[0] += dy * at_most(x, 0.0f);
    return x > 0.0f ? x : s * x;
  }
};

// a3 r^3 + a2 r^2 + a1 r + a0, r = max(0, x); scalars [a3, a2, a1, a0] (PolyCom, arXiv 2411.03884)
template <class Math>
struct PolyReLU {
  static constexpr bool gated = false;
  static constexpr int max_scalars = 4;
  float a3, a2, a1, a0;

  LING_HD PolyReLU(const float*, const float* scalars, int)
      : a3(scalars[0]), a2(scalars[1]), a1(scalars[2]), a0(scalars[3]) {}
  LING_HD static int slot(int i, int) { return i; }
  LING_HD float forward(float x) const {
    const float r = at_least(x, 0.0f);
    return ((a3 * r + a2) * r + a1) * r + a0;
  }
  LING_HD float backward(float x, float dy, float& dx, float* dscalars) const {
    const float r = at_least(x, 0.0f);
    dx = dy * ((3.0f * a3 * r + 2.0f * a2) * r + a1) * step(x);
    dscalars[0] += dy * (r * r * r);
    dscalars[1] += dy * (r * r);
    dscalars[2] += dy * r;
    dscalars[3] += dy;
    return ((a3 * r + a2) * r + a1) * r + a0;
  }
};

// max(0, x) + epsilon x exp(-x^2/2); scalars [epsilon]
template <class Math>
struct CRReLU {
  static constexpr bool gated = false;
  static constexpr int max_scalars = 1;
  float epsilon;

  LING_HD CRReLU(const float*, const float* scalars, int) : epsilon(scalars[0]) {}
  LING_HD static int slot(int i, int) { return i; }
  LING_HD float forward(float x) const {
    const float c = clip(x, 32.0f);  // the bell is 0 beyond; 0 * inf is not
    return at_least(x, 0.0f) + epsilon * (c * Math::gaussian(c));
  }
  LING_HD float backward(float x, float dy, float& dx, float* dscalars) const {
    const float c = clip(x, 32.0f);
    const float gaussian = Math::gaussian(c);
    const float bell = c * gaussian;
    dx = dy * (step(x) + epsilon * ((1.0f - c) * (1.0f + c) * gaussian));
    dscalars[0] += dy * bell;
    return at_least(x, 0.0f) + epsilon * bell;
  }
};

// sum over i of rho(a_i x + b_i); scalars [a_1 .. a_n, b_1 .. b_n], n <= 8. A library that vectorises may sum the terms
// itself: term(i, x), term_backward(i, x, dy, da, db), which adds to da and db and returns rho; dx is added to as well.
template <class Rho>
struct Series {
  static constexpr bool gated = false;
  static constexpr int max_terms = 8;
  static constexpr int max_scalars = 2 * max_terms;
  int terms;
  float a[max_terms], b[max_terms];

  LING_HD Series(const float*, const float* scalars, int num_scalars) : terms(num_scalars / 2) {
    for (int i = 0; i < max_terms; ++i) {
      a[i] = i < terms ? scalars[i] : 0.0f;
      b[i] = i < terms ? scalars[terms + i] : 0.0f;
    }
  }
  LING_HD static int slot(int i, int num_scalars) {
    return i < num_scalars / 2 ? i : max_terms + i - num_scalars / 2;
  }
  LING_HD float term(int i, float x) const { return Rho(nullptr)(a[i] * x + b[i]); }
  LING_HD float term_backward(int i, float x, float dy, float& dx, float& da, float& db) const {
    float slope;
    const float value = Rho(nullptr)(a[i] * x + b[i], slope);
    const float dz = dy * slope;
    dx += dz * a[i];
    da += dz * x;
    db += dz;
    return value;
  }
  // The loops have a constant length, with a test inside, so that they unroll into constant indices.
  LING_HD float forward(float x) const {
    float y = 0.0f;
    for (int i = 0; i < max_terms; ++i)
      if (i < terms) y += term(i, x);
    return y;
  }
  LING_HD float backward(float x, float dy, float& dx, float* dscalars) const {
    float y = 0.0f;
    dx = 0.0f;
    for (int i = 0; i < max_terms; ++i)
      if (i < terms) y += term_backward(i, x, dy, dx, dscalars[i], dscalars[max_terms + i]);
    return y;
  }
};

template <class Math> using SeriesGELU = Series<GELUOf<Math>>;
template <class Math> using SeriesReLU = Series<ReLUOf<Math>>;
template <class Math> using SeriesSiLU = Series<SiLUOf<Math>>;
template <class Math> using SeriesTanh = Series<TanhOf<Math>>;

// The functor's name (of LING_FOR_EACH_ACTIVATION) for an operator's arguments: params[0] of a series says which rho.
inline const char* functor_name(const char* name, const double* params, int num_params) {
  constexpr const char* kSeries[] = {"series_gelu", "series_relu", "series_silu", "series_tanh"};
  const char* series = "series";
  for (int i = 0; name[i] == series[i]; ++i)
    if (name[i] == '\0') {
      const int rho = num_params > 0 ? static_cast<int>(params[0]) : -1;
      return rho >= 0 && rho < 4 ? kSeries[rho] : name;
    }
  return name;
}

}  // namespace ling
