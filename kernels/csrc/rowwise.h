// Activations that need statistics of whole rows: PolyNorm and top-k ReLU, x [T, F] -> y [T, F].
//
// Sums and thresholds are of the F columns here; with tensor parallelism the caller reduces them between the calls.
#pragma once

#include <cmath>
#include <cstdint>

#include "elementwise.h"
#include "storage.h"

namespace ling {

// sums [T, 3]: of x^2, x^4, x^6 over the whole width; dots [T, 3]: sums of weight dy N(x^k), k = 1, 2, 3.
struct PolyNormArgs {
  ElementwiseArgs base;  // scalars: a3, a2, a1, a0
  const float* sums = nullptr;
  const float* dots = nullptr;
  float* out_sums = nullptr;      // [T, 3]: the sums or the dots that are wanted
  float* out_dscalars = nullptr;  // [T, 4]: each row's part of the scalars' gradients
  float width = 0.0f, eps = 0.0f;
};

// 1 / sqrt(mean of (x^k)^2 + eps), k = 1, 2, 3
struct PolyNormScales {
  float r[3];
  LING_HD PolyNormScales(const PolyNormArgs& args, int64_t row) {
    for (int k = 0; k < 3; ++k) r[k] = 1.0f / sqrtf(args.sums[3 * row + k] / args.width + args.eps);
  }
};

// One row's cubic; used as a functor of forward_span.
struct PolyNormCubic {
  static constexpr bool gated = false;
  float c3, c2, c1, c0;
  LING_HD PolyNormCubic(const PolyNormArgs& args, int64_t row) {
    const PolyNormScales scales(args, row);
    c3 = args.base.scalars[0] * scales.r[2];
    c2 = args.base.scalars[1] * scales.r[1];
    c1 = args.base.scalars[2] * scales.r[0];
    c0 = args.base.scalars[3];
  }
  LING_HD float forward(float x) const { return ((c3 * x + c2) * x + c1) * x + c0; }
};

// dx = sum over k of a_k k x^(k-1) r_k (G - N(x^k) mean(G N(x^k))), G = weight dy; as a functor of backward_span.
struct PolyNormSlope {
  static constexpr bool gated = false;
  float c[3], d[3];
  LING_HD PolyNormSlope(const PolyNormArgs& args, int64_t row) {
    const PolyNormScales scales(args, row);
    for (int k = 0; k < 3; ++k) {
      c[k] = static_cast<float>(k + 1) * args.base.scalars[2 - k] * scales.r[k];
      d[k] = args.dots[3 * row + k] / args.width * scales.r[k];
    }
  }
  LING_HD float backward(float x, float grad, float& dx, float*) const {
    const float square = x * x;
    dx = c[0] * (grad - x * d[0]) + c[1] * x * (grad - square * d[1]) + c[2] * square * (grad - square * x * d[2]);
    return 0.0f;
  }
};

// A lane's part of the sums of x^2, x^4, x^6 of a row.
template <class T>
LING_HD void add_powers(const ElementwiseArgs& args, int64_t row, int lane, float* sums) {
  using Raw = typename T::Raw;
  const Raw* x = static_cast<const Raw*>(args.x) + row * args.x_stride;
  const Columns columns = columns_of<T>(args, 0, lane);
  for (int64_t c = columns.first; c < columns.last; c += columns.step) {
    float v[kVector<T>];
    load<T>(x + c, args.vector, count_at<T>(args, c), 0.0f, v);
    LING_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      const float square = v[i] * v[i], fourth = square * square;
      sums[0] += square;
      sums[1] += fourth;
      sums[2] += fourth * square;
    }
  }
}

// A lane's part of the sums of dy x, dy x^2, dy x^3 and dy of a row.
template <class T>
LING_HD void add_dots(const ElementwiseArgs& args, int64_t row, int lane, float* sums) {
  using Raw = typename T::Raw;
  const Raw* x = static_cast<const Raw*>(args.x) + row * args.x_stride;
  const Raw* dy = static_cast<const Raw*>(args.dy) + row * args.dy_stride;
  const Columns columns = columns_of<T>(args, 0, lane);
  for (int64_t c = columns.first; c < columns.last; c += columns.step) {
    const int count = count_at<T>(args, c);
    float v[kVector<T>], grad[kVector<T>];
    load<T>(x + c, args.vector, count, 0.0f, v);
    load<T>(dy + c, args.vector, count, 0.0f, grad);
    LING_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      const float first = grad[i] * v[i], second = first * v[i];
      sums[0] += first;
      sums[1] += second;
      sums[2] += second * v[i];
      sums[3] += grad[i];
    }
  }
}

// What a row's sums (add_dots, over all lanes) give: its dots, its parts of the scalars' gradients, d(weight).
LING_HD void finish_dots(const PolyNormArgs& args, int64_t row, const float* sums) {
  const PolyNormScales scales(args, row);
  const float weight = args.base.weight.load(row);
  float dweight = args.base.scalars[3] * sums[3];
  args.out_dscalars[4 * row + 3] = weight * sums[3];
  for (int k = 0; k < 3; ++k) {
    const float dot = sums[k] * scales.r[k];
    args.out_sums[3 * row + k] = weight * dot;
    args.out_dscalars[4 * row + 2 - k] = weight * dot;
    dweight += args.base.scalars[2 - k] * dot;
  }
  args.base.dweight.store(row, dweight);
}

// ---- Top-k ReLU. ----

struct TopKArgs {
  ElementwiseArgs base;
  float* threshold = nullptr;  // [T]
  int32_t* ties = nullptr;     // [T]
  int64_t k = 0;
};

// Order of the numbers as unsigned integers: what is not positive 0, NaN above infinity.
template <class T>
struct TopKKey {
  static constexpr int kDigits = sizeof(typename T::Raw);  // of 8 bits

  LING_HD static uint32_t key(typename T::Raw raw) {
    const float x = T::widen(raw);
    if (x > 0.0f) return bits(raw);
    return x <= 0.0f ? 0u : (kDigits == 4 ? 0x7fffffffu : 0x7fffu);
  }
  LING_HD static float value(uint32_t key) {
    if constexpr (kDigits == 4)
      return float_of(key);
    else
      return T::widen(static_cast<uint16_t>(key));
  }

 private:
  LING_HD static uint32_t bits(typename T::Raw raw) {
    if constexpr (kDigits == 4)
      return bits_of(raw);
    else
      return raw;
  }
};

// 1 where x is kept: above the threshold, NaN, or equal to it and among the first `ties` of those. seen: how many equal
// ones came before; counted on.
LING_HD float kept(float x, float threshold, int ties, int& seen) {
  if (x == threshold) return seen++ < ties ? 1.0f : 0.0f;
  return x <= threshold ? 0.0f : 1.0f;
}

}  // namespace ling
