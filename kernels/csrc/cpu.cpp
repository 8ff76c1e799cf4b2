// The operators of element-wise activations on the CPU, and the choice of the instruction set.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "cpu_formats.h"
#include "cpu_tensors.h"

namespace ling {

namespace baseline { extern const Kernels kKernels; }
#if defined(LING_CPU_X86)
namespace avx2 { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
#endif

namespace {

// Best first. What this machine cannot run is left out.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(LING_CPU_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&avx512::kKernels);
  if (avx2) found.push_back(&avx2::kKernels);
#endif
  found.push_back(&baseline::kKernels);
  return found;
}

const Kernels* named(const char* name) {
  for (const Kernels* candidate : runnable())
    if (std::strcmp(candidate->name, name) == 0) return candidate;
  return nullptr;
}

const Kernels* choose() {
  const char* wanted = std::getenv("LING_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return runnable().front();
  const Kernels* found = named(wanted);
  STD_TORCH_CHECK(found != nullptr, "LING_CPU_CAPABILITY=", wanted, " cannot run on this machine; the best that can is ",
                  runnable().front()->name, " (there are baseline, avx2, avx512)");
  return found;
}

const Kernels*& chosen() {
  static const Kernels* table = choose();
  return table;
}

// The functions of an activation, whose arguments are checked.
const Activation& find(const std::string& name, const std::vector<double>& params, const MaybeTensor& scalars) {
  const FunctorInfo& info = functor_info(name, params, scalars ? scalars->numel() : 0);
  const Kernels& table = kernels();
  int i = 0;
  while (std::strcmp(info.name, table.activations[i].name) != 0) ++i;  // both lists come of one macro
  return table.activations[i];
}

// The table of an activation for a 16-bit type, made once; null where there is none.
std::shared_ptr<const Table> table_of(const Activation& activation, Dtype dtype, const std::vector<float>& params) {
  if (activation.tabulate == nullptr || dtype == Dtype::float32) return nullptr;
  constexpr size_t kMost = 64;  // of 768 KiB each
  static std::mutex mutex;
  using Key = std::tuple<const Activation*, Dtype, std::vector<float>>;
  static std::map<Key, std::shared_ptr<const Table>> tables;
  const Key key{&activation, dtype, params};
  const std::lock_guard lock(mutex);
  if (const auto found = tables.find(key); found != tables.end()) return found->second;
  const auto made = std::make_shared<Table>();
  activation.tabulate(dtype, params.data(), *made);
  if (tables.size() >= kMost) tables.clear();  // those in use stay with their users
  return tables[key] = made;
}

Tensor ffn_activation(Tensor x, MaybeTensor weight, MaybeTensor scalars, std::string name,
                      std::vector<double> params) {
  const Activation& activation = find(name, params, scalars);
  const Rows in(x, "x");
  const int64_t columns = activation.gated ? in.columns / 2 : in.columns;
  STD_TORCH_CHECK(!activation.gated || in.columns % 2 == 0, name, " takes gate and up side by side, not ", in.columns,
                  " columns");
  const Weights weights(weight, in.count);
  const std::vector<float> params32(params.begin(), params.end()), scalars32 = numbers(scalars, x);
  Tensor y = empty_at(x, shape_with(x, columns), x.scalar_type());
  const Rows out(y, "y");
  if (columns == 0) return y;
  const auto table = table_of(activation, in.dtype, params32);
  torch::stable::parallel_for(0, in.count, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = static_cast<const char*>(in.row(i));
      activation.forward({in.dtype, columns, row, row + columns * size_of(in.dtype), out.row(i), weights[i],
                          params32.data(), scalars32.data(), static_cast<int>(scalars32.size()), table.get()});
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> ffn_activation_backward(Tensor dy, Tensor x, MaybeTensor weight, MaybeTensor scalars,
                                                           std::string name, std::vector<double> params,
                                                           bool need_dweight, bool need_dscalars) {
  const Activation& activation = find(name, params, scalars);
  const Rows in(x, "x"), upstream(dy, "dy");
  const int64_t columns = activation.gated ? in.columns / 2 : in.columns;
  check_same_rows(upstream, in, columns);
  const Weights weights(weight, in.count);
  const std::vector<float> params32(params.begin(), params.end()), scalars32 = numbers(scalars, x);
  const int num_scalars = static_cast<int>(scalars32.size());
  need_dweight = need_dweight && weight.has_value();
  Tensor dx = empty_at(x, shape_with(x, in.columns), x.scalar_type());
  Tensor dweight = need_dweight ? torch::stable::empty_like(*weight) : empty_at(x, {0}, ScalarType::Float);
  Tensor dscalars = empty_at(x, {need_dscalars ? num_scalars : 0}, ScalarType::Float);
  const Rows out(dx, "dx");
  const bool sums = need_dweight || need_dscalars;
  const auto table = table_of(activation, in.dtype, params32);
  // Sums over tokens go by groups of fixed size, so that they do not depend on the threads.
  constexpr int64_t kGroup = 32;
  const int64_t groups = (in.count + kGroup - 1) / kGroup;
  std::vector<double> by_token(need_dweight ? in.count : 0), by_group(sums ? groups * num_scalars : 0);
  torch::stable::parallel_for(0, groups, (grain(columns) + kGroup - 1) / kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kGroup; i < end * kGroup && i < in.count; ++i) {
      const char* row = static_cast<const char*>(in.row(i));
      char* dx_row = static_cast<char*>(out.row(i));
      double found[17] = {};
      activation.backward({in.dtype, columns, upstream.row(i), row, row + columns * size_of(in.dtype), dx_row,
                           dx_row + columns * size_of(in.dtype), weights[i], params32.data(), scalars32.data(),
                           num_scalars, sums ? found : nullptr, table.get()});
      if (need_dweight) by_token[i] = found[0];
      for (int s = 0; sums && s < num_scalars; ++s) by_group[i / kGroup * num_scalars + s] += found[1 + s];
    }
  });
  if (need_dweight) store_numbers(by_token, dweight);
  if (need_dscalars) {
    std::vector<double> totals(num_scalars);
    for (size_t i = 0; i < by_group.size(); ++i) totals[i % num_scalars] += by_group[i];
    store_numbers(totals, dscalars);
  }
  return {dx, dweight, dscalars};
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

float Weights::operator[](int64_t i) const {
  using namespace LING_CPU_NAMESPACE;
  if (data_ == nullptr) return 1.0f;
  if (dtype_ == Dtype::float32) return static_cast<const float*>(data_)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data_)[i];
  return dtype_ == Dtype::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

void store_numbers(const std::vector<double>& values, const Tensor& out) {
  using namespace LING_CPU_NAMESPACE;
  const Dtype dtype = dtype_of(out, "weight");
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = static_cast<float>(values[i]);
    if (dtype == Dtype::float32)
      static_cast<float*>(out.data_ptr())[i] = value;
    else
      static_cast<uint16_t*>(out.data_ptr())[i] =
          dtype == Dtype::bfloat16 ? to_bfloat16(value) : to_float16(value);
  }
}

STABLE_TORCH_LIBRARY_IMPL(ling, CPU, m) {
  m.impl("ffn_activation", TORCH_BOX(&ffn_activation));
  m.impl("ffn_activation_backward", TORCH_BOX(&ffn_activation_backward));
}

}  // namespace ling

// For Python, through ctypes. The instruction set in use, or why there is none; and a change of it: 0 where this machine
// can run it.
extern "C" __attribute__((visibility("default"))) const char* ling_cpu_capability() {
  static std::string problem;
  try {
    return ling::kernels().name;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
extern "C" __attribute__((visibility("default"))) int ling_select_cpu_capability(const char* name) {
  const ling::Kernels* found = ling::named(name);
  if (found != nullptr) ling::chosen() = found;
  return found == nullptr;
}
