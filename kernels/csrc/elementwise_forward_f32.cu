#include "elementwise_kernels.cuh"

template void ling::elementwise_forward<ling::F32>(const char*, const ling::ElementwiseArgs&, cudaStream_t);
