// The ways of a product y = x wᵀ; linear.cc chooses among them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/context.h"
#include "ops/linear.h"

namespace deltafox::cuda {

// A warp for each row of w and 16 rows of x: any shape, any of the dtypes. The way of float32 steps
// and of shapes that the others do not take.
void linear_plain(Context& ctx, const LinearArgs& args);

// y += bias
void add_bias(Context& ctx, const TensorView& y, const ConstTensorView& bias);

}  // namespace deltafox::cuda
