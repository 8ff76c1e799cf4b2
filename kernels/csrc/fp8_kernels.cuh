// The CUDA kernels of fp8_tile.h and their launches, instantiated for one storage type by each fp8_*.cu.
#pragma once

#include <cstring>

#include "fp8_tile.h"
#include "launch.cuh"
#include "math_device.cuh"
#include "operators.cuh"

namespace ling {

template <class F, class T, bool backward>
__global__ void __launch_bounds__(kThreads, 3) fp8_kernel(const Fp8Args args) {
  extern __shared__ __align__(16) unsigned char memory[];
  const F f(args.base.params, args.base.scalars, args.base.num_scalars);
  const Fp8Tile<F, T, backward> tile(args, memory, blockIdx.x, threadIdx.x);
  tile.clear();
  __syncthreads();
  tile.compute(f);
  __syncthreads();
  tile.scale();
  __syncthreads();
  tile.quantize();
  if (tile.kScalars > 0 && args.base.dscalars != nullptr) {
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      tile.fold_scalars(half);
    }
    __syncthreads();
    tile.store_scalars();
  }
}

template <class F, class T, bool backward>
void launch_fp8(const Fp8Args& args, cudaStream_t stream) {
  constexpr auto kernel = fp8_kernel<F, T, backward>;
  const int bytes = static_cast<int>(Fp8Shared<T>::bytes(args, F::max_scalars));
  // more than 48 KiB has to be asked for; every time, since it is a property of the current device
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  kernel<<<static_cast<unsigned>(args.blocks()), kThreads, bytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "fp8 kernel");
}

template <class T>
void fp8_forward(const char* functor, const Fp8Args& args, cudaStream_t stream) {
  using Math = typename MathFor<T>::type;
#define LING_CASE(NAME, FUNCTOR) \
  if (std::strcmp(functor, NAME) == 0) return launch_fp8<FUNCTOR<Math>, T, false>(args, stream);
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
}

template <class T>
void fp8_backward(const char* functor, const Fp8Args& args, cudaStream_t stream) {
  using Math = typename MathFor<T>::type;
#define LING_CASE(NAME, FUNCTOR) \
  if (std::strcmp(functor, NAME) == 0) return launch_fp8<FUNCTOR<Math>, T, true>(args, stream);
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
}

}  // namespace ling
