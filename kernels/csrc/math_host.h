// The CPU's math policy (see functors.h): within about 2 ulp, denormals honoured, and nothing that a compiler could not
// vectorise: no calls, no branches, no tables. Needs only IEEE arithmetic, with or without fused multiply-add.
#pragma once

#include <cstdint>

#include "functors.h"

// One copy of everything per instruction set that this is compiled for.
#ifndef LING_CPU_NAMESPACE
#define LING_CPU_NAMESPACE generic
#endif

namespace ling::LING_CPU_NAMESPACE {

// not std::bit_cast, of which the linker would keep one copy for all instruction sets
template <class To, class From>
constexpr LING_HD To bit_cast(From x) {
  return __builtin_bit_cast(To, x);
}

struct HostMath {
  // For x >= 0; below 0, any value.
  LING_HD static float sqrt(float x) { return __builtin_sqrtf(x); }

  // 2^64: results of scaled_exp2 and scaled_exp are times this, so that none is denormal. Where a quotient of them is
  // wanted it drops out, and nothing needs rounding twice.
  static constexpr float kScale = 18446744073709551616.0f;

  // For x < 63; above, and for NaN, anything.
  LING_HD static float scaled_exp2(float x) {
    const float c = at_least_negative(x, -160.0f);
    const float rounded = c + kRounder;
    const float scale = power_of_2(rounded);
    const float r = c - (rounded - kRounder);
    // 2^r - 1, |r| <= 1/2
    float q = 0.000154758978f;
    q = q * r + 0.00134002836f;
    q = q * r + 0.00961800572f;
    q = q * r + 0.055503279f;
    q = q * r + 0.240226507f;
    q = q * r + 0.693147182f;
    return scale + scale * (q * r);
  }

  // e^x for x <= 0; for NaN, anything.
  LING_HD static float scaled_exp(float x) {
    const float c = at_least_negative(x, -110.0f);
    const float rounded = c * kLog2E + kRounder;
    const float scale = power_of_2(rounded);
    return scale + scale * expm1_near_0(minus_n_ln2(c, rounded - kRounder));
  }

  // For +inf, a finite number.
  LING_HD static float log2(float x) {
    const bool denormal = x < kSmallestNormal;
    const float scaled = denormal ? x * 8388608.0f : x;  // 2^23
    // x = 2^k c, sqrt(1/2) <= c < sqrt(2)
    constexpr uint32_t kLowest = bit_cast<uint32_t>(0.70710678f);
    const uint32_t offset = bit_cast<uint32_t>(scaled) - kLowest;
    const float k = static_cast<float>((static_cast<int32_t>(offset) >> 23) - (denormal ? 23 : 0));
    const float c = bit_cast<float>((offset & 0x007fffffu) + kLowest);
    // log2(c) = 2 artanh(s) / ln 2, in odd powers of s = (c - 1) / (c + 1)
    const float s = (c - 1.0f) / (c + 1.0f);
    const float z = s * s;
    float q = 0.431745976f;
    q = q * z + 0.576714039f;
    q = q * z + 0.961798847f;
    q = q * z + 2.88539004f;
    return k + s * q;
  }

  LING_HD static float minus_magnitude(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) | 0x80000000u); }

  LING_HD static float sigmoid(float x) {
    float complement;
    return sigmoid(x, complement);
  }
  LING_HD static float sigmoid(float x, float& complement) {
    const float e = exp(minus_magnitude(x));
    const float large = 1.0f / (1.0f + e);
    const float small = e * large;
    complement = x < 0.0f ? large : small;
    return x < 0.0f ? small : large;
  }

  LING_HD static float tanh(float x) {
    float slope;
    return tanh(x, slope);
  }
  LING_HD static float tanh(float x, float& slope) {
    float e;
    const float e_minus_1 = expm1(2.0f * minus_magnitude(x), e);
    const float sum = 1.0f + e;
    slope = 4.0f * e / (sum * sum);
    return with_sign_of(-e_minus_1 / sum, x);
  }

  LING_HD static float expm1(float x, float& exp) {
    const float c = at_least(x, -110.0f);
    const float rounded = c * kLog2E + kRounder;
    const float scale = power_of_2(rounded);
    const float q = expm1_near_0(minus_n_ln2(c, rounded - kRounder));
    const float power = scale * kUnscale;
    exp = (scale + scale * q) * kUnscale;
    return power * q + (power - 1.0f);
  }

  LING_HD static float gaussian(float x) {
    // x^2 = high^2 + (x - high) (x + high), where high has so few bits that its square is exact
    const float c = clip(x, 15.0f);
    const float high = bit_cast<float>(bit_cast<uint32_t>(c) & 0xfffff000u);
    const float whole = -0.5f * (high * high), rest = -0.5f * ((c - high) * (c + high));
    const float rounded = whole * kLog2E + kRounder;
    const float scale = power_of_2(rounded);
    return (scale + scale * expm1_near_0(minus_n_ln2(whole, rounded - kRounder) + rest)) * kUnscale;
  }

  LING_HD static float normal_cdf(float x, float& density) {
    // Phi(-t) = exp(-t^2/2) P(w) / (t + 4), t >= 0, with P a polynomial in w = (t - 4) / (t + 4)
    const float t = at_most(magnitude(x), 15.0f);
    const float w = (t - 4.0f) / (t + 4.0f);
    float p = -0.000134196714f;
    p = p * w + 0.000174658577f;
    p = p * w + 0.00156840822f;
    p = p * w - 0.00351021043f;
    p = p * w - 0.00752400421f;
    p = p * w + 0.0604034886f;
    p = p * w - 0.186523661f;
    p = p * w + 0.387136906f;
    p = p * w - 0.607896566f;
    p = p * w + 0.755285144f;
    density = gaussian(x);
    const float tail = density * (p / (t + 4.0f));
    return x < 0.0f ? tail : 1.0f - tail;
  }

 private:
  static constexpr float kLog2E = 1.44269504f, kSmallestNormal = 1.17549435e-38f;

  LING_HD static float magnitude(float x) { return bit_cast<float>(bit_cast<int32_t>(x) & 0x7fffffff); }
  LING_HD static float with_sign_of(float size, float x) {
    return bit_cast<float>(bit_cast<uint32_t>(size) | (bit_cast<uint32_t>(x) & 0x80000000u));
  }

  // at_least(x, limit) for a limit below 0, by the bits as integers, which costs less. NaN may give anything.
  LING_HD static float at_least_negative(float x, float limit) {
    const uint32_t bits = bit_cast<uint32_t>(x), limit_bits = bit_cast<uint32_t>(limit);
    return bit_cast<float>(bits < limit_bits ? bits : limit_bits);
  }

  // Added to a number of less than 2^22, 1.5 2^23 rounds it to an integer n, which is then in the lowest bits too.
  static constexpr float kRounder = 12582912.0f;
  // 2^(n + 64), and 2^-64: that product is where a denormal result gets rounded, once. NaN may give any power.
  LING_HD static float power_of_2(float rounded) {
    return bit_cast<float>((bit_cast<uint32_t>(rounded) << 23) + ((127u + 64u) << 23));
  }
  static constexpr float kUnscale = 1.0f / kScale;

  // x - n ln 2, ln 2 in two parts of which n times the first is exact
  LING_HD static float minus_n_ln2(float x, float n) { return (x - n * 0.693145752f) - n * 1.42860677e-6f; }

  // e^r - 1, |r| <= ln(2)/2
  LING_HD static float expm1_near_0(float r) {
    float q = 0.00139475951f;
    q = q * r + 0.00836724695f;
    q = q * r + 0.0416662656f;
    q = q * r + 0.166665375f;
    q = q * r + 0.5f;
    return r + (r * r) * q;
  }

  LING_HD static float exp(float x) { return scaled_exp(x) * kUnscale; }
};

}  // namespace ling::LING_CPU_NAMESPACE
