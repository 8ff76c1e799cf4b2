// Sums in a fixed order: the kernels' second step.
#include "reduce.cuh"

#include "launch.cuh"
#include "operators.cuh"

namespace ling {
namespace {

// out[i] = sum over tiles of partials[tile, slot[i]]; one block per scalar.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_scalars_kernel(const float* partials, int64_t tiles, int max_scalars, Slots slots, float* out) {
  __shared__ double sums[kReduceThreads];
  const int t = threadIdx.x;
  sums[t] = strided_sum(partials + slots.slot[blockIdx.x], tiles, max_scalars, t);
  for (int half = kReduceThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) sums[t] += sums[t + half];
  }
  if (t == 0) out[blockIdx.x] = static_cast<float>(sums[0]);
}

// out[row] = sum over parts, in order, of partials[part, row].
__global__ void __launch_bounds__(kReduceThreads)
    reduce_rows_kernel(const float* partials, int64_t parts, int64_t rows, PerRow out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; row < rows; row += step) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += partials[part * rows + row];
    out.store(row, sum);
  }
}

}  // namespace

void reduce_scalars(const float* partials, int64_t count, int stride, const Slots& slots, int num_scalars, float* out,
                    cudaStream_t stream) {
  reduce_scalars_kernel<<<num_scalars, kReduceThreads, 0, stream>>>(partials, count, stride, slots, out);
  check_cuda(cudaGetLastError(), "reduction of scalars");
}

void reduce_rows(const float* partials, int64_t parts, int64_t rows, const PerRow& out, cudaStream_t stream) {
  constexpr auto kernel = reduce_rows_kernel;
  const int64_t blocks = (rows + kReduceThreads - 1) / kReduceThreads;
  kernel<<<grid_for<kernel>(blocks, kReduceThreads), kReduceThreads, 0, stream>>>(partials, parts, rows, out);
  check_cuda(cudaGetLastError(), "reduction of rows");
}

}  // namespace ling
