// The fp8 operators on the CPU: the phases of fp8_tile.h, which are those of the CUDA kernel, for one thread of a block
// after the other. For tests and for emulating fp8 training; not meant to be fast.
#include <tuple>
#include <vector>

#include "fp8_tensors.h"
#include "math_host.h"

namespace ling {
namespace {

using Math = LING_CPU_NAMESPACE::HostMath;

// A functor behind pointers: the tiles are compiled once for all activations.
template <bool is_gated>
struct AnyFunctor {
  static constexpr bool gated = is_gated;
  static constexpr int max_scalars = is_gated ? 0 : kMaxScalars;
  const void* functor;
  float (*forward_of)(const void*, float g, float u);
  float (*backward_of)(const void*, float g, float u, float dy, float& dg, float& du, float* dscalars);

  float forward(float x, float u = 0.0f) const { return forward_of(functor, x, u); }
  float backward(float g, float u, float dy, float& dg, float& du, float* dscalars) const {
    return backward_of(functor, g, u, dy, dg, du, dscalars);
  }
  float backward(float x, float dy, float& dx, float* dscalars) const {
    float none;
    return backward_of(functor, x, 0.0f, dy, dx, none, dscalars);
  }
};

template <class F>
AnyFunctor<F::gated> any(const F& functor) {
  return {&functor,
          [](const void* self, float g, float u) {
            if constexpr (F::gated)
              return static_cast<const F*>(self)->forward(g, u);
            else
              return static_cast<const F*>(self)->forward(g);
          },
          [](const void* self, float g, float u, float dy, float& dg, float& du, float* dscalars) {
            if constexpr (F::gated)
              return static_cast<const F*>(self)->backward(g, u, dy, dg, du, dscalars);
            else
              return static_cast<const F*>(self)->backward(g, dy, dg, dscalars);
          }};
}

template <class T, bool backward, class F>
void run_blocks(const F& f, const Fp8Args& args) {
  torch::stable::parallel_for(0, args.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint4> memory(Fp8Shared<T>::bytes(args, F::max_scalars) / sizeof(uint4) + 1);
    for (int64_t block = begin; block < end; ++block) {
      const auto each_thread = [&](auto&& phase) {
        for (int thread = 0; thread < kThreads; ++thread)
          phase(Fp8Tile<F, T, backward>(args, memory.data(), block, thread));
      };
      each_thread([](const auto& tile) { tile.clear(); });
      each_thread([&](const auto& tile) { tile.compute(f); });
      each_thread([](const auto& tile) { tile.scale(); });
      each_thread([](const auto& tile) { tile.quantize(); });
      if (args.base.dscalars == nullptr) continue;
      for (int half = kThreads / 2; half > 0; half /= 2)
        each_thread([&](const auto& tile) { tile.fold_scalars(half); });
      each_thread([](const auto& tile) { tile.store_scalars(); });
    }
  });
}

template <bool backward>
void run(const std::string& functor, const Tensor& x, const Fp8Args& args) {
#define LING_CASE(NAME, FUNCTOR)                                                                     \
  if (functor == NAME) {                                                                             \
    const FUNCTOR<Math> f(args.base.params, args.base.scalars, args.base.num_scalars);               \
    return with_storage(x, [&](auto type) { run_blocks<decltype(type), backward>(any(f), args); });  \
  }
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_activation_fp8(Tensor x, MaybeTensor weight, MaybeTensor scalars,
                                                              std::string name, std::vector<double> params,
                                                              bool power_of_2_scales) {
  const ElementwiseCall call(x, weight, scalars, name, params);
  const Fp8Results results(x, call.args.rows, call.args.width);
  if (!call.empty()) run<false>(call.info.name, x, fp8_args(call, results, false, power_of_2_scales));
  return {results.rows, results.row_scale_inv, results.columns, results.column_scale_inv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ffn_activation_backward_fp8(
    Tensor dy, Tensor x, MaybeTensor weight, MaybeTensor scalars, std::string name, std::vector<double> params,
    bool power_of_2_scales, bool need_dweight, bool need_dscalars) {
  ElementwiseCall call(x, weight, scalars, name, params);
  call.set_upstream(dy, x);
  const Fp8Results results(x, call.args.rows, call.in.columns);
  need_dweight = need_dweight && weight.has_value();
  Tensor dweight = need_dweight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  Tensor dscalars = empty_at(x, {need_dscalars ? call.args.num_scalars : 0}, ScalarType::Float);
  Fp8Args args = fp8_args(call, results, true, power_of_2_scales);
  const int slots = kMaxScalars;
  std::vector<float> dots(need_dweight ? args.column_tiles() * call.args.rows : 0);
  std::vector<float> partials(need_dscalars ? args.blocks() * slots : 0);
  if (need_dweight) args.dots = dots.data();
  if (!partials.empty()) args.base.dscalars = partials.data();
  if (!call.empty()) run<true>(call.info.name, x, args);
  if (need_dweight) {
    const PerRow out = per_row(dweight, x, call.args.rows, "dweight");
    for (int64_t row = 0; row < call.args.rows; ++row) {
      float sum = 0.0f;
      for (int64_t part = 0; part < args.column_tiles(); ++part) sum += dots[part * call.args.rows + row];
      out.store(row, sum);
    }
  }
  for (int i = 0; need_dscalars && i < call.args.num_scalars; ++i) {
    double sum = 0.0;
    for (size_t j = call.info.slot(i, call.args.num_scalars); j < partials.size(); j += slots) sum += partials[j];
    static_cast<float*>(dscalars.data_ptr())[i] = static_cast<float>(sum);
  }
  return {results.rows, results.row_scale_inv, results.columns, results.column_scale_inv, dweight, dscalars};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ling, CPU, m) {
  m.impl("ffn_activation_fp8", TORCH_BOX(&ffn_activation_fp8));
  m.impl("ffn_activation_backward_fp8", TORCH_BOX(&ffn_activation_backward_fp8));
}

}  // namespace ling
