// e4m3, and the scales of a block of numbers stored in it. For the CPU and for CUDA, bit for bit alike.
//
// The rules are those of Transformer Engine's Float8BlockScaling: scale = 448 / amax, or the power of two below it.
#pragma once

#include <cstdint>

#include "functors.h"
#include "storage.h"

namespace ling {

constexpr float kLargestE4M3 = 448.0f;

// To nearest even; what is larger than 448, infinity too, gives 448 with its sign; NaN gives 0x7f.
LING_HD uint32_t e4m3_bits(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size > 0x7f800000u) return 0x7fu;
  if (float_of(size) >= kLargestE4M3) return sign | 0x7eu;
  // below 2^-6, multiples of 2^-9: what the bits of x + 2^14 count
  if (size < 0x3c800000u) return sign | (bits_of(float_of(size) + 16384.0f) - 0x46800000u);
  // 3 bits of mantissa, exponent bias 7 in the place of 127
  return sign | ((size - (120u << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20);
}

LING_HD uint32_t four_e4m3(const float* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(low) : "f"(x[0]), "f"(x[1]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(high) : "f"(x[2]), "f"(x[3]));
  return low | static_cast<uint32_t>(high) << 16;
#else
  return e4m3_bits(x[0]) | e4m3_bits(x[1]) << 8 | e4m3_bits(x[2]) << 16 | e4m3_bits(x[3]) << 24;
#endif
}

// Correctly rounded, whatever the compiler's options.
LING_HD float exact_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// The factor for a block whose largest size is amax: 1 for a block of zeros or with an infinity; where 448 / amax
// overflows, the largest number of the storage type that the block came in.
LING_HD float scale_of_amax(float amax, float largest, bool power_of_2) {
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (amax == 0.0f || bits_of(amax) >= kInfinity) return 1.0f;
  float scale = exact_quotient(kLargestE4M3, amax);
  if (bits_of(scale) == kInfinity) scale = largest;
  return power_of_2 ? float_of(bits_of(scale) & 0xff800000u) : scale;
}

}  // namespace ling
