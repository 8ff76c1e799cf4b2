// Device code on the host, for the tests: FastMath over worst-case special functions, and loops over lanes, warps and
// blocks in place of the GPU's.
#include <cmath>
#include <cstring>
#include <vector>

#include "math_device.cuh"
#include "reduce.cuh"
#include "rowwise.h"

using namespace ling;

namespace {

// Special functions as wrong as the PTX ISA allows: mode 0, as large as they can be; 1, as small; 2, by turns.
struct WorstCase {
  static inline int mode = 0;
  static inline unsigned turn = 0;

  static double sign() {
    turn = turn * 1664525u + 1013904223u;
    return mode == 0 ? 1.0 : (mode == 1 ? -1.0 : (turn >> 31 ? 1.0 : -1.0));
  }
  static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static float wrong(double y, double relative) {
    return flushed(static_cast<float>(y + sign() * relative * std::fabs(y)));
  }

  static float ex2(float x) { return wrong(std::exp2(static_cast<double>(flushed(x))), 0x1p-22); }
  static float lg2(float x) {
    const double y = std::log2(static_cast<double>(flushed(x)));
    if (!std::isfinite(y)) return static_cast<float>(y);
    return x > 0.5f && x < 2.0f ? static_cast<float>(y + sign() * 0x1p-22) : wrong(y, 0x1p-22);
  }
  static float rcp(float x) { return wrong(1.0 / static_cast<double>(flushed(x)), 0x1p-23); }
  static float sqrt(float x) { return wrong(std::sqrt(static_cast<double>(flushed(x))), 0x1p-23); }
  // denormal results too, unlike the others
  static float tanh(float x) {
    return static_cast<float>(std::tanh(static_cast<double>(x)) * (1.0 + sign() * 0x1p-11));
  }
};

template <class F>
void evaluate(const float* params, const float* scalars, int num_scalars, int64_t n, const float* g, const float* u,
              const float* dy, float* y, float* phi, float* dg, float* du) {
  const F f(params, scalars, num_scalars);
  for (int64_t i = 0; i < n; ++i) {
    float dscalars[kMaxScalars] = {};
    if constexpr (F::gated) {
      y[i] = f.forward(g[i], u[i]);
      phi[i] = f.backward(g[i], u[i], dy[i], dg[i], du[i], dscalars);
    } else {
      y[i] = f.forward(g[i]);
      phi[i] = f.backward(g[i], dy[i], dg[i], dscalars);
    }
  }
}

// What a warp's butterfly of shuffles leaves in lane 0, in the same order.
float butterfly(std::vector<float> lanes) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const std::vector<float> before = lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = before[lane] + before[lane ^ distance];
  }
  return lanes[0];
}

template <class F, class T>
void run_forward(ElementwiseArgs args, int64_t warps, bool whole_rows) {
  const F f(args.params, args.scalars, args.num_scalars);
  choose_spans(args, kVector<T>, warps, whole_rows);
  for (int64_t i = 0; i < args.rows * args.spans; ++i) {
    const Item item = item_of(args, i);
    for (int lane = 0; lane < kLanes; ++lane) forward_span<F, T>(args, f, item.row, item.span, lane);
  }
}

// Blocks in an order of their own, as a grid of two would take them.
template <class F, class T>
void run_backward(ElementwiseArgs args, float* dscalars) {
  const F f(args.params, args.scalars, args.num_scalars);
  choose_spans(args, kVector<T>, 1, true);
  const int64_t tiles = tiles_of(args.rows);
  std::vector<float> partials(tiles * kMaxScalars);
  for (int64_t first = 0; first < 2; ++first)
    for (int64_t tile = first; tile < tiles; tile += 2) {
      std::vector<std::vector<float>> sums(kMaxScalars, std::vector<float>(kWarps));
      for (int warp = 0; warp < kWarps; ++warp) {
        std::vector<std::vector<float>> found(kLanes, std::vector<float>(kMaxScalars));
        for (int turn = 0; turn < kRowsPerTile / kWarps; ++turn) {
          const int64_t row = row_of_tile(tile, warp, turn);
          if (row >= args.rows) break;
          std::vector<float> dots(kLanes);
          for (int lane = 0; lane < kLanes; ++lane)
            dots[lane] = backward_span<F, T>(args, f, row, 0, lane, found[lane].data());
          args.dweight.store(row, butterfly(dots));
        }
        for (int i = 0; i < kMaxScalars; ++i) {
          std::vector<float> lanes(kLanes);
          for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = found[lane][i];
          sums[i][warp] = butterfly(lanes);
        }
      }
      for (int i = 0; i < kMaxScalars; ++i)
        for (int warp = 0; warp < kWarps; ++warp) partials[tile * kMaxScalars + i] += sums[i][warp];
    }
  for (int i = 0; i < args.num_scalars; ++i) {
    std::vector<double> sums(kReduceThreads);
    for (int t = 0; t < kReduceThreads; ++t)
      sums[t] = strided_sum(partials.data() + F::slot(i, args.num_scalars), tiles, kMaxScalars, t);
    for (int half = kReduceThreads / 2; half > 0; half /= 2)
      for (int t = 0; t < half; ++t) sums[t] += sums[t + half];
    dscalars[i] = static_cast<float>(sums[0]);
  }
}

template <class Function>
void with_type(int bits, Function&& f) {
  if (bits == 32) f(F32{});
  if (bits == 16) f(F16{});
  if (bits == 8) f(BF16{});  // its bits of significand
}

using Exact = LING_CPU_NAMESPACE::HostMath;

}  // namespace

extern "C" {

int fast_math(const char* name, int mode, const float* params, const float* scalars, int num_scalars, int64_t n,
              const float* g, const float* u, const float* dy, float* y, float* phi, float* dg, float* du) {
  WorstCase::mode = mode;
#define LING_CASE(NAME, FUNCTOR)                                                                                  \
  if (std::strcmp(name, NAME) == 0)                                                                               \
    return evaluate<FUNCTOR<FastMath<WorstCase>>>(params, scalars, num_scalars, n, g, u, dy, y, phi, dg, du), 0;
  LING_FOR_EACH_ACTIVATION(LING_CASE)
#undef LING_CASE
  return 1;
}

// ReGLU of x [rows, 2 width] with this row stride, as the kernel of a grid of so many warps goes through it.
void forward(int bits, const void* x, int64_t stride, int64_t rows, int64_t width, int vector, const float* weight,
             int64_t warps, int whole_rows, void* y) {
  ElementwiseArgs args;
  args.x = x, args.x_stride = stride, args.rows = rows, args.width = width, args.vector = vector, args.out = y;
  if (weight != nullptr) args.weight = {const_cast<float*>(weight), Kind::f32};
  with_type(bits, [&](auto type) { run_forward<ReGLU<Exact>, decltype(type)>(args, warps, whole_rows); });
}

// ReGLU (num_scalars 0) or PolyReLU (4).
void backward(int bits, const void* x, int64_t stride, const void* dy, int64_t dy_stride, int64_t rows, int64_t width,
              int vector, const float* weight, const float* scalars, int num_scalars, void* dx, float* dweight,
              float* dscalars) {
  ElementwiseArgs args;
  args.x = x, args.x_stride = stride, args.rows = rows, args.width = width, args.vector = vector, args.out = dx;
  args.dy = dy, args.dy_stride = dy_stride, args.scalars = scalars, args.num_scalars = num_scalars;
  args.weight = {const_cast<float*>(weight), Kind::f32};
  args.dweight = {dweight, Kind::f32};
  with_type(bits, [&](auto type) {
    if (num_scalars == 0)
      run_backward<ReGLU<Exact>, decltype(type)>(args, dscalars);
    else
      run_backward<PolyReLU<Exact>, decltype(type)>(args, dscalars);
  });
}

// One row and span of a tensor too large to exist: what is at x is the row itself.
void far_row(const uint16_t* x, int64_t stride, int64_t row, int64_t width, uint16_t* y) {
  ElementwiseArgs args;
  args.x = x - row * stride, args.x_stride = stride, args.rows = row + 1, args.width = width, args.vector = true;
  args.out = y - row * width;
  choose_spans(args, kVector<BF16>, 1, true);
  const ReGLU<Exact> f(nullptr, nullptr, 0);
  for (int lane = 0; lane < kLanes; ++lane) forward_span<ReGLU<Exact>, BF16>(args, f, row, 0, lane);
}

// The sixteen-bit keys of top-k and what they stand for.
void topk_keys(int bits, const uint16_t* x, int64_t n, int32_t* keys, float* values) {
  with_type(bits, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(typename T::Raw) == 2)
      for (int64_t i = 0; i < n; ++i) {
        keys[i] = static_cast<int32_t>(TopKKey<T>::key(x[i]));
        values[i] = TopKKey<T>::value(static_cast<uint32_t>(keys[i]));
      }
  });
}
}
