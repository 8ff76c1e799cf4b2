// The GPU's math policies (see functors.h).
//
// bf16 and fp16 tensors: FastMath, the special-function unit's approximations, arranged so that relative accuracy holds
// down to fp32's denormals. fp32 tensors: the CPU's own arithmetic, HostMath, which needs no unit but the FMA pipe.
//
// FastMath takes its approximations from a struct, so that tests can put worst-case ones in their place on the host.
#pragma once

#include "functors.h"
#include "math_host.h"
#include "storage.h"

namespace ling {

#if defined(__CUDACC__)
// Each is one instruction of the special-function unit (MUFU); denormal arguments and results count as 0. Errors from
// the PTX ISA: ex2 2^-22 relative; lg2 2^-22 absolute within (0.5, 2), relative elsewhere; rcp 1 ulp; sqrt 2^-23
// relative; tanh 2^-11 relative.
struct DeviceIntrinsics {
  __device__ __forceinline__ static float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ static float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ static float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ static float sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  __device__ __forceinline__ static float tanh(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};
#endif

template <class Intrinsics>
struct FastMath {
  static constexpr float kLog2E = 1.44269504f;

  // The square of a number that is never denormal: the product may be, and is then rounded, not flushed.
  LING_HD static float exp2(float x) {
    const float root = Intrinsics::ex2(0.5f * x);
    return root * root;
  }
  LING_HD static float log2(float x) {
    const bool denormal = x < 1.17549435e-38f;
    const float log = Intrinsics::lg2(denormal ? x * 16777216.0f : x);
    return denormal ? log - 24.0f : log;
  }

  LING_HD static float sigmoid(float x) {
    const float e = exp2(-kLog2E * magnitude(x));
    return (x < 0.0f ? e : 1.0f) * Intrinsics::rcp(1.0f + e);
  }
  LING_HD static float sigmoid(float x, float& complement) {
    const float e = exp2(-kLog2E * magnitude(x));
    const float large = Intrinsics::rcp(1.0f + e);
    const float small = e * large;
    complement = x < 0.0f ? large : small;
    return x < 0.0f ? small : large;
  }

  LING_HD static float tanh(float x) { return Intrinsics::tanh(x); }
  LING_HD static float tanh(float x, float& slope) {
    const float e = exp2(-2.0f * kLog2E * magnitude(x));
    const float inverse = Intrinsics::rcp(1.0f + e);
    slope = 4.0f * e * inverse * inverse;
    return Intrinsics::tanh(x);
  }

  LING_HD static float expm1(float x, float& exp) {
    exp = exp2(kLog2E * x);
    const float near_0 = x * (0.99999976f + x * (0.4999693f + x * (0.16605508f + x * 0.03770999f)));
    return x > -0.25f ? near_0 : exp - 1.0f;
  }

  LING_HD static float gaussian(float x) {
    const float c = clip(x, 15.0f);
    return exp2(-0.5f * kLog2E * c * c);
  }

  LING_HD static float normal_cdf(float x, float& density) {
    // As HostMath's, with fewer terms: P is within 2^-18.
    const float t = at_most(magnitude(x), 15.0f);
    const float inverse = Intrinsics::rcp(t + 4.0f);
    const float w = (t - 4.0f) * inverse;
    float p = -0.00465723f;
    p = p * w - 0.00666359f;
    p = p * w + 0.06110471f;
    p = p * w - 0.18668793f;
    p = p * w + 0.38703468f;
    p = p * w - 0.6078855f;
    p = p * w + 0.7552871f;
    density = gaussian(x);
    const float tail = density * (p * inverse);
    return x < 0.0f ? tail : 1.0f - tail;
  }
};

// PowLU's gate with five special functions per element, forward and backward, where the formulas name six and seven:
// one reciprocal, of (sqrt(x) + 1) (1 + e^-|g|), serves the exponent and the sigmoid. sqrt(x) is 0 for g <= 0, so that
// there the reciprocal is the sigmoid's alone. x^p comes from x^(p-1), which is never below 2^-128 for x > 1.
template <class Intrinsics>
struct PowLUGate<FastMath<Intrinsics>> {
  using Math = FastMath<Intrinsics>;
  static constexpr float kLargest = 3.4028234663852886e38f;
  float half_m;

  LING_HD explicit PowLUGate(const float* params) : half_m(0.5f * params[0]) {}

  LING_HD float operator()(float g) const {
    const float x = at_most(g, kLargest);
    const float e = Math::exp2(-Math::kLog2E * magnitude(g));
    const float root_plus_1 = Intrinsics::sqrt(max_number(x, 0.0f)) + 1.0f;
    const float e_plus_1 = 1.0f + e;
    const float inverse = Intrinsics::rcp(root_plus_1 * e_plus_1);
    const float root_of_power = Intrinsics::ex2(half_m * e_plus_1 * inverse * Math::log2(x));
    const float value = g > 0.0f ? root_of_power * root_of_power : g * e;
    return value * (root_plus_1 * inverse);
  }

  LING_HD float operator()(float g, float& slope) const {
    constexpr float kHalfLn2 = 0.34657359027997264f;
    const float x = at_most(g, kLargest);
    const float e = Math::exp2(-Math::kLog2E * magnitude(g));
    const float root = Intrinsics::sqrt(max_number(x, 0.0f));
    const float root_plus_1 = root + 1.0f;
    const float e_plus_1 = 1.0f + e;
    const float inverse = Intrinsics::rcp(root_plus_1 * e_plus_1);
    const float shrink = e_plus_1 * inverse;
    const float large = root_plus_1 * inverse;  // sigmoid(|g|)
    const float small = e * large;
    const float log2_x = Math::log2(x);
    const float root_of_power = Intrinsics::ex2((half_m * shrink - 0.5f) * log2_x);
    const float x_p_minus_1 = root_of_power * root_of_power;
    const float p = 2.0f * half_m * shrink;
    const float right = x_p_minus_1 * large * (p * (1.0f - kHalfLn2 * log2_x * (root * shrink)) + x * small);
    const float left = small * (1.0f + g * large);
    slope = g > 0.0f ? right : left;
    return g > 0.0f ? x_p_minus_1 * x * large : g * small;
  }
};

#if defined(__CUDACC__)
template <class T>
struct MathFor {
  using type = FastMath<DeviceIntrinsics>;
};
template <>
struct MathFor<F32> {
  using type = LING_CPU_NAMESPACE::HostMath;
};
#endif

}  // namespace ling
