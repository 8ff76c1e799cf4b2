// Tensors and arguments of the operators, checked, for the CUDA library and the CPU's fp8 operators.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "elementwise.h"
#include "math_host.h"

namespace ling {

// What the operators need to know of a functor before they run it.
struct FunctorInfo {
  const char* name;
  bool gated;
  int max_scalars;
  int (*slot)(int i, int num_scalars);
  int num_params, num_scalars;  // of the operator; a series has any even number of scalars up to 16
};

inline const FunctorInfo& functor_info(const std::string& name, const std::vector<double>& params, int64_t scalars) {
  using Math = LING_CPU_NAMESPACE::HostMath;
  struct Needs {
    const char* name;
    int params, scalars;
  };
  static constexpr Needs kNeeds[] = {{"powlu", 1, 0},    {"swiglu_clip", 3, 0}, {"swiglu_clip_post", 1, 0},
                                     {"situ_glu", 2, 0}, {"fatreglu", 1, 0},    {"leaky_relu", 0, 1},
                                     {"polyrelu", 0, 4}, {"crrelu", 0, 1}};
  static const std::vector<FunctorInfo> kInfos = [] {
    std::vector<FunctorInfo> infos;
#define LING_INFO(NAME, FUNCTOR)                                                                         \
  infos.push_back({NAME, FUNCTOR<Math>::gated, FUNCTOR<Math>::max_scalars,                               \
                   [](int i, int n) { return FUNCTOR<Math>::slot(i, n); }, 0, 0});
    LING_FOR_EACH_ACTIVATION(LING_INFO)
#undef LING_INFO
    for (FunctorInfo& info : infos) {
      if (std::strncmp(info.name, "series_", 7) == 0) info.num_params = 1;
      for (const Needs& needs : kNeeds)
        if (std::strcmp(info.name, needs.name) == 0) info.num_params = needs.params, info.num_scalars = needs.scalars;
    }
    return infos;
  }();
  const std::string key = functor_name(name.c_str(), params.data(), static_cast<int>(params.size()));
  for (const FunctorInfo& info : kInfos) {
    if (key != info.name) continue;
    const bool series = name == "series";
    STD_TORCH_CHECK(static_cast<int>(params.size()) == info.num_params, name, " takes ", info.num_params,
                    " parameters, not ", params.size());
    STD_TORCH_CHECK(series ? scalars >= 2 && scalars <= 16 && scalars % 2 == 0 : scalars == info.num_scalars, name,
                    " takes ", series ? "2 to 16 scalars (a_1 .. a_n, b_1 .. b_n)" : std::to_string(info.num_scalars),
                    series ? "" : " scalars", ", not ", scalars);
    return info;
  }
  STD_TORCH_CHECK(false, "no fused activation is called '", name, "'");
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Calls f with a value of the storage type of a tensor.
template <class Function>
auto with_storage(const Tensor& tensor, Function&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(F32{});
    case ScalarType::Half: return f(F16{});
    case ScalarType::BFloat16: return f(BF16{});
    default: STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
  }
}

inline void check_same_device(const Tensor& tensor, const Tensor& x, const char* what) {
  STD_TORCH_CHECK(tensor.device() == x.device(), what, " must be on the device of x");
}

// [..., columns] seen as [count, columns]: the last dimension contiguous, the leading ones at one distance.
struct RowView {
  void* data;
  int64_t count = 1, columns, stride;

  RowView(const Tensor& tensor, const char* what) : data(tensor.data_ptr()) {
    const int64_t dim = tensor.dim();
    STD_TORCH_CHECK(dim >= 1, what, " must have at least one dimension");
    columns = stride = tensor.size(dim - 1);
    STD_TORCH_CHECK(columns <= 1 || tensor.stride(dim - 1) == 1, what,
                    ": the last dimension must be contiguous; pass ", what, ".contiguous()");
    bool first = true;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (tensor.size(i) != 1) {
        if (first) stride = tensor.stride(i);
        STD_TORCH_CHECK(first || count == 0 || tensor.stride(i) == stride * count, what,
                        ": rows must be at one distance from each other; pass ", what, ".contiguous()");
        first = false;
      }
      count *= tensor.size(i);
    }
  }

  template <class T>
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (count <= 1 || stride % kVector<T> == 0);
  }
};

// One number per row, of a tensor [..] in fp32, bf16 or fp16; ones without a tensor.
inline PerRow per_row(const MaybeTensor& tensor, const Tensor& x, int64_t rows, const char* what) {
  if (!tensor) return {};
  check_same_device(*tensor, x, what);
  STD_TORCH_CHECK(tensor->numel() == rows, what, " has ", tensor->numel(), " numbers for ", rows, " tokens");
  STD_TORCH_CHECK(tensor->is_contiguous(), what, " must be contiguous; pass ", what, ".contiguous()");
  switch (tensor->scalar_type()) {
    case ScalarType::Float: return {tensor->data_ptr(), Kind::f32};
    case ScalarType::Half: return {tensor->data_ptr(), Kind::f16};
    case ScalarType::BFloat16: return {tensor->data_ptr(), Kind::bf16};
    default: STD_TORCH_CHECK(false, what, " must be float32, float16 or bfloat16");
  }
}

// A contiguous fp32 tensor of so many numbers on x's device.
inline float* numbers_of(const Tensor& tensor, const Tensor& x, int64_t count, const char* what) {
  check_same_device(tensor, x, what);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count, what,
                  " must be contiguous float32 with ", count, " numbers");
  return static_cast<float*>(tensor.data_ptr());
}

inline Tensor empty_at(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), dtype);
}

// x's shape with another number of columns.
inline std::vector<int64_t> shape_with(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(columns);
  return sizes;
}

// The operands of an element-wise operator. Keep the tensors alive while it runs.
struct ElementwiseCall {
  const FunctorInfo& info;
  RowView in;
  ElementwiseArgs args;

  ElementwiseCall(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& scalars, const std::string& name,
                  const std::vector<double>& params)
      : info(functor_info(name, params, scalars ? scalars->numel() : 0)), in(x, "x") {
    STD_TORCH_CHECK(!info.gated || in.columns % 2 == 0, name, " takes gate and up side by side, not ", in.columns,
                    " columns");
    args.x = in.data;
    args.x_stride = in.stride;
    args.rows = in.count;
    args.width = info.gated ? in.columns / 2 : in.columns;
    args.weight = per_row(weight, x, in.count, "weight");
    args.num_scalars = scalars ? static_cast<int>(scalars->numel()) : 0;
    if (scalars) args.scalars = numbers_of(*scalars, x, args.num_scalars, "scalars");
    for (size_t i = 0; i < params.size(); ++i) args.params[i] = static_cast<float>(params[i]);
    args.vector = with_storage(x, [&](auto type) {
      using T = decltype(type);
      return in.aligned<T>() && args.width % kVector<T> == 0;
    });
  }

  bool empty() const { return args.rows == 0 || args.width == 0; }

  // A result, which is contiguous.
  void set_out(const Tensor& out) {
    args.out = out.data_ptr();
    args.vector = args.vector && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  }

  void set_upstream(const Tensor& dy, const Tensor& x) {
    check_same_device(dy, x, "dy");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x must have one dtype");
    const RowView upstream(dy, "dy");
    STD_TORCH_CHECK(upstream.count == args.rows && upstream.columns == args.width, "dy has ", upstream.count,
                    " rows of ", upstream.columns, " where ", args.rows, " of ", args.width, " are needed");
    args.dy = upstream.data;
    args.dy_stride = upstream.stride;
    args.vector = args.vector && with_storage(x, [&](auto type) { return upstream.aligned<decltype(type)>(); });
  }
};

}  // namespace ling
