#include "fp8_kernels.cuh"

template void ling::fp8_backward<ling::F16>(const char*, const ling::Fp8Args&, cudaStream_t);
