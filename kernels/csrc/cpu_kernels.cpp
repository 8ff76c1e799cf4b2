// The rows of every operator for one instruction set: LING_CPU_NAMESPACE names it, the compiler's flags choose it.
#include "cpu_kernels.h"

#include "cpu_blocks.h"
#include "functors.h"

namespace ling::LING_CPU_NAMESPACE {
namespace {

template <class F>
concept IsSeries = requires { F::max_terms; };
template <class F>
concept HasTable = F::max_scalars == 0;

template <class F>
void tabulate(Dtype dtype, const float* params, Table& table) {
  const F f(params, nullptr, 0);
  uint16_t bits[kBlock];
  alignas(64) Block x;
  for (int at = 0; at < Table::kSize; at += kBlock) {
    for (int j = 0; j < kBlock; ++j) bits[j] = static_cast<uint16_t>(at + j);
    load(dtype, bits, 0, kBlock, x);
    for (int j = 0; j < kBlock; ++j) table.forward[at + j] = f.first()(x[j]);
    for (int j = 0; j < kBlock; ++j) table.value[at + j] = f.first()(x[j], table.slope[at + j]);
  }
}

// One block of the activation, times the router weight.
template <class F>
void forward_block(const F& f, int64_t whole, float weight, const float* __restrict__ g, const float* __restrict__ u,
                   float* __restrict__ y) {
  if constexpr (F::gated) {
    for (int64_t j = 0; j < whole; ++j) y[j] = f.forward(g[j], u[j]) * weight;
  } else if constexpr (IsSeries<F>) {
    for (int64_t j = 0; j < whole; ++j) y[j] = 0.0f;
    for (int i = 0; i < f.terms; ++i)
      for (int64_t j = 0; j < whole; ++j) y[j] += f.term(i, g[j]);
    for (int64_t j = 0; j < whole; ++j) y[j] *= weight;
  } else {
    for (int64_t j = 0; j < whole; ++j) y[j] = f.forward(g[j]) * weight;
  }
}

// The same from the values of first().
template <HasTable F>
void forward_block_from(const F& f, int64_t whole, float weight, const float* __restrict__ value,
                        const float* __restrict__ u, float* __restrict__ y) {
  if constexpr (F::gated)
    for (int64_t j = 0; j < whole; ++j) y[j] = f.forward_from(value[j], u[j]) * weight;
  else
    for (int64_t j = 0; j < whole; ++j) y[j] = value[j] * weight;
}

template <class F>
void forward_row(const ForwardRow& row) {
  const F f(row.params, row.scalars, row.num_scalars);
  alignas(64) Block gates, ups, out;
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    const float* u = F::gated ? read(row.dtype, row.u, at, n, ups) : nullptr;
    float* y = target(row.dtype, row.y, at, n, out);
    if (HasTable<F> && row.table != nullptr) {
      if constexpr (HasTable<F>) {
        look_up(row.table->forward, row.g, at, n, gates);
        forward_block_from(f, whole_vectors(n), row.weight, gates, u, y);
      }
    } else {
      forward_block(f, whole_vectors(n), row.weight, read(row.dtype, row.g, at, n, gates), u, y);
    }
    write(row.dtype, out, n, row.y, at);
  });
}

// One block: dg and du from g, u and dy; phi and the terms of the scalars' gradients too where kSums.
template <class F, bool kSums>
void backward_block(const F& f, int64_t whole, float weight, const float* __restrict__ g, const float* __restrict__ u,
                    const float* __restrict__ dy, float* __restrict__ dg, float* __restrict__ du,
                    float* __restrict__ phi, Block* __restrict__ terms) {
  if constexpr (IsSeries<F>) {
    for (int64_t j = 0; j < whole; ++j) dg[j] = phi[j] = 0.0f;
    for (int i = 0; i < f.terms; ++i) {
      float* __restrict__ da = terms[i];
      float* __restrict__ db = terms[F::max_terms + i];
      for (int64_t j = 0; j < whole; ++j) {
        float dx = 0.0f, da_j = 0.0f, db_j = 0.0f;
        phi[j] += f.term_backward(i, g[j], dy[j] * weight, dx, da_j, db_j);
        dg[j] += dx;
        if constexpr (kSums) da[j] = da_j, db[j] = db_j;
      }
    }
  } else {
    for (int64_t j = 0; j < whole; ++j) {
      float scalars[F::max_scalars + 1] = {};
      float value;
      if constexpr (F::gated)
        value = f.backward(g[j], u[j], dy[j] * weight, dg[j], du[j], scalars);
      else
        value = f.backward(g[j], dy[j] * weight, dg[j], scalars);
      if constexpr (kSums) {
        phi[j] = value;
        for (int i = 0; i < F::max_scalars; ++i) terms[i][j] = scalars[i];
      }
    }
  }
}

// The same from what first() gives; phi always.
template <HasTable F>
void backward_block_from(const F& f, int64_t whole, float weight, const float* __restrict__ value,
                         const float* __restrict__ slope, const float* __restrict__ u, const float* __restrict__ dy,
                         float* __restrict__ dg, float* __restrict__ du, float* __restrict__ phi) {
  if constexpr (F::gated)
    for (int64_t j = 0; j < whole; ++j)
      phi[j] = f.backward_from(value[j], slope[j], u[j], dy[j] * weight, dg[j], du[j]);
  else
    for (int64_t j = 0; j < whole; ++j) dg[j] = dy[j] * weight * slope[j], phi[j] = value[j];
}

template <class F>
void backward_row(const BackwardRow& row) {
  const F f(row.params, row.scalars, row.num_scalars);
  alignas(64) Block gates, slopes, ups, upstream, out, out_up, phi, terms[F::max_scalars + 1];
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    const int64_t whole = whole_vectors(n);
    const float* u = F::gated ? read(row.dtype, row.u, at, n, ups) : nullptr;
    const float* dy = read(row.dtype, row.dy, at, n, upstream);
    float* dg = target(row.dtype, row.dg, at, n, out);
    float* du = F::gated ? target(row.dtype, row.du, at, n, out_up) : nullptr;
    if (HasTable<F> && row.table != nullptr) {
      if constexpr (HasTable<F>) {
        look_up(row.table->value, row.g, at, n, gates);
        look_up(row.table->slope, row.g, at, n, slopes);
        backward_block_from(f, whole, row.weight, gates, slopes, u, dy, dg, du, phi);
      }
    } else {
      const float* g = read(row.dtype, row.g, at, n, gates);
      const auto backward = row.sums == nullptr ? backward_block<F, false> : backward_block<F, true>;
      backward(f, whole, row.weight, g, u, dy, dg, du, phi, terms);
    }
    if (row.sums != nullptr) {
      for (int64_t j = 0; j < whole; ++j) phi[j] *= dy[j];
      row.sums[0] += sum(phi, n);
      for (int i = 0; i < row.num_scalars; ++i) row.sums[1 + i] += sum(terms[F::slot(i, row.num_scalars)], n);
    }
    write(row.dtype, out, n, row.dg, at);
    if constexpr (F::gated) write(row.dtype, out_up, n, row.du, at);
  });
}

// PolyNorm: z_k = x^k for k = 1, 2, 3.

void polynorm_sums(Dtype dtype, const void* row, int64_t n, double* sums) {
  alignas(64) Block x;
  double lanes[3][kLanes] = {};
  for_each_block(n, [&](int64_t at, int64_t block) {
    load(dtype, row, at, block, x);
    for (int64_t j = 0; j < whole_vectors(block); j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double square = static_cast<double>(x[j + lane]) * static_cast<double>(x[j + lane]);
        lanes[0][lane] += square;
        lanes[1][lane] += square * square;
        lanes[2][lane] += square * square * square;
      }
  });
  for (int k = 0; k < 3; ++k) {
    sums[k] = 0.0;
    for (double lane : lanes[k]) sums[k] += lane;
  }
}

void polynorm(const PolyNormRow& row) {
  const float c1 = row.scalars[2] * row.scales[0], c2 = row.scalars[1] * row.scales[1];
  const float c3 = row.scalars[0] * row.scales[2], a0 = row.scalars[3], weight = row.weight;
  alignas(64) Block x, y;
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    load(row.dtype, row.x, at, n, x);
    for (int64_t j = 0; j < whole_vectors(n); ++j) y[j] = (((c3 * x[j] + c2) * x[j] + c1) * x[j] + a0) * weight;
    store(row.dtype, y, n, row.out, at);
  });
}

void polynorm_backward_sums(const PolyNormRow& row, double* sums) {
  alignas(64) Block x, dy;
  double lanes[4][kLanes] = {};
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    load(row.dtype, row.x, at, n, x);
    load(row.dtype, row.dy, at, n, dy);
    for (int64_t j = 0; j < whole_vectors(n); j += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const double value = static_cast<double>(x[j + lane]), grad = static_cast<double>(dy[j + lane]);
        lanes[0][lane] += grad * value;
        lanes[1][lane] += grad * value * value;
        lanes[2][lane] += grad * value * value * value;
        lanes[3][lane] += grad;
      }
  });
  for (int k = 0; k < 4; ++k) {
    double total = 0.0;
    for (double lane : lanes[k]) total += lane;
    sums[k] = k < 3 ? total * static_cast<double>(row.scales[k]) : total;
  }
}

void polynorm_backward(const PolyNormRow& row) {
  const float weight = row.weight;
  const float r1 = row.scales[0], r2 = row.scales[1], r3 = row.scales[2];
  const float c1 = row.scalars[2] * r1, c2 = 2.0f * row.scalars[1] * r2, c3 = 3.0f * row.scalars[0] * r3;
  const float d1 = row.dots[0] * r1, d2 = row.dots[1] * r2, d3 = row.dots[2] * r3;
  alignas(64) Block x, dy, dx;
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    load(row.dtype, row.x, at, n, x);
    load(row.dtype, row.dy, at, n, dy);
    for (int64_t j = 0; j < whole_vectors(n); ++j) {
      const float z1 = x[j], z2 = z1 * z1, z3 = z2 * z1, grad = dy[j] * weight;
      dx[j] = c1 * (grad - z1 * d1) + c2 * z1 * (grad - z2 * d2) + c3 * z2 * (grad - z3 * d3);
    }
    store(row.dtype, dx, n, row.out, at);
  });
}

// Top-k: the bits of positive floats are ordered as integers; NaN ranks above infinity.

void topk_threshold(Dtype dtype, const void* row, int64_t n, int64_t k, int32_t* keys, float* threshold,
                    int32_t* ties) {
  alignas(64) Block x;
  for_each_block(n, [&](int64_t at, int64_t block) {
    load(dtype, row, at, block, x);
    for (int64_t j = 0; j < whole_vectors(block); ++j)
      keys[at + j] = x[j] > 0.0f ? bit_cast<int32_t>(x[j]) : (x[j] <= 0.0f ? 0 : INT32_MAX);
  });
  const auto count = [&](int32_t least) {
    int32_t found = 0;
    for (int64_t j = 0; j < whole_vectors(n); ++j) found += keys[j] >= least;
    return found;
  };
  // the largest key that at least k keys reach, bit by bit; bits that the storage type does not have are 0
  int32_t key = 0;
  const int lowest = dtype == Dtype::float32 ? 0 : (dtype == Dtype::bfloat16 ? 16 : 13);
  for (int bit = 30; bit >= lowest; --bit) {
    const int32_t candidate = key | (1 << bit);
    if (count(candidate) >= k) key = candidate;
  }
  key = key < 0x7f800000 ? key : 0x7f800000;
  *threshold = bit_cast<float>(key);
  const int64_t left = k - count(key + 1);
  *ties = key == 0 || left < 0 ? 0 : static_cast<int32_t>(left);
}

// What top-k keeps of a block of x: what is above the threshold, NaN, and the first `ties` of those equal to it.
void keep_largest(const float* __restrict__ x, int64_t n, float threshold, int32_t& ties, float* __restrict__ kept) {
  for (int64_t j = 0; j < whole_vectors(n); ++j) kept[j] = x[j] <= threshold ? 0.0f : 1.0f;
  for (int64_t j = 0; j < n && ties > 0; ++j)
    if (x[j] == threshold) kept[j] = 1.0f, --ties;
}

void topk_relu(const TopKRow& row) {
  alignas(64) Block x, kept;
  int32_t ties = row.ties;
  const float weight = row.weight;
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    load(row.dtype, row.x, at, n, x);
    keep_largest(x, n, row.threshold, ties, kept);
    for (int64_t j = 0; j < whole_vectors(n); ++j) x[j] = kept[j] != 0.0f ? x[j] * weight : 0.0f;
    store(row.dtype, x, n, row.out, at);
  });
}

void topk_relu_backward(const TopKRow& row) {
  alignas(64) Block x, dy, kept;
  int32_t ties = row.ties;
  const float weight = row.weight;
  for_each_block(row.n, [&](int64_t at, int64_t n) {
    load(row.dtype, row.x, at, n, x);
    load(row.dtype, row.dy, at, n, dy);
    keep_largest(x, n, row.threshold, ties, kept);
    for (int64_t j = 0; j < whole_vectors(n); ++j) {
      x[j] = kept[j] != 0.0f ? x[j] * dy[j] : 0.0f;
      kept[j] *= dy[j] * weight;
    }
    if (row.sum != nullptr) *row.sum += sum(x, n);
    store(row.dtype, kept, n, row.out, at);
  });
}

template <class F>
constexpr Activation activation(const char* name) {
  Activation made{name, F::gated, nullptr, forward_row<F>, backward_row<F>};
  if constexpr (HasTable<F>) made.tabulate = tabulate<F>;
  return made;
}

#define LING_ACTIVATION(name, functor) activation<functor<HostMath>>(name),
constexpr Activation kActivations[] = {LING_FOR_EACH_ACTIVATION(LING_ACTIVATION)};
#undef LING_ACTIVATION

}  // namespace

#define LING_TEXT(x) #x
#define LING_EXPANDED_TEXT(x) LING_TEXT(x)
extern const Kernels kKernels = {
    LING_EXPANDED_TEXT(LING_CPU_NAMESPACE),
    kActivations,
    polynorm_sums,
    polynorm,
    polynorm_backward_sums,
    polynorm_backward,
    topk_threshold,
    topk_relu,
    topk_relu_backward,
};

}  // namespace ling::LING_CPU_NAMESPACE
