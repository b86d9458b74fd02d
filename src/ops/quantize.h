// From weights to the packed forms of core/quantized.h and back.
//
// kQ8: scale = max|w| / 127 of a block of a row, q = w / scale rounded to the nearest even.
// kQ4: scale, factors and integers are searched for the least squared error of a block of a row.
// Every instruction set packs the same bytes.
#pragma once

#include <cstdint>

#include "core/context.h"

namespace deltafox {

struct QuantizeArgs {
  ConstTensorView w;  // [N, K] F32, BF16 or F16, finite
  TensorView packed;  // [N, K] kQ8 or kQ4
};

namespace ops {
void quantize(Context& ctx, const QuantizeArgs& args);
// Puts a packed matrix that was copied to a GPU into the order that its kernels read, in place.
void arrange_packed(Context& ctx, const TensorView& packed);
}  // namespace ops
namespace cpu {
void quantize(Context& ctx, const QuantizeArgs& args);
// Row `row` of a packed matrix, widened to y [K].
void dequantize_row(const ConstTensorView& packed, std::int64_t row, float* y);
}  // namespace cpu
namespace cuda {
void arrange_packed(Context& ctx, const TensorView& packed);
}
}  // namespace deltafox
