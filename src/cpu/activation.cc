#include "ops/activation.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/activation.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// Elements of a task.
constexpr std::int64_t kBlock = 16 * 1024;

void activation_target(Context& ctx, const ActivationArgs& args) {
  const std::int64_t size = args.x.shape.size();
  ctx.threads().parallel_for((size + kBlock - 1) / kBlock, [&](std::int64_t task) {
    float* x = args.x.f32() + task * kBlock;
    for_row(
        std::min(kBlock, size - task * kBlock),
        [&](std::int64_t i) HWY_ATTR { store(activate(args.activation, load(x + i)), x + i); },
        [&](std::int64_t i, std::int64_t n)
            HWY_ATTR { store_first(activate(args.activation, load_first(x + i, n)), x + i, n); });
  });
}

void glu_target(Context& ctx, const GluArgs& args) {
  const std::int64_t width = args.y.shape[1];
  ctx.threads().parallel_for(args.y.shape[0], [&](std::int64_t t) {
    const float* gate = args.gate_up.f32() + t * 2 * width;
    const float* up = gate + width;
    float* y = args.y.f32() + t * width;
    for_row(
        width,
        [&](std::int64_t i) HWY_ATTR {
          store(hn::Mul(activate(args.activation, load(gate + i)), load(up + i)), y + i);
        },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          const VF32 gated =
              hn::Mul(activate(args.activation, load_first(gate + i, n)), load_first(up + i, n));
          store_first(gated, y + i, n);
        });
  });
}

void forget_gate_target(Context& ctx, const ForgetGateArgs& args) {
  const std::int64_t size = args.x.shape.size();
  ctx.threads().parallel_for((size + kBlock - 1) / kBlock, [&](std::int64_t task) {
    float* x = args.x.f32() + task * kBlock;
    float* k = args.k.f32() + task * kBlock;
    for_row(
        std::min(kBlock, size - task * kBlock),
        [&](std::int64_t i) HWY_ATTR {
          const VF32 logits = load(x + i);
          store(sigmoid(logits), x + i);
          store(sigmoid(hn::Neg(logits)), k + i);
        },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          const VF32 logits = load_first(x + i, n);
          store_first(sigmoid(logits), x + i, n);
          store_first(sigmoid(hn::Neg(logits)), k + i, n);
        });
  });
}

HWY_INLINE void feature_row(const FeatureMapArgs& args, float* x, std::int64_t width) {
  VF32 sums = hn::Zero(kF32);
  VF32 squares = hn::Zero(kF32);
  const auto count = [&](VF32 v) HWY_ATTR {
    sums = hn::Add(sums, v);
    squares = hn::MulAdd(v, v, squares);
  };
  for_row(
      width,
      [&](std::int64_t i) HWY_ATTR {
        const VF32 v = activate(args.activation, load(x + i));
        count(v);
        store(v, x + i);
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        // act(0) need not be 0: mask what lies beyond the end.
        const auto inside = hn::FirstN(kF32, static_cast<std::size_t>(n));
        const VF32 v = hn::IfThenElseZero(inside, activate(args.activation, load_first(x + i, n)));
        count(v);
        store_first(v, x + i, n);
      });
  if (args.norm == FeatureNorm::kNone) return;
  const float scale =
      args.norm == FeatureNorm::kL2 ? 1 / std::sqrt(sum_of(squares) + 1e-6f) : 1 / sum_of(sums);
  const VF32 scales = hn::Set(kF32, scale);
  for_row(
      width, [&](std::int64_t i) HWY_ATTR { store(hn::Mul(load(x + i), scales), x + i); },
      [&](std::int64_t i, std::int64_t n)
          HWY_ATTR { store_first(hn::Mul(load_first(x + i, n), scales), x + i, n); });
}

void feature_map_target(Context& ctx, const FeatureMapArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  const std::int64_t width = args.x.shape[2];
  ctx.threads().parallel_for(args.x.shape[0], [&](std::int64_t t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      feature_row(args, args.x.f32() + (t * heads + h) * width, width);
    }
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(activation_target);
HWY_EXPORT(glu_target);
HWY_EXPORT(forget_gate_target);
HWY_EXPORT(feature_map_target);
void activation(Context& ctx, const ActivationArgs& args) {
  HWY_DYNAMIC_DISPATCH(activation_target)(ctx, args);
}
void glu(Context& ctx, const GluArgs& args) {
  HWY_DYNAMIC_DISPATCH(glu_target)(ctx, args);
}
void forget_gate(Context& ctx, const ForgetGateArgs& args) {
  HWY_DYNAMIC_DISPATCH(forget_gate_target)(ctx, args);
}
void feature_map(Context& ctx, const FeatureMapArgs& args) {
  HWY_DYNAMIC_DISPATCH(feature_map_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
