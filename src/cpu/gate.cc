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

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(gate_target);
void gate(Context& ctx, const GateArgs& args) {
  HWY_DYNAMIC_DISPATCH(gate_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
