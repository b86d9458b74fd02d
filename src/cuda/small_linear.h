// linear of a few rows: the frame of step_linear without its norm and with one part.
#pragma once

#include "core/context.h"
#include "ops/linear.h"
#include "ops/step.h"

namespace deltafox::cuda {

constexpr std::int64_t kSmallLinearRows = kStepLinearRows;

inline bool fits_small_linear(const LinearArgs& args) {
  return args.x.shape[0] <= kSmallLinearRows && args.x.shape[1] % 256 == 0 &&
         args.w.dtype == DType::kBF16 && args.x.dtype == DType::kBF16 &&
         (args.y.dtype == DType::kF32 || !args.accumulate);
}

inline void small_linear(Context& ctx, const LinearArgs& args) {
  const StepLinearPart part{
      .w = args.w,
      .y = args.y,
      .epilogue = args.accumulate ? StepEpilogue::kAdd : StepEpilogue::kStore};
  step_linear(ctx, {.x = args.x, .parts = {&part, 1}});
}

}  // namespace deltafox::cuda
