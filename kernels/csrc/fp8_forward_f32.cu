#include "fp8_kernels.cuh"

template void ling::fp8_forward<ling::F32>(const char*, const ling::Fp8Args&, cudaStream_t);
