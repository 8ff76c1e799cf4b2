// bfloat16 and float16 as integer code that compilers vectorise: to fp32 exactly, back to the nearest, ties to even.
#pragma once

#include <cstdint>

#include "math_host.h"

namespace ling::LING_CPU_NAMESPACE {

LING_HD float from_bfloat16(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

LING_HD uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

LING_HD float from_float16(uint16_t x) {
  // exponent and mantissa in place, then 2^(127 - 15): exact, denormals included
  const uint32_t bits = static_cast<uint32_t>(x & 0x7fffu) << 13;
  const float value = bit_cast<float>(bits) * 5.192296858534828e33f;
  const uint32_t special = bits >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | (static_cast<uint32_t>(x & 0x8000u) << 16));
}

LING_HD uint16_t to_float16(float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const uint32_t normal = (bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
  // adding 1/2 rounds to multiples of 2^-24, float16's denormals
  const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
  const uint32_t finite = bits < 0x38800000u ? denormal : normal;
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (bits >= 0x477ff000u ? large : finite));
}

}  // namespace ling::LING_CPU_NAMESPACE
