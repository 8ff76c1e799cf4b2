// Tensors as the CPU's operators see them: rows, checked.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu_kernels.h"
#include "tensors.h"

namespace ling {

inline Dtype dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, what, " must be float32, float16 or bfloat16");
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Rows : RowView {
  Dtype dtype;

  Rows(const Tensor& tensor, const char* what) : RowView(tensor, what), dtype(dtype_of(tensor, what)) {
    STD_TORCH_CHECK(tensor.is_cpu(), what, " must be on the CPU");
  }
  void* row(int64_t i) const { return static_cast<char*>(data) + i * stride * size_of(dtype); }
};

// One number per token in fp32: the router weight, or 1 without one.
class Weights {
 public:
  Weights(const MaybeTensor& weight, int64_t tokens) {
    if (!weight) return;
    dtype_ = dtype_of(*weight, "weight");
    STD_TORCH_CHECK(weight->is_cpu(), "weight must be on the CPU");
    STD_TORCH_CHECK(weight->numel() == tokens, "weight has ", weight->numel(), " numbers for ", tokens, " tokens");
    STD_TORCH_CHECK(weight->is_contiguous(), "weight must be contiguous; pass weight.contiguous()");
    data_ = weight->data_ptr();
  }
  float operator[](int64_t i) const;
  Dtype dtype() const { return dtype_; }

 private:
  Dtype dtype_ = Dtype::float32;
  const void* data_ = nullptr;
};

// sums of one double per token to a tensor [T] in the weight's dtype
void store_numbers(const std::vector<double>& values, const Tensor& out);

inline void check_same_rows(const Rows& dy, const Rows& x, int64_t columns) {
  STD_TORCH_CHECK(dy.dtype == x.dtype, "dy and x must have one dtype");
  STD_TORCH_CHECK(dy.count == x.count && dy.columns == columns, "dy has ", dy.count, " rows of ", dy.columns,
                  " where ", x.count, " of ", columns, " are needed");
}

// The numbers of an optional fp32 vector.
inline std::vector<float> numbers(const MaybeTensor& tensor, const Tensor& x) {
  if (!tensor) return {};
  const float* data = numbers_of(*tensor, x, tensor->numel(), "scalars");
  return std::vector<float>(data, data + tensor->numel());
}

// As many rows as make a thread worth its start.
inline int64_t grain(int64_t columns) { return columns >= 16384 ? 1 : 16384 / (columns > 0 ? columns : 1); }

}  // namespace ling
