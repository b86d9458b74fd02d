// step_linear's launch for packed weights; see step_packed.cu.
#pragma once

#include "core/context.h"

namespace deltafox::cuda {

namespace step {
struct Params;
}

void launch_packed_step(Context& ctx, const step::Params& p, DType form);

// Whether `rows` rows of x of K elements fit in a thread block's memory.
bool fits_packed_step(std::int64_t rows, std::int64_t k);

}  // namespace deltafox::cuda
