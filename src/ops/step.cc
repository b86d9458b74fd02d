#include "ops/step.h"

#include <algorithm>

#include "core/quantized.h"
#include "ops/check.h"

namespace deltafox::ops {
namespace {

void require_gpu(const Context& ctx, std::string_view op) {
  if (ctx.device() == Device::kCpu) fail("{}: runs on a GPU only", op);
}

}  // namespace

void step_linear(Context& ctx, const StepLinearArgs& args) {
  require_gpu(ctx, "step_linear");
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t k = args.x.shape[1];
  if (rows > kStepLinearRows || k % 256 != 0 || args.parts.size() > kStepLinearParts) {
    fail("step_linear: {} rows of {} and {} parts do not fit", rows, k, args.parts.size());
  }
  for (const StepLinearPart& part : args.parts) {
    const std::int64_t n = outputs_of(part);
    const bool glu = part.epilogue == StepEpilogue::kGlu;
    check("step_linear", "w", part.w, {glu ? 2 * n : n, k},
          is_packed(part.w.dtype) ? part.w.dtype : DType::kBF16);
    if (glu && is_packed(part.w.dtype) && n % kPanelRows != 0) {
      fail("step_linear: {} rows of a gate do not end a panel", n);
    }
    check_activation(ctx, "step_linear", "y", part.y, {rows, std::max(n, part.y.shape[1])});
    if (part.epilogue == StepEpilogue::kConvSilu) {
      check("step_linear", "conv", part.conv, {n, kStepConvWidth});
      if (part.conv_bias.data != nullptr) {
        check("step_linear", "conv_bias", part.conv_bias, {n});
      }
    }
  }
  cuda::step_linear(ctx, args);
}

void delta_rule_step(Context& ctx, const DeltaRuleStepArgs& args) {
  require_gpu(ctx, "delta_rule_step");
  const Shape heads{args.q.shape[0], args.q.shape[1], kStepHeadDim};
  check("delta_rule_step", "q", args.q, heads);
  check("delta_rule_step", "k", args.k, heads);
  check("delta_rule_step", "v", args.v, heads);
  check("delta_rule_step", "beta", args.beta, {heads[0], heads[1]});
  check("delta_rule_step", "o", args.o, heads);
  cuda::delta_rule_step(ctx, args);
}

}  // namespace deltafox::ops
