// Element-wise activations over rows: x [T, 2F] (gate, then up) or [T, F] -> y [T, F], and backward.
//
// A warp takes one span of a row at a time, each lane sixteen bytes of every operand, and goes on to the next span in a
// stride of the whole grid, whose size follows the device. A span is a whole row where a row is reduced (the router
// weight's gradient), else as much of it as keeps all warps busy. Learned scalars' gradients: a tile of rows per block,
// one partial sum per tile, summed up in order by a second kernel, so that they depend on neither grid nor timing.
//
// Functions marked LING_HD do all of the indexing; tests/kernels/test_kernel_indexing.py runs them on the host.
#pragma once

#include <cstdint>

#include "functors.h"
#include "storage.h"

namespace ling {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kRowsPerTile = 4 * kWarps;  // of the scalars' partial sums
constexpr int kMaxParams = 4, kMaxScalars = 16;

// Widths and strides in elements. Rows of x and dy may be strided; y and dx are contiguous.
struct ElementwiseArgs {
  const void* x = nullptr;
  const void* dy = nullptr;
  void* out = nullptr;  // y, or dx
  int64_t x_stride = 0, dy_stride = 0;
  int64_t rows = 0;
  int64_t width = 0;      // F
  int64_t span = 0;       // columns of F that a warp takes at a time: a multiple of kLanes * kVector<T>
  int64_t spans = 1;      // per row
  bool vector = false;    // all rows 16-byte aligned and of whole vectors
  PerRow weight, dweight;
  const float* scalars = nullptr;
  float* dscalars = nullptr;  // [tiles, max_scalars], or null
  int num_scalars = 0;
  float params[kMaxParams] = {};
};

// The columns [first, last) that one lane visits, in steps of `step`.
struct Columns {
  int64_t first, last, step;
};

template <class T>
LING_HD Columns columns_of(const ElementwiseArgs& args, int64_t span, int lane) {
  const int64_t begin = span * args.span, end = begin + args.span;
  return {begin + lane * kVector<T>, end < args.width ? end : args.width, kLanes * kVector<T>};
}

// Numbers that a lane has at a column.
template <class T>
LING_HD int count_at(const ElementwiseArgs& args, int64_t column) {
  const int64_t left = args.width - column;
  return left < kVector<T> ? static_cast<int>(left) : kVector<T>;
}

template <class F, class T>
LING_HD void forward_span(const ElementwiseArgs& args, const F& f, int64_t row, int64_t span, int lane) {
  using Raw = typename T::Raw;
  const Raw* x = static_cast<const Raw*>(args.x) + row * args.x_stride;
  Raw* y = static_cast<Raw*>(args.out) + row * args.width;
  const float weight = args.weight.load(row);
  const Columns columns = columns_of<T>(args, span, lane);
  for (int64_t c = columns.first; c < columns.last; c += columns.step) {
    const int count = count_at<T>(args, c);
    float first[kVector<T>], second[kVector<T>];
    load<T>(x + c, args.vector, count, 0.0f, first);
    if constexpr (F::gated) load<T>(x + args.width + c, args.vector, count, 0.0f, second);
    LING_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      if constexpr (F::gated)
        first[i] = f.forward(first[i], second[i]) * weight;
      else
        first[i] = f.forward(first[i]) * weight;
    }
    store<T>(first, args.vector, count, y + c);
  }
}

// Returns this lane's part of the row's sum of phi * dy, and adds its part of the scalars' gradients to dscalars.
template <class F, class T>
LING_HD float backward_span(const ElementwiseArgs& args, const F& f, int64_t row, int64_t span, int lane,
                            float* dscalars) {
  using Raw = typename T::Raw;
  constexpr int kHalves = F::gated ? 2 : 1;
  const Raw* x = static_cast<const Raw*>(args.x) + row * args.x_stride;
  const Raw* dy = static_cast<const Raw*>(args.dy) + row * args.dy_stride;
  Raw* dx = static_cast<Raw*>(args.out) + row * args.width * kHalves;
  const float weight = args.weight.load(row);
  float dot = 0.0f;
  const Columns columns = columns_of<T>(args, span, lane);
  for (int64_t c = columns.first; c < columns.last; c += columns.step) {
    const int count = count_at<T>(args, c);
    float first[kVector<T>], second[kVector<T>], upstream[kVector<T>];
    load<T>(x + c, args.vector, count, 0.0f, first);
    if constexpr (F::gated) load<T>(x + args.width + c, args.vector, count, 0.0f, second);
    load<T>(dy + c, args.vector, count, 0.0f, upstream);
    LING_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      const float g = first[i], weighted = upstream[i] * weight;
      float phi;
      if constexpr (F::gated)
        phi = f.backward(g, second[i], weighted, first[i], second[i], dscalars);
      else
        phi = f.backward(g, weighted, first[i], dscalars);
      // not where a lane has run out: phi(0) * 0 is not 0 for every phi
      if (args.vector || i < count) dot += phi * upstream[i];
    }
    store<T>(first, args.vector, count, dx + c);
    if constexpr (F::gated) store<T>(second, args.vector, count, dx + args.width + c);
  }
  return dot;
}

// The i-th span of all rows. Rows are split only where they are few, so that 32 bits hold the number of a span.
struct Item {
  int64_t row, span;
};
LING_HD Item item_of(const ElementwiseArgs& args, int64_t i) {
  if (args.spans == 1) return {i, 0};
  const unsigned spans = static_cast<unsigned>(args.spans), item = static_cast<unsigned>(i), row = item / spans;
  return {row, item - row * spans};
}

// The row that a warp takes in its turn-th turn (0 .. kRowsPerTile / kWarps - 1) at a tile.
LING_HD int64_t row_of_tile(int64_t tile, int warp, int turn) { return tile * kRowsPerTile + turn * kWarps + warp; }

LING_HD int64_t tiles_of(int64_t rows) { return (rows + kRowsPerTile - 1) / kRowsPerTile; }

// Columns per span: whole rows if a row is reduced, else enough spans that `warps` warps have two each, if there are.
inline void choose_spans(ElementwiseArgs& args, int vector, int64_t warps, bool whole_rows) {
  const int64_t step = int64_t{kLanes} * vector;
  const int64_t steps = (args.width + step - 1) / step;
  int64_t spans = whole_rows || args.rows == 0 ? 1 : (2 * warps + args.rows - 1) / args.rows;
  if (spans > steps) spans = steps;
  if (spans < 1) spans = 1;
  args.span = (steps + spans - 1) / spans * step;
  args.spans = (args.width + args.span - 1) / args.span;
}

}  // namespace ling
