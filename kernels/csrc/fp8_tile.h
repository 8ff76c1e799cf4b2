// An activation, or its backward, whose result is quantised to e4m3 in the same pass: by rows for the GEMM that comes
// next, and transposed for the weight gradient. Layout of Transformer Engine's Float8BlockwiseQTensor, 1D blocks:
//
//   rows     [T, C] e4m3   row_scale_inv     [ceil(C/128), T up to a multiple of 4]   of 1 x 128 blocks
//   columns  [C, T] e4m3   column_scale_inv  [ceil(T/128), C up to a multiple of 4]   of 128 x 1 blocks
//
// C is F forward, and the width of x backward. Scales in the padding are 1. The result is first rounded to x's type, so
// that the numbers are those of the unfused operators.
//
// A block of 256 threads makes a tile of 128 x 128; where the gate's and the up projection's gradient have their blocks
// at the same places (F a multiple of 128), one tile of each from one reading of x and dy. The phases between two
// __syncthreads() are functions of (block, thread, shared memory): the CUDA kernel runs them on threads, cpu_fp8.cpp in
// a loop, with the same index arithmetic. Shared memory holds the tile by 16-byte chunks, chunk c of row r at place
// c ^ (r / 16 % 8): writing it and reading it along columns then have no bank conflicts.
#pragma once

#include <cstdint>

#include "elementwise.h"
#include "fp8_format.h"
#include "functors.h"
#include "storage.h"

namespace ling {

constexpr int kTile = 128;
constexpr int kRun = 16;  // e4m3 numbers in sixteen bytes

LING_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LING_HD int64_t multiple_of_4(int64_t n) { return (n + 3) / 4 * 4; }

struct Fp8Args {
  ElementwiseArgs base;  // dscalars: [blocks, max_scalars] or null; out is not used
  uint8_t* rows = nullptr;
  uint8_t* columns = nullptr;
  float* row_scales = nullptr;
  float* column_scales = nullptr;
  float* dots = nullptr;  // [column tiles, T], each tile's part of the router weight's gradient, or null
  int64_t out_width = 0;  // C
  bool power_of_2 = true;
  bool paired = false;  // a block makes two tiles: of the gate's gradient and, F further right, of the up projection's

  LING_HD int tiles() const { return paired ? 2 : 1; }
  LING_HD int64_t column_tiles() const { return ceil_div(paired ? base.width : out_width, kTile); }
  LING_HD int64_t row_tiles() const { return ceil_div(base.rows, kTile); }
  LING_HD int64_t blocks() const { return row_tiles() * column_tiles(); }
};

// Shared memory of a block, and where each part begins.
template <class T>
struct Fp8Shared {
  static constexpr int kThreadsPerRow = kTile / kVector<T>;
  static constexpr int kWordsPerRow = kTile / T::kPerWord;
  static constexpr int kTileWords = kTile * kWordsPerRow;
  static constexpr int kDotPitch = kThreadsPerRow + 1;

  uint32_t* tiles;
  uint32_t* maxima;  // [tiles][2][128]: of rows, of columns; scales afterwards. Bits of floats that are not negative
  float* dots;       // [128][kDotPitch]
  float* scalars;    // [max_scalars][256]

  LING_HD Fp8Shared(void* memory, const Fp8Args& args) {
    tiles = static_cast<uint32_t*>(memory);
    maxima = tiles + args.tiles() * kTileWords;
    dots = reinterpret_cast<float*>(maxima + args.tiles() * 2 * kTile);
    scalars = dots + (args.dots != nullptr ? kTile * kDotPitch : 0);
  }
  static int64_t bytes(int tiles, bool dots, int scalars) {
    return 4 * (int64_t{tiles} * (kTileWords + 2 * kTile) + (dots ? kTile * kDotPitch : 0) + scalars * kThreads);
  }
  static int64_t bytes(const Fp8Args& args, int max_scalars) {
    return bytes(args.tiles(), args.dots != nullptr, args.base.dscalars != nullptr ? max_scalars : 0);
  }
  LING_HD uint32_t* chunk(int tile, int row, int index) const {
    return tiles + tile * kTileWords + row * kWordsPerRow + 4 * (index ^ (row >> 4 & 7));
  }
};

// The largest of a row's numbers over the row's threads, neighbours in a warp; x: the largest of thread `column`.
template <int kThreadsPerRow>
LING_HD void note_row_maximum(uint32_t* maximum, int column, float x) {
#if defined(__CUDA_ARCH__)
  LING_UNROLL
  for (int distance = kThreadsPerRow / 2; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  if (column == 0) *maximum = bits_of(x);
#else
  (void)column;
  if (bits_of(x) > *maximum) *maximum = bits_of(x);
#endif
}
LING_HD void note_column_maximum(uint32_t* maximum, float x) {
#if defined(__CUDA_ARCH__)
  atomicMax(maximum, bits_of(x));
#else
  if (bits_of(x) > *maximum) *maximum = bits_of(x);
#endif
}

template <class F, class T, bool backward>
struct Fp8Tile {
  using Raw = typename T::Raw;
  using Shared = Fp8Shared<T>;
  static constexpr int kThreadsPerRow = Shared::kThreadsPerRow;
  static constexpr int kRowsPerPass = kThreads / kThreadsPerRow;
  static constexpr bool kTwoSided = backward && F::gated;  // the result has a gate's and an up projection's half
  static constexpr int kScalars = backward ? F::max_scalars : 0;
  static_assert(kThreads == 2 * kTile, "phase 2 has a thread per row and per column");

  const Fp8Args& args;
  const Shared shared;
  const int64_t row_tile, column_tile;
  const int thread;

  LING_HD Fp8Tile(const Fp8Args& args_, void* memory, int64_t block, int thread_)
      : args(args_),
        shared(memory, args_),
        row_tile(block / args_.column_tiles()),
        column_tile(block % args_.column_tiles()),
        thread(thread_) {}

  LING_HD int64_t first_row() const { return row_tile * kTile; }
  // of the result
  LING_HD int64_t first_column(int tile) const { return column_tile * kTile + tile * args.base.width; }

  // Phase 0: no maxima yet.
  LING_HD void clear() const {
    for (int i = thread; i < args.tiles() * 2 * kTile; i += kThreads) shared.maxima[i] = 0;
  }

  // Where the result's column j comes from: x's column, and whether it is of the up half. Only where halves share a
  // tile (kTwoSided, not paired) is a column of the result not also one of F.
  LING_HD int64_t source(int64_t j, bool& up) const {
    up = kTwoSided && !args.paired && j >= args.base.width;
    return up ? j - args.base.width : j;
  }

  // Phase 1: the activation into the tiles, and the maxima of its rows and columns.
  LING_HD void compute(const F& f) const {
    const ElementwiseArgs& base = args.base;
    const int tx = thread % kThreadsPerRow, ty = thread / kThreadsPerRow;
    const int64_t column = column_tile * kTile + tx * kVector<T>;
    const bool selects = kTwoSided && !args.paired;
    const int64_t left = (selects ? args.out_width : base.width) - column;
    const int columns = left < 0 ? 0 : (left < kVector<T> ? static_cast<int>(left) : kVector<T>);
    float column_max[kTwoSided ? 2 : 1][kVector<T>] = {};
    float dscalars[kScalars > 0 ? kScalars : 1] = {};
    for (int r = ty; r < kTile; r += kRowsPerPass) {
      const int64_t row = first_row() + r;
      const int count = row < base.rows ? columns : 0;
      float first[kVector<T>] = {}, second[kVector<T>] = {}, upstream[kVector<T>] = {};
      float dot = 0.0f, weight = 1.0f;
      if (count > 0) {
        weight = base.weight.load(row);
        read(row, column, count, selects, first, second, upstream);
      }
      LING_UNROLL
      for (int i = 0; i < kVector<T>; ++i)
        apply(f, i < count, column + i, weight, first[i], second[i], upstream[i], dot, dscalars);
      put<0>(r, tx, first, column_max[0]);
      if constexpr (kTwoSided)
        if (args.paired) put<1>(r, tx, second, column_max[1]);
      if (backward && args.dots != nullptr) shared.dots[r * Shared::kDotPitch + tx] = dot;
    }
    for (int tile = 0; tile < (kTwoSided ? args.tiles() : 1); ++tile)
      LING_UNROLL
      for (int i = 0; i < kVector<T>; ++i)
        note_column_maximum(shared.maxima + (2 * tile + 1) * kTile + tx * kVector<T> + i,
                            kTwoSided && tile == 1 ? column_max[kTwoSided ? 1 : 0][i] : column_max[0][i]);
    if (kScalars > 0 && base.dscalars != nullptr)
      LING_UNROLL
      for (int i = 0; i < kScalars; ++i) shared.scalars[i * kThreads + thread] = dscalars[i];
  }

  // Phase 2: scales from maxima; parts of the router weight's gradient.
  LING_HD void scale() const {
    const ElementwiseArgs& base = args.base;
    const bool is_row = thread < kTile;
    const int i = thread % kTile;
    for (int tile = 0; tile < args.tiles(); ++tile) {
      uint32_t* place = shared.maxima + (2 * tile + (is_row ? 0 : 1)) * kTile + i;
      const float amax = rounded<T>(float_of(*place));
      const float scale = scale_of_amax(amax, T::kLargest, args.power_of_2);
      *place = bits_of(scale);
      const float inverse = exact_quotient(1.0f, scale);
      const int64_t row = first_row() + i, column = first_column(tile) + i;
      const int64_t padded_rows = multiple_of_4(base.rows), padded_columns = multiple_of_4(args.out_width);
      if (is_row && row < padded_rows) args.row_scales[first_column(tile) / kTile * padded_rows + row] = inverse;
      if (!is_row && column < padded_columns) args.column_scales[row_tile * padded_columns + column] = inverse;
    }
    if (backward && args.dots != nullptr && is_row && first_row() + i < base.rows) {
      float sum = 0.0f;
      for (int k = 0; k < kThreadsPerRow; ++k) sum += shared.dots[i * Shared::kDotPitch + k];
      args.dots[column_tile * base.rows + first_row() + i] = sum;
    }
  }

  // Phase 3: both results.
  LING_HD void quantize() const {
    for (int tile = 0; tile < args.tiles(); ++tile) {
      for (int unit = thread; unit < kTile * kTile / kRun; unit += kThreads)
        quantize_run_of_row(tile, unit / (kTile / kRun), unit % (kTile / kRun));
      for (int unit = thread; unit < Shared::kWordsPerRow * (kTile / kRun); unit += kThreads)
        quantize_run_of_columns(tile, unit / (kTile / kRun), unit % (kTile / kRun));
    }
  }

  // Phases 4 (half = 128, 64, .. 1) and 5: the block's sums of the scalars' gradients.
  LING_HD void fold_scalars(int half) const {
    if (thread < half)
      LING_UNROLL
      for (int i = 0; i < kScalars; ++i)
        shared.scalars[i * kThreads + thread] += shared.scalars[i * kThreads + thread + half];
  }
  LING_HD void store_scalars() const {
    const int64_t block = row_tile * args.column_tiles() + column_tile;
    if (thread < kScalars) args.base.dscalars[block * kScalars + thread] = shared.scalars[thread * kThreads];
  }

 private:
  LING_HD void read(int64_t row, int64_t column, int count, bool selects, float* first, float* second,
                    float* upstream) const {
    const ElementwiseArgs& base = args.base;
    const Raw* x = static_cast<const Raw*>(base.x) + row * base.x_stride;
    const Raw* dy = static_cast<const Raw*>(base.dy) + row * base.dy_stride;
    if (!selects) {
      load<T>(x + column, base.vector, count, 0.0f, first);
      if constexpr (F::gated) load<T>(x + base.width + column, base.vector, count, 0.0f, second);
      if constexpr (backward) load<T>(dy + column, base.vector, count, 0.0f, upstream);
      return;
    }
    if constexpr (kTwoSided) {
      LING_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        if (i >= count) continue;
        bool up;
        const int64_t j = source(column + i, up);
        first[i] = T::widen(x[j]);
        second[i] = T::widen(x[base.width + j]);
        upstream[i] = T::widen(dy[j]);
      }
    }
  }

  // One number: the results in the place of the operands, 0 where there is none (phi(0) need not be 0).
  LING_HD void apply(const F& f, bool there, int64_t column, float weight, float& first, float& second, float upstream,
                     float& dot, float* dscalars) const {
    if constexpr (!backward) {
      float y;
      if constexpr (F::gated)
        y = f.forward(first, second) * weight;
      else
        y = f.forward(first) * weight;
      first = there ? y : 0.0f;
    } else if constexpr (F::gated) {
      bool up;
      source(column, up);
      float dg, du;
      const float phi = f.backward(first, second, upstream * weight, dg, du, dscalars);
      first = there ? (up ? du : dg) : 0.0f;
      second = there ? du : 0.0f;
      dot += there && !up ? phi * upstream : 0.0f;
    } else {
      float dx;
      const float phi = f.backward(first, upstream * weight, dx, dscalars);
      first = there ? dx : 0.0f;
      dot += there ? phi * upstream : 0.0f;
    }
  }

  template <int tile>
  LING_HD void put(int r, int tx, const float* values, float* column_max) const {
    float row_max = 0.0f;
    LING_UNROLL
    for (int i = 0; i < kVector<T>; ++i) {
      const float size = magnitude(values[i]);
      row_max = max_number(size, row_max);
      column_max[i] = max_number(size, column_max[i]);
    }
    *reinterpret_cast<uint4*>(shared.chunk(tile, r, tx)) = pack<T>(values);
    note_row_maximum<kThreadsPerRow>(shared.maxima + 2 * tile * kTile + r, tx, row_max);
  }

  LING_HD static void store_run(uint8_t* to, bool vector, int64_t count, const float* values) {
    const uint4 packed{four_e4m3(values), four_e4m3(values + 4), four_e4m3(values + 8), four_e4m3(values + 12)};
    if (vector) return store_16_bytes(packed, to);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    LING_UNROLL
    for (int i = 0; i < kRun; ++i)
      if (i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
  }

  // Numbers 16 k .. 16 k + 15 of row r.
  LING_HD void quantize_run_of_row(int tile, int r, int k) const {
    constexpr int kChunks = kRun / kVector<T>;
    const int64_t row = first_row() + r, column = first_column(tile) + kRun * k;
    if (row >= args.base.rows || column >= args.out_width) return;
    const float scale = float_of(shared.maxima[2 * tile * kTile + r]);
    float values[kRun];
    LING_UNROLL
    for (int i = 0; i < kChunks; ++i)
      unpack<T>(*reinterpret_cast<const uint4*>(shared.chunk(tile, r, kChunks * k + i)), values + i * kVector<T>);
    LING_UNROLL
    for (int i = 0; i < kRun; ++i) values[i] *= scale;
    store_run(args.rows + row * args.out_width + column, args.out_width % kRun == 0, args.out_width - column, values);
  }

  // Numbers 16 k .. 16 k + 15 of the columns that share word `word` of a row.
  LING_HD void quantize_run_of_columns(int tile, int word, int k) const {
    float values[T::kPerWord][kRun];
    LING_UNROLL
    for (int i = 0; i < kRun; ++i) {
      float numbers[T::kPerWord];
      T::unpack(shared.chunk(tile, kRun * k + i, word / 4)[word % 4], numbers);
      LING_UNROLL
      for (int part = 0; part < T::kPerWord; ++part) values[part][i] = numbers[part];
    }
    const int64_t row = first_row() + kRun * k;
    if (row >= args.base.rows) return;
    LING_UNROLL
    for (int part = 0; part < T::kPerWord; ++part) {
      const int c = word * T::kPerWord + part;
      const int64_t column = first_column(tile) + c;
      if (column >= args.out_width) continue;
      const float scale = float_of(shared.maxima[(2 * tile + 1) * kTile + c]);
      LING_UNROLL
      for (int i = 0; i < kRun; ++i) values[part][i] *= scale;
      store_run(args.columns + column * args.base.rows + row, args.base.rows % kRun == 0, args.base.rows - row,
                values[part]);
    }
  }
};

}  // namespace ling
