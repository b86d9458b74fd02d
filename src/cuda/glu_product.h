// y = silu(p) · p' and [p | p'] = x wᵀ of many bfloat16 rows on sm_90, in one pass; and the
// gradients of p and p', given that of what y is multiplied with.
#pragma once

#include "core/context.h"

namespace deltafox::cuda {

// y [T, N] and gate_up = [p | p'] [T, 2N], either of them or no data; x [T, K] and w [2N, K]; all
// BF16. False where the card, the dtypes or alignments do not
// fit. A row's result does not depend on T.
bool glu_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& gate_up, const TensorView& y);

// dgate_up [T, 2N] = of gate_up [T, 2N], which it may be, given dy [T, K], of z = y wᵀ with w [K,
// N]; and y [T, N] once more. The same conditions.
bool glu_product_backward(Context& ctx, const ConstTensorView& dy, const ConstTensorView& w,
                          const ConstTensorView& gate_up, const TensorView& dgate_up,
                          const TensorView& y);

}  // namespace deltafox::cuda
