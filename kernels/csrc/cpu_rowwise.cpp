// The operators of activations that need statistics of whole rows, on the CPU: PolyNorm and top-k. A row may be one
// tensor-parallel shard; the caller reduces sums, dots and thresholds between the calls.
#include <cmath>
#include <tuple>

#include "cpu_tensors.h"

namespace ling {
namespace {

// PolyNorm. Order of sums, dots and scales: z = x, x^2, x^3; of scalars: a3, a2, a1, a0.
struct PolyNorm {
  const Kernels& table = kernels();
  Rows in;
  Weights weights;
  std::vector<float> scalars;
  const float* sums;
  double width, eps;

  PolyNorm(const Tensor& x, const Tensor& sums_tensor, const MaybeTensor& weight, const Tensor& scalars_tensor,
           int64_t width_, double eps_)
      : in(x, "x"), weights(weight, in.count), scalars(numbers(scalars_tensor, x)), sums(three(sums_tensor, in.count)),
        width(static_cast<double>(width_)), eps(eps_) {
    STD_TORCH_CHECK(scalars.size() == 4, "polynorm takes 4 scalars, not ", scalars.size());
    STD_TORCH_CHECK(width_ >= in.columns, "polynorm: the whole width is ", width_, ", less than the shard's ",
                    in.columns);
  }

  static const float* three(const Tensor& tensor, int64_t tokens) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float &&
                        tensor.numel() == 3 * tokens,
                    "polynorm: sums and dots must be contiguous float32 [", tokens, ", 3] on the CPU");
    return static_cast<const float*>(tensor.data_ptr());
  }

  PolyNormRow row(int64_t i, const Rows* dy, void* out) const {
    PolyNormRow row{in.dtype, in.columns, dy ? dy->row(i) : nullptr, in.row(i), out, weights[i], {}, {}, {}};
    for (int k = 0; k < 4; ++k) row.scalars[k] = scalars[k];
    for (int k = 0; k < 3; ++k)
      row.scales[k] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(sums[3 * i + k]) / width + eps));
    return row;
  }
};

Tensor polynorm_sums(Tensor x) {
  const Kernels& table = kernels();
  const Rows in(x, "x");
  Tensor sums = empty_at(x, {in.count, 3}, ScalarType::Float);
  float* out = static_cast<float*>(sums.data_ptr());
  torch::stable::parallel_for(0, in.count, grain(in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double found[3];
      table.polynorm_sums(in.dtype, in.row(i), in.columns, found);
      for (int k = 0; k < 3; ++k) out[3 * i + k] = static_cast<float>(found[k]);
    }
  });
  return sums;
}

Tensor polynorm(Tensor x, Tensor sums, MaybeTensor weight, Tensor scalars, int64_t width, double eps) {
  const PolyNorm call(x, sums, weight, scalars, width, eps);
  Tensor y = empty_at(x, shape_with(x, call.in.columns), x.scalar_type());
  const Rows out(y, "y");
  torch::stable::parallel_for(0, call.in.count, grain(call.in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) call.table.polynorm(call.row(i, nullptr, out.row(i)));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> polynorm_backward_sums(Tensor dy, Tensor x, Tensor sums, MaybeTensor weight,
                                                          Tensor scalars, int64_t width, double eps) {
  const PolyNorm call(x, sums, weight, scalars, width, eps);
  const Rows upstream(dy, "dy");
  const int64_t tokens = call.in.count;
  check_same_rows(upstream, call.in, call.in.columns);
  Tensor dots = empty_at(x, {tokens, 3}, ScalarType::Float);
  float* dots_data = static_cast<float*>(dots.data_ptr());
  std::vector<double> found(4 * tokens), dweight(weight ? tokens : 0), dscalars(4);
  torch::stable::parallel_for(0, tokens, grain(call.in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      call.table.polynorm_backward_sums(call.row(i, &upstream, nullptr), &found[4 * i]);
  });
  for (int64_t i = 0; i < tokens; ++i) {
    const double w = call.weights[i];
    for (int k = 0; k < 3; ++k) dots_data[3 * i + k] = static_cast<float>(w * found[4 * i + k]);
    for (int s = 0; s < 4; ++s) {
      const double sum = found[4 * i + (s < 3 ? 2 - s : 3)];
      dscalars[s] += w * sum;
      if (weight) dweight[i] += static_cast<double>(call.scalars[s]) * sum;
    }
  }
  Tensor dweight_tensor = weight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  Tensor dscalars_tensor = empty_at(x, {4}, ScalarType::Float);
  store_numbers(dweight, dweight_tensor);
  store_numbers(dscalars, dscalars_tensor);
  return {dots, dweight_tensor, dscalars_tensor};
}

Tensor polynorm_backward(Tensor dy, Tensor x, Tensor sums, Tensor dots, MaybeTensor weight, Tensor scalars,
                         int64_t width, double eps) {
  const PolyNorm call(x, sums, weight, scalars, width, eps);
  const Rows upstream(dy, "dy");
  check_same_rows(upstream, call.in, call.in.columns);
  const float* dots_data = PolyNorm::three(dots, call.in.count);
  Tensor dx = empty_at(x, shape_with(x, call.in.columns), x.scalar_type());
  const Rows out(dx, "dx");
  torch::stable::parallel_for(0, call.in.count, grain(call.in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      PolyNormRow row = call.row(i, &upstream, out.row(i));
      for (int k = 0; k < 3; ++k)
        row.dots[k] = static_cast<float>(static_cast<double>(dots_data[3 * i + k]) / call.width);
      call.table.polynorm_backward(row);
    }
  });
  return dx;
}

std::tuple<Tensor, Tensor> topk_relu_threshold(Tensor x, int64_t k) {
  STD_TORCH_CHECK(k >= 1, "topk_relu: k must be at least 1, not ", k);
  const Kernels& table = kernels();
  const Rows in(x, "x");
  Tensor threshold = empty_at(x, {in.count}, ScalarType::Float), ties = empty_at(x, {in.count}, ScalarType::Int);
  float* thresholds = static_cast<float*>(threshold.data_ptr());
  int32_t* all_ties = static_cast<int32_t*>(ties.data_ptr());
  torch::stable::parallel_for(0, in.count, grain(in.columns), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys((in.columns + 15) / 16 * 16);
    for (int64_t i = begin; i < end; ++i)
      table.topk_threshold(in.dtype, in.row(i), in.columns, k, keys.data(), thresholds + i, all_ties + i);
  });
  return {threshold, ties};
}

struct TopK {
  const Kernels& table = kernels();
  Rows in;
  Weights weights;
  const float* threshold;
  const int32_t* ties;

  TopK(const Tensor& x, const Tensor& threshold_, const Tensor& ties_, const MaybeTensor& weight)
      : in(x, "x"), weights(weight, in.count) {
    STD_TORCH_CHECK(threshold_.is_cpu() && threshold_.is_contiguous() && threshold_.numel() == in.count &&
                        threshold_.scalar_type() == ScalarType::Float,
                    "topk_relu: threshold must be contiguous float32 [", in.count, "] on the CPU");
    STD_TORCH_CHECK(ties_.is_cpu() && ties_.is_contiguous() && ties_.numel() == in.count &&
                        ties_.scalar_type() == ScalarType::Int,
                    "topk_relu: ties must be contiguous int32 [", in.count, "] on the CPU");
    threshold = static_cast<const float*>(threshold_.data_ptr());
    ties = static_cast<const int32_t*>(ties_.data_ptr());
  }
};

Tensor topk_relu(Tensor x, Tensor threshold, Tensor ties, MaybeTensor weight) {
  const TopK call(x, threshold, ties, weight);
  const Rows& in = call.in;
  Tensor y = empty_at(x, shape_with(x, in.columns), x.scalar_type());
  const Rows out(y, "y");
  torch::stable::parallel_for(0, in.count, grain(in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      call.table.topk_relu({in.dtype, in.columns, nullptr, in.row(i), out.row(i), call.weights[i], call.threshold[i],
                           call.ties[i], nullptr});
  });
  return y;
}

std::tuple<Tensor, Tensor> topk_relu_backward(Tensor dy, Tensor x, Tensor threshold, Tensor ties, MaybeTensor weight,
                                              bool need_dweight) {
  const TopK call(x, threshold, ties, weight);
  const Rows& in = call.in;
  const Rows upstream(dy, "dy");
  check_same_rows(upstream, in, in.columns);
  need_dweight = need_dweight && weight.has_value();
  Tensor dx = empty_at(x, shape_with(x, in.columns), x.scalar_type());
  Tensor dweight = need_dweight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  const Rows out(dx, "dx");
  std::vector<double> by_token(need_dweight ? in.count : 0);
  torch::stable::parallel_for(0, in.count, grain(in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      call.table.topk_relu_backward({in.dtype, in.columns, upstream.row(i), in.row(i), out.row(i), call.weights[i],
                                    call.threshold[i], call.ties[i], need_dweight ? &by_token[i] : nullptr});
  });
  store_numbers(by_token, dweight);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ling, CPU, m) {
  m.impl("polynorm_sums", TORCH_BOX(&polynorm_sums));
  m.impl("polynorm", TORCH_BOX(&polynorm));
  m.impl("polynorm_backward_sums", TORCH_BOX(&polynorm_backward_sums));
  m.impl("polynorm_backward", TORCH_BOX(&polynorm_backward));
  m.impl("topk_relu_threshold", TORCH_BOX(&topk_relu_threshold));
  m.impl("topk_relu", TORCH_BOX(&topk_relu));
  m.impl("topk_relu_backward", TORCH_BOX(&topk_relu_backward));
}

}  // namespace ling
