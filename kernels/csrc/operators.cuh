// What the binding launches, defined in the other .cu files. None of it waits for the device or allocates.
#pragma once

#include <cuda_runtime.h>

#include "elementwise.h"
#include "fp8_tile.h"
#include "rowwise.h"

namespace ling {

// Where a scalar's gradient stands among an activation's sums.
struct Slots {
  int slot[kMaxScalars];
};

// functor: a name of LING_FOR_EACH_ACTIVATION.
template <class T>
void elementwise_forward(const char* functor, const ElementwiseArgs& args, cudaStream_t stream);
template <class T>
void elementwise_backward(const char* functor, const ElementwiseArgs& args, cudaStream_t stream);

enum class PolyNormStep { sums, forward, backward_sums, backward };
template <class T>
void polynorm(PolyNormStep step, const PolyNormArgs& args, cudaStream_t stream);

enum class TopKStep { threshold, forward, backward };
template <class T>
void topk_relu(TopKStep step, const TopKArgs& args, cudaStream_t stream);

template <class T>
void fp8_forward(const char* functor, const Fp8Args& args, cudaStream_t stream);
template <class T>
void fp8_backward(const char* functor, const Fp8Args& args, cudaStream_t stream);

// out[i] = sum over j < count of partials[j * stride + slot[i]]
void reduce_scalars(const float* partials, int64_t count, int stride, const Slots& slots, int num_scalars, float* out,
                    cudaStream_t stream);
// out[row] = sum over parts of partials[part * rows + row]
void reduce_rows(const float* partials, int64_t parts, int64_t rows, const PerRow& out, cudaStream_t stream);

}  // namespace ling
