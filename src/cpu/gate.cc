#include "ops/gate.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gate.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

void gate_target(Context& ctx, const GateArgs& args) {
  constexpr std::int64_t kBlock = 16 * 1024;
  const std::int64_t size = args.x.shape.size();
  ctx.threads().parallel_for((size + kBlock - 1) / kBlock, [&](std::int64_t task) {
    float* x = args.x.f32() + task * kBlock;
    const float* gate = args.gate.f32() + task * kBlock;
    for_row(
        std::min(kBlock, size - task * kBlock),
        [&](std::int64_t i) HWY_ATTR {
          store(hn::Mul(load(x + i), activate(args.activation, load(gate + i))), x + i);
        },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          const VF32 factor = activate(args.activation, load_first(gate + i, n));
          store_first(hn::Mul(load_first(x + i, n), factor), x + i, n);
        });
  });
}

void gate_backward_target(Context& ctx, const GateBackwardArgs& args) {
  constexpr std::int64_t kBlock = 16 * 1024;
  const std::int64_t total = args.x.shape.size();
  ctx.threads().parallel_for((total + kBlock - 1) / kBlock, [&](std::int64_t task) {
    const std::int64_t begin = task * kBlock;
    const std::int64_t size = std::min(kBlock, total - begin);
    const float* gate = args.gate.f32() + begin;
    const float* x = args.x.f32() + begin;
    const float* dy = args.dy.f32() + begin;
    float* dx = args.dx.f32() + begin;
    float* dgate = args.dgate.f32() + begin;
    for_vectors(size, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 logits = load_vector(gate + i);
      const VF32 d = load_vector(dy + i);
      const VF32 slope = activation_slope(args.activation, logits);
      store_vector(hn::Mul(hn::Mul(d, load_vector(x + i)), slope), dgate + i);
      store_vector(hn::Mul(d, activate(args.activation, logits)), dx + i);
    });
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(gate_target);
HWY_EXPORT(gate_backward_target);
void gate(Context& ctx, const GateArgs& args) {
  HWY_DYNAMIC_DISPATCH(gate_target)(ctx, args);
}
void gate_backward(Context& ctx, const GateBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(gate_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
