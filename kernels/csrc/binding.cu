// The operators of ling/activations/ops.py on CUDA devices, through torch's stable ABI.
//
// Everything runs on the current stream of x's device; memory comes from torch's allocator, and nothing waits for the
// device, so all of it can be captured in a CUDA graph.
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "fp8_tensors.h"
#include "launch.cuh"
#include "operators.cuh"
#include "tensors.h"

namespace ling {
namespace {

// The device of x made current, and its current stream.
class Place {
 public:
  explicit Place(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Tensor zero_if(bool empty, Tensor tensor) { return empty ? torch::stable::zero_(tensor) : tensor; }

Slots slots_of(const FunctorInfo& info, int num_scalars) {
  Slots slots{};
  for (int i = 0; i < num_scalars; ++i) slots.slot[i] = info.slot(i, num_scalars);
  return slots;
}

Tensor ffn_activation(Tensor x, MaybeTensor weight, MaybeTensor scalars, std::string name,
                      std::vector<double> params) {
  ElementwiseCall call(x, weight, scalars, name, params);
  const Place place(x);
  Tensor y = empty_at(x, shape_with(x, call.args.width), x.scalar_type());
  if (call.empty()) return y;
  call.set_out(y);
  with_storage(x, [&](auto type) { elementwise_forward<decltype(type)>(call.info.name, call.args, place); });
  return y;
}

// The gradients of weight and scalars, and where the kernels put what they are summed from.
struct SmallGradients {
  Tensor dweight, dscalars;
  PerRow dweight_rows;
  Tensor partials;
  int num_scalars;

  SmallGradients(const ElementwiseCall& call, const Tensor& x, const MaybeTensor& weight, bool need_dweight,
                 bool need_dscalars, int64_t parts)
      : dweight(need_dweight && weight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float)),
        dscalars(empty_at(x, {need_dscalars ? call.args.num_scalars : 0}, ScalarType::Float)),
        dweight_rows(need_dweight && weight ? per_row(dweight, x, call.args.rows, "dweight") : PerRow{}),
        partials(empty_at(x, {need_dscalars ? parts * call.info.max_scalars : 0}, ScalarType::Float)),
        num_scalars(need_dscalars ? call.args.num_scalars : 0) {
    dweight = zero_if(call.empty(), dweight);
    dscalars = zero_if(call.empty(), dscalars);
  }
  float* partials_data() const { return num_scalars > 0 ? static_cast<float*>(partials.data_ptr()) : nullptr; }
  void reduce(const ElementwiseCall& call, int64_t parts, cudaStream_t stream) const {
    if (num_scalars == 0) return;
    reduce_scalars(partials_data(), parts, call.info.max_scalars, slots_of(call.info, num_scalars), num_scalars,
                   static_cast<float*>(dscalars.data_ptr()), stream);
  }
};

std::tuple<Tensor, Tensor, Tensor> ffn_activation_backward(Tensor dy, Tensor x, MaybeTensor weight, MaybeTensor scalars,
                                                           std::string name, std::vector<double> params,
                                                           bool need_dweight, bool need_dscalars) {
  ElementwiseCall call(x, weight, scalars, name, params);
  call.set_upstream(dy, x);
  const Place place(x);
  Tensor dx = empty_at(x, shape_with(x, call.in.columns), x.scalar_type());
  const int64_t tiles = tiles_of(call.args.rows);
  const SmallGradients small(call, x, weight, need_dweight, need_dscalars, tiles);
  if (call.empty()) return {dx, small.dweight, small.dscalars};
  call.set_out(dx);
  call.args.dweight = small.dweight_rows;
  call.args.dscalars = small.partials_data();
  with_storage(x, [&](auto type) { elementwise_backward<decltype(type)>(call.info.name, call.args, place); });
  small.reduce(call, tiles, place);
  return {dx, small.dweight, small.dscalars};
}

// Whether a block of the current device can have this much shared memory.
bool fits(int64_t bytes) {
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes <= most;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_activation_fp8(Tensor x, MaybeTensor weight, MaybeTensor scalars,
                                                              std::string name, std::vector<double> params,
                                                              bool power_of_2_scales) {
  const ElementwiseCall call(x, weight, scalars, name, params);
  const Place place(x);
  const Fp8Results results(x, call.args.rows, call.args.width);
  const Fp8Args args = fp8_args(call, results, false, power_of_2_scales);
  if (!call.empty()) with_storage(x, [&](auto type) { fp8_forward<decltype(type)>(call.info.name, args, place); });
  return {results.rows, results.row_scale_inv, results.columns, results.column_scale_inv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_activation_backward_fp8(
    Tensor dy, Tensor x, MaybeTensor weight, MaybeTensor scalars, std::string name, std::vector<double> params,
    bool power_of_2_scales, bool need_dweight, bool need_dscalars) {
  ElementwiseCall call(x, weight, scalars, name, params);
  call.set_upstream(dy, x);
  const Place place(x);
  const Fp8Results results(x, call.args.rows, call.in.columns);
  Fp8Args args = fp8_args(call, results, true, power_of_2_scales);
  const bool sums_rows = need_dweight && weight && !call.empty();
  // two tiles of fp32 need 150 KiB; smaller GPUs make one at a time
  args.paired = args.paired && with_storage(x, [&](auto type) {
    return fits(Fp8Shared<decltype(type)>::bytes(args.tiles(), sums_rows, 0));
  });
  const SmallGradients small(call, x, weight, need_dweight, need_dscalars, args.blocks());
  const Tensor dots = empty_at(x, {sums_rows ? args.column_tiles() : 0, call.args.rows}, ScalarType::Float);
  if (sums_rows) args.dots = static_cast<float*>(dots.data_ptr());
  args.base.dscalars = small.partials_data();
  if (!call.empty()) {
    with_storage(x, [&](auto type) { fp8_backward<decltype(type)>(call.info.name, args, place); });
    if (sums_rows) reduce_rows(args.dots, args.column_tiles(), call.args.rows, small.dweight_rows, place);
    small.reduce(call, args.blocks(), place);
  }
  return {results.rows,          results.row_scale_inv, results.columns,
          results.column_scale_inv, small.dweight,      small.dscalars};
}

// ---- PolyNorm and top-k ReLU: x [..., F] without a functor. ----

struct RowCall {
  RowView in;
  ElementwiseArgs args;

  RowCall(const Tensor& x, const MaybeTensor& weight) : in(x, "x") {
    args.x = in.data;
    args.x_stride = in.stride;
    args.rows = in.count;
    args.width = in.columns;
    args.weight = per_row(weight, x, in.count, "weight");
    args.vector = with_storage(x, [&](auto type) {
      using T = decltype(type);
      return in.aligned<T>() && args.width % kVector<T> == 0;
    });
  }
  bool empty() const { return args.rows == 0 || args.width == 0; }
  void set_upstream(const Tensor& dy, const Tensor& x) {
    check_same_device(dy, x, "dy");
    STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy and x must have one dtype");
    const RowView upstream(dy, "dy");
    STD_TORCH_CHECK(upstream.count == args.rows && upstream.columns == args.width, "dy must have the shape of x");
    args.dy = upstream.data;
    args.dy_stride = upstream.stride;
    args.vector = args.vector && with_storage(x, [&](auto type) { return upstream.aligned<decltype(type)>(); });
  }
  Tensor new_out(const Tensor& x) {
    Tensor out = empty_at(x, shape_with(x, in.columns), x.scalar_type());
    args.out = out.data_ptr();
    return out;
  }
};

struct PolyNormCall : RowCall {
  PolyNormArgs all;

  PolyNormCall(const Tensor& x, const Tensor& sums, const MaybeTensor& weight, const Tensor& scalars, int64_t width,
               double eps)
      : RowCall(x, weight) {
    STD_TORCH_CHECK(width >= in.columns, "polynorm: the whole width is ", width, ", less than the shard's ",
                    in.columns);
    args.scalars = numbers_of(scalars, x, 4, "scalars");
    args.num_scalars = 4;
    all.sums = numbers_of(sums, x, 3 * in.count, "sums");
    all.width = static_cast<float>(width);
    all.eps = static_cast<float>(eps);
  }
  void run(const Tensor& x, PolyNormStep step, cudaStream_t stream) {
    all.base = args;
    with_storage(x, [&](auto type) { polynorm<decltype(type)>(step, all, stream); });
  }
};

Tensor polynorm_sums(Tensor x) {
  RowCall call(x, std::nullopt);
  const Place place(x);
  Tensor sums = empty_at(x, {call.args.rows, 3}, ScalarType::Float);
  if (call.empty()) return zero_if(true, sums);
  PolyNormArgs args;
  args.base = call.args;
  args.out_sums = static_cast<float*>(sums.data_ptr());
  with_storage(x, [&](auto type) { polynorm<decltype(type)>(PolyNormStep::sums, args, place); });
  return sums;
}

Tensor polynorm_forward(Tensor x, Tensor sums, MaybeTensor weight, Tensor scalars, int64_t width, double eps) {
  PolyNormCall call(x, sums, weight, scalars, width, eps);
  const Place place(x);
  Tensor y = call.new_out(x);
  if (!call.empty()) call.run(x, PolyNormStep::forward, place);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> polynorm_backward_sums(Tensor dy, Tensor x, Tensor sums, MaybeTensor weight,
                                                          Tensor scalars, int64_t width, double eps) {
  PolyNormCall call(x, sums, weight, scalars, width, eps);
  call.set_upstream(dy, x);
  const Place place(x);
  const int64_t rows = call.args.rows;
  Tensor dots = empty_at(x, {rows, 3}, ScalarType::Float), dscalars = empty_at(x, {4}, ScalarType::Float);
  Tensor dweight = weight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  if (call.empty()) return {zero_if(true, dots), zero_if(true, dweight), zero_if(true, dscalars)};
  const Tensor partials = empty_at(x, {rows, 4}, ScalarType::Float);
  if (weight) call.args.dweight = per_row(dweight, x, rows, "dweight");
  call.all.out_sums = static_cast<float*>(dots.data_ptr());
  call.all.out_dscalars = static_cast<float*>(partials.data_ptr());
  call.run(x, PolyNormStep::backward_sums, place);
  reduce_scalars(call.all.out_dscalars, rows, 4, Slots{{0, 1, 2, 3}}, 4, static_cast<float*>(dscalars.data_ptr()),
                 place);
  return {dots, dweight, dscalars};
}

Tensor polynorm_backward(Tensor dy, Tensor x, Tensor sums, Tensor dots, MaybeTensor weight, Tensor scalars,
                         int64_t width, double eps) {
  PolyNormCall call(x, sums, weight, scalars, width, eps);
  call.set_upstream(dy, x);
  const Place place(x);
  Tensor dx = call.new_out(x);
  call.all.dots = numbers_of(dots, x, 3 * call.args.rows, "dots");
  if (!call.empty()) call.run(x, PolyNormStep::backward, place);
  return dx;
}

struct TopKCall : RowCall {
  TopKArgs all;

  TopKCall(const Tensor& x, const Tensor& threshold, const Tensor& ties, const MaybeTensor& weight)
      : RowCall(x, weight) {
    all.threshold = numbers_of(threshold, x, in.count, "threshold");
    check_same_device(ties, x, "ties");
    STD_TORCH_CHECK(ties.scalar_type() == ScalarType::Int && ties.is_contiguous() && ties.numel() == in.count,
                    "ties must be contiguous int32 with one number per token");
    all.ties = static_cast<int32_t*>(ties.data_ptr());
  }
  void run(const Tensor& x, TopKStep step, cudaStream_t stream) {
    all.base = args;
    with_storage(x, [&](auto type) { topk_relu<decltype(type)>(step, all, stream); });
  }
};

std::tuple<Tensor, Tensor> topk_relu_threshold(Tensor x, int64_t k) {
  STD_TORCH_CHECK(k >= 1, "topk_relu: k must be at least 1, not ", k);
  const Place place(x);
  const int64_t rows = RowView(x, "x").count;
  Tensor threshold = empty_at(x, {rows}, ScalarType::Float), ties = empty_at(x, {rows}, ScalarType::Int);
  TopKCall call(x, threshold, ties, std::nullopt);
  if (call.empty()) return {zero_if(true, threshold), zero_if(true, ties)};
  call.all.k = k;
  call.run(x, TopKStep::threshold, place);
  return {threshold, ties};
}

Tensor topk_relu_forward(Tensor x, Tensor threshold, Tensor ties, MaybeTensor weight) {
  TopKCall call(x, threshold, ties, weight);
  const Place place(x);
  Tensor y = call.new_out(x);
  if (!call.empty()) call.run(x, TopKStep::forward, place);
  return y;
}

std::tuple<Tensor, Tensor> topk_relu_backward(Tensor dy, Tensor x, Tensor threshold, Tensor ties, MaybeTensor weight,
                                              bool need_dweight) {
  TopKCall call(x, threshold, ties, weight);
  call.set_upstream(dy, x);
  const Place place(x);
  Tensor dx = call.new_out(x);
  need_dweight = need_dweight && weight.has_value();
  Tensor dweight = need_dweight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  if (call.empty()) return {dx, zero_if(true, dweight)};
  if (need_dweight) call.args.dweight = per_row(dweight, x, call.args.rows, "dweight");
  call.run(x, TopKStep::backward, place);
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ling, CUDA, m) {
  m.impl("ffn_activation", TORCH_BOX(&ffn_activation));
  m.impl("ffn_activation_backward", TORCH_BOX(&ffn_activation_backward));
  m.impl("ffn_activation_fp8", TORCH_BOX(&ffn_activation_fp8));
  m.impl("ffn_activation_backward_fp8", TORCH_BOX(&ffn_activation_backward_fp8));
  m.impl("polynorm_sums", TORCH_BOX(&polynorm_sums));
  m.impl("polynorm", TORCH_BOX(&polynorm_forward));
  m.impl("polynorm_backward_sums", TORCH_BOX(&polynorm_backward_sums));
  m.impl("polynorm_backward", TORCH_BOX(&polynorm_backward));
  m.impl("topk_relu_threshold", TORCH_BOX(&topk_relu_threshold));
  m.impl("topk_relu", TORCH_BOX(&topk_relu_forward));
  m.impl("topk_relu_backward", TORCH_BOX(&topk_relu_backward));
}

}  // namespace ling
