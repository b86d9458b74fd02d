// y += x wᵀ of many bfloat16 rows on sm_90, where memory itself adds.
#pragma once

#include "core/context.h"

namespace deltafox::cuda {

// y [T, N] F32, x [T, K] and w [N, K] BF16. False where the card, the dtypes or alignments do not
// fit. A row's result depends on `bucket`, which T is in, and not on T. With `early` w is read
// before the kernels ahead have ended: it must not be theirs.
bool sum_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& y, std::int64_t bucket, bool early);

}  // namespace deltafox::cuda
