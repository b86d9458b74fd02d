// y = silu(p) · p' and [p | p'] = x wᵀ of many bfloat16 rows on sm_90, in one pass.
#pragma once

#include "core/context.h"

namespace deltafox::cuda {

// y [T, N] and gate_up = [p | p'] [T, 2N], either of them or no data; x [T, K] and w [2N, K]; all
// BF16. False where the card, the dtypes or alignments do not fit. A row's result does not depend
// on T. With `early` w is read before the kernels ahead have ended: it must not be theirs.
bool glu_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& gate_up, const TensorView& y, bool early);

}  // namespace deltafox::cuda
