// Sums in a fixed order.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace ling {

constexpr int kReduceThreads = 256;

// What thread `thread` of a block sums: every kReduceThreads-th of `count` numbers that are `stride` apart. In double,
// since a run has hundreds of thousands of partial sums.
LING_HD double strided_sum(const float* numbers, int64_t count, int64_t stride, int thread) {
  double sum = 0.0;
  for (int64_t i = thread; i < count; i += kReduceThreads) sum += static_cast<double>(numbers[i * stride]);
  return sum;
}

#if defined(__CUDACC__)
// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  LING_UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
#endif

}  // namespace ling
