#include "ops/rms_norm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rms_norm.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// y = x · scale [· w] [· act(gate)]
HWY_INLINE void scale_row(const float* x, float scale, const float* w, const float* gate,
                          Activation activation, float* y, std::int64_t width) {
  const VF32 scales = hn::Set(kF32, scale);
  for_row(
      width,
      [&](std::int64_t i) HWY_ATTR {
        VF32 v = hn::Mul(load(x + i), scales);
        if (w != nullptr) v = hn::Mul(v, load(w + i));
        if (gate != nullptr) v = hn::Mul(v, activate(activation, load(gate + i)));
        store(v, y + i);
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        VF32 v = hn::Mul(load_first(x + i, n), scales);
        if (w != nullptr) v = hn::Mul(v, load_first(w + i, n));
        if (gate != nullptr) v = hn::Mul(v, activate(activation, load_first(gate + i, n)));
        store_first(v, y + i, n);
      });
}

HWY_INLINE void norm_row(const RmsNormArgs& args, std::int64_t r, std::int64_t width) {
  const float* x = args.x.f32() + r * width;
  float* y = args.y.f32() + r * width;
  const float* w = nullptr;
  if (args.w.data != nullptr) w = args.w.f32() + r % (args.w.shape[0] / width) * width;
  const float* gate = args.gate.data != nullptr ? args.gate.f32() + r * width : nullptr;
  if (args.gate_first) {
    scale_row(x, 1, nullptr, gate, args.gate_activation, y, width);
    x = y;
    gate = nullptr;
  }
  const float mean = sum_of_squares(x, width) / static_cast<float>(width);
  scale_row(x, 1 / std::sqrt(mean + args.eps), w, gate, args.gate_activation, y, width);
}

void rms_norm_target(Context& ctx, const RmsNormArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t width = args.x.shape[1];
  const std::int64_t rows_per_task = std::max<std::int64_t>(1, 4096 / width);
  ctx.threads().parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (std::int64_t r = task * rows_per_task; r < end; ++r) norm_row(args, r, width);
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(rms_norm_target);
void rms_norm(Context& ctx, const RmsNormArgs& args) {
  HWY_DYNAMIC_DISPATCH(rms_norm_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
