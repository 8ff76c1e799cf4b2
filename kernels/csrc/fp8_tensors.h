// The tensors of the fp8 operators, on any device.
#pragma once

#include "fp8_tile.h"
#include "tensors.h"

namespace ling {

struct Fp8Results {
  Tensor rows, row_scale_inv, columns, column_scale_inv;

  // of a result [T, width]
  Fp8Results(const Tensor& x, int64_t tokens, int64_t width)
      : rows(empty_at(x, shape_with(x, width), ScalarType::Float8_e4m3fn)),
        row_scale_inv(empty_at(x, {ceil_div(width, kTile), multiple_of_4(tokens)}, ScalarType::Float)),
        columns(empty_at(x, {width, tokens}, ScalarType::Float8_e4m3fn)),
        column_scale_inv(empty_at(x, {ceil_div(tokens, kTile), multiple_of_4(width)}, ScalarType::Float)) {}

  void fill(Fp8Args& args) const {
    args.rows = static_cast<uint8_t*>(rows.data_ptr());
    args.columns = static_cast<uint8_t*>(columns.data_ptr());
    args.row_scales = static_cast<float*>(row_scale_inv.data_ptr());
    args.column_scales = static_cast<float*>(column_scale_inv.data_ptr());
  }
};

inline Fp8Args fp8_args(const ElementwiseCall& call, const Fp8Results& results, bool backward, bool power_of_2) {
  Fp8Args args;
  args.base = call.args;
  args.out_width = backward ? call.in.columns : call.args.width;
  args.power_of_2 = power_of_2;
  args.paired = backward && call.info.gated && call.args.width % kTile == 0;
  results.fill(args);
  return args;
}

}  // namespace ling
