// Rows in blocks that stay in the L1 cache: any storage type in and out, fp32 between. Compiled once per instruction set.
#pragma once

#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu_kernels.h"
#include "cpu_formats.h"

namespace ling::LING_CPU_NAMESPACE {

constexpr int64_t kBlock = 512;
constexpr int64_t kLanes = 16;
using Block = float[kBlock];

// Loops run over whole vectors, so that an element's result does not depend on its place in a vector or an epilogue.
LING_HD int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) & ~(kLanes - 1); }

// out[0 .. whole_vectors(n)) from elements at .. at + n of a row, zeros at the end
static void load(Dtype dtype, const void* row, int64_t at, int64_t n, float* __restrict__ out) {
  int64_t j = 0;
  if (dtype == Dtype::float32) {
    const float* in = static_cast<const float*>(row) + at;
    for (; j < n; ++j) out[j] = in[j];
  } else if (dtype == Dtype::bfloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(row) + at;
    for (; j < n; ++j) out[j] = from_bfloat16(in[j]);
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(row) + at;
#if defined(__F16C__)
    for (; j + 8 <= n; j += 8)
      _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
#endif
    for (; j < n; ++j) out[j] = from_float16(in[j]);
  }
  for (; j < whole_vectors(n); ++j) out[j] = 0.0f;
}

static void store(Dtype dtype, const float* __restrict__ in, int64_t n, void* row, int64_t at) {
  int64_t j = 0;
  if (dtype == Dtype::float32) {
    float* out = static_cast<float*>(row) + at;
    for (; j < n; ++j) out[j] = in[j];
  } else if (dtype == Dtype::bfloat16) {
    uint16_t* out = static_cast<uint16_t*>(row) + at;
    for (; j < n; ++j) out[j] = to_bfloat16(in[j]);
  } else {
    uint16_t* out = static_cast<uint16_t*>(row) + at;
#if defined(__F16C__)
    for (; j + 8 <= n; j += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                       _mm256_cvtps_ph(_mm256_loadu_ps(in + j), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; j < n; ++j) out[j] = to_float16(in[j]);
  }
}

// Whether a block of the row is fp32 in whole vectors, and can be read and written where it is.
LING_HD bool is_direct(Dtype dtype, int64_t n) { return dtype == Dtype::float32 && n == whole_vectors(n); }

// A block of a row to read: in place, or in the buffer.
static const float* read(Dtype dtype, const void* row, int64_t at, int64_t n, float* __restrict__ buffer) {
  if (is_direct(dtype, n)) return static_cast<const float*>(row) + at;
  load(dtype, row, at, n, buffer);
  return buffer;
}

// Where to compute a block of a row that is to be written.
static float* target(Dtype dtype, void* row, int64_t at, int64_t n, float* buffer) {
  return is_direct(dtype, n) ? static_cast<float*>(row) + at : buffer;
}

// The end of it: what stands in the buffer goes to the row.
static void write(Dtype dtype, const float* __restrict__ buffer, int64_t n, void* row, int64_t at) {
  if (!is_direct(dtype, n)) store(dtype, buffer, n, row, at);
}

// values[0 .. whole_vectors(n)) that a table has for a block of a row of 16-bit numbers, zeros at the end
static void look_up(const float* __restrict__ table, const void* row, int64_t at, int64_t n,
                    float* __restrict__ values) {
  const uint16_t* bits = static_cast<const uint16_t*>(row) + at;
  int64_t j = 0;
  for (; j < n; ++j) values[j] = table[bits[j]];
  for (; j < whole_vectors(n); ++j) values[j] = 0.0f;
}

// The sum of n numbers in double, in an order that depends on n alone.
static double sum(const float* in, int64_t n) {
  double lanes[kLanes] = {};
  const int64_t whole = n & ~(kLanes - 1);
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(in[j + lane]);
  for (int64_t j = whole; j < n; ++j) lanes[j - whole] += static_cast<double>(in[j]);
  double total = 0.0;
  for (double lane : lanes) total += lane;
  return total;
}

template <class Body>
LING_HD void for_each_block(int64_t n, const Body& body) {
  for (int64_t at = 0; at < n; at += kBlock) body(at, n - at < kBlock ? n - at : kBlock);
}

}  // namespace ling::LING_CPU_NAMESPACE
