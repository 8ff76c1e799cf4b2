// What the operators (cpu_*.cpp) call for each row: one table of functions per instruction set (cpu_kernels.cpp).
#pragma once

#include <cstdint>

namespace ling {

enum class Dtype { float32, float16, bfloat16 };

// A function of one number of 16 bits, by the number's bits: looked up faster than computed.
struct Table {
  static constexpr int kSize = 1 << 16;
  float forward[kSize];              // the value as the forward pass computes it
  float value[kSize], slope[kSize];  // and as the backward pass does
};

struct ForwardRow {
  Dtype dtype;      // of g, u and y
  int64_t n;        // elements of y
  const void* g;    // x where the activation is not gated
  const void* u;    // gated only
  void* y;
  float weight;     // the router's, or 1
  const float* params;
  const float* scalars;
  int num_scalars;
  const Table* table;  // null: compute
};

struct BackwardRow {
  Dtype dtype;
  int64_t n;
  const void* dy;
  const void* g;
  const void* u;
  void* dg;
  void* du;
  float weight;
  const float* params;
  const float* scalars;
  int num_scalars;
  // null: not wanted. sums[0] += sum of phi dy (without the weight), sums[1 + i] += gradient of scalar i
  double* sums;
  const Table* table;  // null: compute
};

struct Activation {
  const char* name;
  bool gated;
  // all that first() gives for numbers of 16 bits; null where there are scalars
  void (*tabulate)(Dtype, const float* params, Table&);
  void (*forward)(const ForwardRow&);
  void (*backward)(const BackwardRow&);
};

struct PolyNormRow {
  Dtype dtype;
  int64_t n;
  const void* dy;  // backward only
  const void* x;
  void* out;       // y or dx
  float weight;
  float scalars[4];  // a3, a2, a1, a0
  float scales[3];   // 1/sqrt(mean z^2 + eps) for z = x, x^2, x^3
  float dots[3];     // backward: means over the width of dy weight z scale
};

struct TopKRow {
  Dtype dtype;
  int64_t n;
  const void* dy;  // backward only
  const void* x;
  void* out;       // y or dx
  float weight;
  float threshold;
  int32_t ties;
  double* sum;  // null: not wanted. += sum of phi dy
};

struct Kernels {
  const char* name;  // of the instruction set
  const Activation* activations;
  // sums of x^2, x^4, x^6 over the row
  void (*polynorm_sums)(Dtype, const void* x, int64_t n, double* sums);
  void (*polynorm)(const PolyNormRow&);
  // sums of dy z scale for z = x, x^2, x^3, and of dy: without the weight
  void (*polynorm_backward_sums)(const PolyNormRow&, double* sums);
  void (*polynorm_backward)(const PolyNormRow&);
  // the k-th largest of max(0, x) and how many of the k are equal to it; keys: n rounded up to a multiple of 16
  void (*topk_threshold)(Dtype, const void* x, int64_t n, int64_t k, int32_t* keys, float* threshold, int32_t* ties);
  void (*topk_relu)(const TopKRow&);
  void (*topk_relu_backward)(const TopKRow&);
};

// The table for this machine, or the one that LING_CPU_CAPABILITY or select_kernels names.
const Kernels& kernels();

}  // namespace ling
