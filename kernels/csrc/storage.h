// How numbers are stored: bf16, fp16 and fp32, one by one and sixteen bytes at a time. Also for the CPU's compiler, so
// that host code runs the index arithmetic of the kernels.
#pragma once

#include <bit>
#include <cstdint>

#include "functors.h"

#if defined(__CUDACC__)
#define LING_UNROLL _Pragma("unroll")
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#define LING_UNROLL
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
#endif

namespace ling {

LING_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}
LING_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

LING_HD float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// For finite numbers: one instruction, but NaN gives the limit.
LING_HD float max_number(float x, float limit) {
#if defined(__CUDA_ARCH__)
  return fmaxf(x, limit);
#else
  return x > limit ? x : limit;
#endif
}

// A storage type: Raw, its bits; kPerWord, how many are in 32 bits; kLargest, its largest finite number;
// unpack and pack, between a 32-bit word and kPerWord floats (rounding to nearest even); widen and narrow, one of them.
struct BF16 {
  using Raw = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr float kLargest = 3.3895313892515355e38f;

  LING_HD static void unpack(uint32_t word, float* to) {
    to[0] = float_of(word << 16);
    to[1] = float_of(word & 0xffff0000u);
  }
  LING_HD static uint32_t pack(const float* from) {
#if defined(__CUDA_ARCH__)
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return narrow(from[0]) | static_cast<uint32_t>(narrow(from[1])) << 16;
#endif
  }
  LING_HD static float widen(Raw raw) { return float_of(static_cast<uint32_t>(raw) << 16); }
  LING_HD static Raw narrow(float x) {
#if defined(__CUDACC__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    return c10::BFloat16(x).x;
#endif
  }
};

struct F16 {
  using Raw = uint16_t;
  static constexpr int kPerWord = 2;
  static constexpr float kLargest = 65504.0f;

  LING_HD static void unpack(uint32_t word, float* to) {
    to[0] = widen(static_cast<Raw>(word & 0xffffu));
    to[1] = widen(static_cast<Raw>(word >> 16));
  }
  LING_HD static uint32_t pack(const float* from) {
#if defined(__CUDA_ARCH__)
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
#else
    return narrow(from[0]) | static_cast<uint32_t>(narrow(from[1])) << 16;
#endif
  }
  LING_HD static float widen(Raw raw) {
#if defined(__CUDACC__)
    return __half2float(__ushort_as_half(raw));
#else
    return static_cast<float>(c10::Half(raw, c10::Half::from_bits()));
#endif
  }
  LING_HD static Raw narrow(float x) {
#if defined(__CUDACC__)
    return __half_as_ushort(__float2half_rn(x));
#else
    return c10::Half(x).x;
#endif
  }
};

struct F32 {
  using Raw = float;
  static constexpr int kPerWord = 1;
  static constexpr float kLargest = 3.4028234663852886e38f;

  LING_HD static void unpack(uint32_t word, float* to) { to[0] = float_of(word); }
  LING_HD static uint32_t pack(const float* from) { return bits_of(from[0]); }
  LING_HD static float widen(Raw raw) { return raw; }
  LING_HD static Raw narrow(float x) { return x; }
};

// Numbers in sixteen bytes.
template <class T>
inline constexpr int kVector = 4 * T::kPerWord;

template <class T>
LING_HD float rounded(float x) {
  return T::widen(T::narrow(x));
}

template <class T>
LING_HD void unpack(const uint4& v, float* to) {
  T::unpack(v.x, to);
  T::unpack(v.y, to + T::kPerWord);
  T::unpack(v.z, to + 2 * T::kPerWord);
  T::unpack(v.w, to + 3 * T::kPerWord);
}

template <class T>
LING_HD uint4 pack(const float* from) {
  return uint4{T::pack(from), T::pack(from + T::kPerWord), T::pack(from + 2 * T::kPerWord),
               T::pack(from + 3 * T::kPerWord)};
}

// One instruction each; from a plain assignment of a uint4 the compiler makes up to four. Global memory only.
LING_HD uint4 load_16_bytes(const void* from) {
#if defined(__CUDA_ARCH__)
  return __ldg(static_cast<const uint4*>(from));
#else
  return *static_cast<const uint4*>(from);
#endif
}
LING_HD void store_16_bytes(const uint4& v, void* to) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
  *static_cast<uint4*>(to) = v;
#endif
}

// kVector<T> numbers from `from`: in one load if `vector` (16-byte aligned, all there), else `count` of them one by one
// and `fill` for the rest.
template <class T>
LING_HD void load(const typename T::Raw* from, bool vector, int count, float fill, float* to) {
  if (vector) {
    unpack<T>(load_16_bytes(from), to);
    return;
  }
  LING_UNROLL
  for (int i = 0; i < kVector<T>; ++i) to[i] = i < count ? T::widen(from[i]) : fill;
}

template <class T>
LING_HD void store(const float* from, bool vector, int count, typename T::Raw* to) {
  if (vector) {
    store_16_bytes(pack<T>(from), to);
    return;
  }
  LING_UNROLL
  for (int i = 0; i < kVector<T>; ++i)
    if (i < count) to[i] = T::narrow(from[i]);
}

// The router weights [rows], in whatever type they come; a null pointer stands for ones.
enum class Kind : int { none, f32, bf16, f16 };

struct PerRow {
  void* data = nullptr;
  Kind kind = Kind::none;

  LING_HD float load(int64_t row) const {
    if (kind == Kind::f32) return static_cast<const float*>(data)[row];
    if (kind == Kind::bf16) return BF16::widen(static_cast<const uint16_t*>(data)[row]);
    if (kind == Kind::f16) return F16::widen(static_cast<const uint16_t*>(data)[row]);
    return 1.0f;
  }
  LING_HD void store(int64_t row, float value) const {
    if (kind == Kind::f32) static_cast<float*>(data)[row] = value;
    if (kind == Kind::bf16) static_cast<uint16_t*>(data)[row] = BF16::narrow(value);
    if (kind == Kind::f16) static_cast<uint16_t*>(data)[row] = F16::narrow(value);
  }
};

}  // namespace ling
