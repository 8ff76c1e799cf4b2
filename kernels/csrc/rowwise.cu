// The CUDA kernels of rowwise.h.
#include "rowwise.h"

#include "launch.cuh"
#include "operators.cuh"
#include "reduce.cuh"

namespace ling {
namespace {

// A warp per row, in a stride of the grid.
#define LING_FOR_EACH_ROW(row, rows)                                                                        \
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; row < (rows);        \
       row += static_cast<int64_t>(gridDim.x) * kWarps)

template <class T>
__global__ void __launch_bounds__(kThreads) polynorm_sums_kernel(const PolyNormArgs args) {
  const int lane = threadIdx.x % kLanes;
  LING_FOR_EACH_ROW(row, args.base.rows) {
    float sums[3] = {};
    add_powers<T>(args.base, row, lane, sums);
    LING_UNROLL
    for (int k = 0; k < 3; ++k) {
      const float sum = warp_sum(sums[k]);
      if (lane == k) args.out_sums[3 * row + k] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) polynorm_kernel(const PolyNormArgs args) {
  LING_FOR_EACH_ROW(row, args.base.rows) {
    const PolyNormCubic f(args, row);
    forward_span<PolyNormCubic, T>(args.base, f, row, 0, threadIdx.x % kLanes);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) polynorm_backward_sums_kernel(const PolyNormArgs args) {
  const int lane = threadIdx.x % kLanes;
  LING_FOR_EACH_ROW(row, args.base.rows) {
    float sums[4] = {};
    add_dots<T>(args.base, row, lane, sums);
    LING_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] = warp_sum(sums[k]);
    if (lane == 0) finish_dots(args, row, sums);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) polynorm_backward_kernel(const PolyNormArgs args) {
  LING_FOR_EACH_ROW(row, args.base.rows) {
    const PolyNormSlope f(args, row);
    backward_span<PolyNormSlope, T>(args.base, f, row, 0, threadIdx.x % kLanes, nullptr);
  }
}

// The k-th largest of a row's positive numbers, by radix select: from the highest eight bits of the key down, a
// histogram of the keys that agree so far, and the digit that holds the k-th. One block per row.
template <class T>
__global__ void __launch_bounds__(kThreads) topk_threshold_kernel(const TopKArgs args) {
  using Key = TopKKey<T>;
  static_assert(kThreads == 256, "a thread per digit");
  __shared__ int histogram[256], warp_totals[kWarps], digit, left;
  const int t = threadIdx.x, lane = t % kLanes, warp = t / kLanes;
  for (int64_t row = blockIdx.x; row < args.base.rows; row += gridDim.x) {
    const typename T::Raw* x = static_cast<const typename T::Raw*>(args.base.x) + row * args.base.x_stride;
    uint32_t prefix = 0;
    int64_t wanted = args.k;
    bool found = true;
    for (int shift = 8 * (Key::kDigits - 1); shift >= 0 && found; shift -= 8) {
      histogram[t] = 0;
      if (t == 0) digit = -1;
      __syncthreads();
      for (int64_t c = t; c < args.base.width; c += kThreads) {
        const uint32_t key = Key::key(x[c]);
        if (key != 0 && (key >> shift) >> 8 == prefix) atomicAdd(&histogram[(key >> shift) & 255u], 1);
      }
      __syncthreads();
      // numbers with this thread's digit or a higher one: thread t has digit 255 - t
      const int mine = histogram[255 - t];
      int sum = mine;
      LING_UNROLL
      for (int distance = 1; distance < kLanes; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (lane == kLanes - 1) warp_totals[warp] = sum;
      __syncthreads();
      for (int w = 0; w < warp; ++w) sum += warp_totals[w];
      if (sum >= wanted && sum - mine < wanted) {
        digit = 255 - t;
        left = static_cast<int>(wanted - (sum - mine));
      }
      __syncthreads();
      found = digit >= 0;
      prefix = prefix << 8 | static_cast<uint32_t>(digit & 255);
      wanted = left;
      __syncthreads();
    }
    if (t == 0) {
      const float threshold = found ? Key::value(prefix) : 0.0f;
      const bool nan = !(threshold <= 3.4028234663852886e38f) && threshold != __int_as_float(0x7f800000);
      args.threshold[row] = nan ? __int_as_float(0x7f800000) : threshold;
      args.ties[row] = found && !nan ? left : 0;
    }
    __syncthreads();
  }
}

// y, or dx and the row's sum of phi dy. Ties are counted over the warp in the order of the columns.
template <class T, bool backward>
__global__ void __launch_bounds__(kThreads, 4) topk_kernel(const TopKArgs args) {
  using Raw = typename T::Raw;
  const int lane = threadIdx.x % kLanes;
  const ElementwiseArgs& base = args.base;
  LING_FOR_EACH_ROW(row, base.rows) {
    const Raw* x = static_cast<const Raw*>(base.x) + row * base.x_stride;
    const Raw* dy = static_cast<const Raw*>(base.dy) + row * base.dy_stride;
    Raw* out = static_cast<Raw*>(base.out) + row * base.width;
    const float weight = base.weight.load(row), threshold = args.threshold[row];
    const int ties = args.ties[row];
    int seen_in_row = 0;
    float dot = 0.0f;
    // all lanes go round as often as the first, for the shuffles
    for (int64_t begin = 0; begin < base.width; begin += kLanes * kVector<T>) {
      const int64_t c = begin + lane * kVector<T>, beyond = base.width - c;
      const int count = beyond <= 0 ? 0 : (beyond < kVector<T> ? static_cast<int>(beyond) : kVector<T>);
      const bool vector = base.vector && count > 0;
      float v[kVector<T>], grad[kVector<T>];
      load<T>(x + c, vector, count, -1.0f, v);
      if constexpr (backward) load<T>(dy + c, vector, count, 0.0f, grad);
      int equal = 0;
      LING_UNROLL
      for (int i = 0; i < kVector<T>; ++i) equal += v[i] == threshold;
      int seen = seen_in_row;
      if (__any_sync(0xffffffffu, equal > 0)) {
        int sum = equal;
        LING_UNROLL
        for (int distance = 1; distance < kLanes; distance *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, sum, distance);
          if (lane >= distance) sum += other;
        }
        seen += sum - equal;
        seen_in_row += __shfl_sync(0xffffffffu, sum, kLanes - 1);
      }
      LING_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        const bool keep = kept(v[i], threshold, ties, seen) != 0.0f;
        if constexpr (backward) {
          dot += keep ? v[i] * grad[i] : 0.0f;
          v[i] = keep ? grad[i] * weight : 0.0f;
        } else {
          v[i] = keep ? v[i] * weight : 0.0f;
        }
      }
      store<T>(v, vector, count, out + c);
    }
    if constexpr (backward) {
      const float sum = warp_sum(dot);
      if (lane == 0) base.dweight.store(row, sum);
    }
  }
}

template <auto kernel, class Args>
void launch_rows(Args args, int64_t blocks, int vector, cudaStream_t stream) {
  choose_spans(args.base, vector, 1, true);
  kernel<<<grid_for<kernel>(blocks, kThreads), kThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "row kernel");
}

int64_t blocks_of(const ElementwiseArgs& args) { return (args.rows + kWarps - 1) / kWarps; }

}  // namespace

template <class T>
void polynorm(PolyNormStep step, const PolyNormArgs& args, cudaStream_t stream) {
  const int64_t blocks = blocks_of(args.base);
  switch (step) {
    case PolyNormStep::sums: return launch_rows<polynorm_sums_kernel<T>>(args, blocks, kVector<T>, stream);
    case PolyNormStep::forward: return launch_rows<polynorm_kernel<T>>(args, blocks, kVector<T>, stream);
    case PolyNormStep::backward_sums:
      return launch_rows<polynorm_backward_sums_kernel<T>>(args, blocks, kVector<T>, stream);
    case PolyNormStep::backward: return launch_rows<polynorm_backward_kernel<T>>(args, blocks, kVector<T>, stream);
  }
}

template <class T>
void topk_relu(TopKStep step, const TopKArgs& args, cudaStream_t stream) {
  const int64_t blocks = blocks_of(args.base);
  switch (step) {
    case TopKStep::threshold: return launch_rows<topk_threshold_kernel<T>>(args, args.base.rows, kVector<T>, stream);
    case TopKStep::forward: return launch_rows<topk_kernel<T, false>>(args, blocks, kVector<T>, stream);
    case TopKStep::backward: return launch_rows<topk_kernel<T, true>>(args, blocks, kVector<T>, stream);
  }
}

#define LING_INSTANTIATE(T)                                                     \
  template void polynorm<T>(PolyNormStep, const PolyNormArgs&, cudaStream_t);   \
  template void topk_relu<T>(TopKStep, const TopKArgs&, cudaStream_t);
LING_INSTANTIATE(BF16)
LING_INSTANTIATE(F16)
LING_INSTANTIATE(F32)
#undef LING_INSTANTIATE

}  // namespace ling
