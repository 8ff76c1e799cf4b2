#include "elementwise_kernels.cuh"

template void ling::elementwise_forward<ling::BF16>(const char*, const ling::ElementwiseArgs&, cudaStream_t);
