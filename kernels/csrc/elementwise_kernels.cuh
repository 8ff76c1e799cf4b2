// The CUDA kernels of elementwise.h and their launches, instantiated for one storage type by each elementwise_*.cu.
#pragma once

#include <cstring>

#include "elementwise.h"
#include "launch.cuh"
#include "math_device.cuh"
#include "operators.cuh"
#include "reduce.cuh"

namespace ling {

// Blocks per multiprocessor that the compiler has to leave registers for; a series has sixteen scalars to hold.
template <class F>
constexpr int kForwardBlocks = F::max_scalars > 4 ? 2 : 5;

template <class F, class T>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<F>) forward_kernel(const ElementwiseArgs args) {
  const F f(args.params, args.scalars, args.num_scalars);
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t items = args.rows * args.spans;
  for (int64_t i = warp; i < items; i += warps) {
    const Item item = item_of(args, i);
    forward_span<F, T>(args, f, item.row, item.span, lane);
  }
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const ElementwiseArgs args) {
  const F f(args.params, args.scalars, args.num_scalars);
  const int lane = threadIdx.x % kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t items = args.rows * args.spans;
  for (int64_t i = warp; i < items; i += warps) {
    const Item item = item_of(args, i);
    const float dot = backward_span<F, T>(args, f, item.row, item.span, lane, nullptr);
    if (args.dweight.kind == Kind::none) continue;
    const float sum = warp_sum(dot);
    if (lane == 0) args.dweight.store(item.row, sum);
  }
}

// The same for activations with learned scalars: a block takes a tile of rows at a time.
template <class F, class T>
__global__ void __launch_bounds__(kThreads, 2) backward_scalars_kernel(const ElementwiseArgs args) {
  __shared__ float sums[kWarps][F::max_scalars];
  const F f(args.params, args.scalars, args.num_scalars);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tiles = tiles_of(args.rows);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float dscalars[F::max_scalars] = {};
    for (int turn = 0; turn < kRowsPerTile / kWarps; ++turn) {
      const int64_t row = row_of_tile(tile, warp, turn);
      if (row >= args.rows) break;
      const float dot = backward_span<F, T>(args, f, row, 0, lane, dscalars);
      if (args.dweight.kind == Kind::none) continue;
      const float sum = warp_sum(dot);
      if (lane == 0) args.dweight.store(row, sum);
    }
    if (args.dscalars == nullptr) continue;
    LING_UNROLL
    for (int i = 0; i < F::max_scalars; ++i) {
      const float sum = warp_sum(dscalars[i]);
      if (lane == 0) sums[warp][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < F::max_scalars) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += sums[w][threadIdx.x];
      args.dscalars[tile * F::max_scalars + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

template <class F, class T>
void launch_forward(ElementwiseArgs args, cudaStream_t stream) {
  constexpr auto kernel = forward_kernel<F, T>;
  choose_spans(args, kVector<T>, resident_blocks<kernel>(kThreads) * kWarps, false);
  const int64_t blocks = (args.rows * args.spans + kWarps - 1) / kWarps;
  kernel<<<grid_for<kernel>(blocks, kThreads), kThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "forward kernel");
}

template <class F, class T>
void launch_backward(ElementwiseArgs args, cudaStream_t stream) {
  if constexpr (F::max_scalars > 0) {
    constexpr auto kernel = backward_scalars_kernel<F, T>;
    choose_spans(args, kVector<T>, 1, true);
    kernel<<<grid_for<kernel>(tiles_of(args.rows), kThreads), kThreads, 0, stream>>>(args);
  } else {
    constexpr auto kernel = backward_kernel<F, T>;
    choose_spans(args, kVector<T>, resident_blocks<kernel>(kThreads) * kWarps, args.dweight.kind != Kind::none);
    const int64_t blocks = (args.rows * args.spans + kWarps - 1) / kWarps;
    kernel<<<grid_for<kernel>(blocks, kThreads), kThreads, 0, stream>>>(args);
  }
  check_cuda(cudaGetLastError(), "backward kernel");
}

// functor: a name of LING_FOR_EACH_ACTIVATION.
template <class T>
void elementwise_forward(const char* functor, const ElementwiseArgs& args, cudaStream_t stream) {
  using Math = typename MathFor<T>::type;
#define LING_CASE(NAME, FUNCTOR) \
  if (std::strcmp(functor, NAME) == 0) return launch_forward<FUNCTOR<Math>, T>(args, stream);
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
}

template <class T>
void elementwise_backward(const char* functor, const ElementwiseArgs& args, cudaStream_t stream) {
  using Math = typename MathFor<T>::type;
#define LING_CASE(NAME, FUNCTOR) \
  if (std::strcmp(functor, NAME) == 0) return launch_backward<FUNCTOR<Math>, T>(args, stream);
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
}

}  // namespace ling
