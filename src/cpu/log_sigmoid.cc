#include "ops/log_sigmoid.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/log_sigmoid.cc"
#include <hwy/foreach_target.h>

#include "cpu/row_sums-inl.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// Through e^-|x|, which cannot overflow.
HWY_INLINE VF32 log_sigmoid(VF32 x) {
  const VF32 rest = hn::Log1p(kF32, hn::Exp(kF32, hn::Neg(hn::Abs(x))));
  return hn::Sub(hn::Min(x, hn::Zero(kF32)), rest);
}

void log_sigmoid_target(Context& ctx, const LogSigmoidArgs& args) {
  const std::int64_t heads = args.y.shape[1];
  const std::int64_t rows = args.y.shape[0];
  const std::int64_t rows_per_task = std::max<std::int64_t>(1, 4096 / heads);
  ctx.threads().parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (std::int64_t r = task * rows_per_task; r < end; ++r) {
      const float* x = args.x.data != nullptr ? args.x.f32() + r * heads : nullptr;
      const float* bias = args.bias.data != nullptr ? args.bias.f32() : nullptr;
      float* y = args.y.f32() + r * heads;
      const auto input = [&](std::int64_t i, auto&& load_vector) HWY_ATTR {
        const VF32 v = x != nullptr ? load_vector(x + i) : hn::Zero(kF32);
        return bias != nullptr ? hn::Add(v, load_vector(bias + i)) : v;
      };
      for_row(
          heads,
          [&](std::int64_t i) HWY_ATTR {
            store(log_sigmoid(input(i, [](const float* p) HWY_ATTR { return load(p); })), y + i);
          },
          [&](std::int64_t i, std::int64_t n) HWY_ATTR {
            const VF32 v = input(i, [n](const float* p) HWY_ATTR { return load_first(p, n); });
            store_first(log_sigmoid(v), y + i, n);
          });
    }
  });
}

void log_sigmoid_backward_target(Context& ctx, const LogSigmoidBackwardArgs& args) {
  const std::int64_t rows = args.y.shape[0];
  const std::int64_t heads = args.y.shape[1];
  ScratchScope scratch(ctx);
  const RowSums sums(scratch, rows, heads, 1);
  ctx.threads().parallel_for(sums.tasks(), [&](std::int64_t task) {
    float* dbias = sums.of(task);
    for (std::int64_t r = sums.begin(task); r < sums.end(task); ++r) {
      const float* y = args.y.f32() + r * heads;
      const float* dy = args.dy.f32() + r * heads;
      float* dx = args.dx.data != nullptr ? args.dx.f32() + r * heads : nullptr;
      for_vectors(heads, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
        const VF32 slope = hn::Neg(hn::Expm1(kF32, load_vector(y + i)));
        const VF32 d = hn::Mul(load_vector(dy + i), slope);
        if (dx != nullptr) store_vector(d, dx + i);
        store_vector(hn::Add(load_vector(dbias + i), d), dbias + i);
      });
    }
  });
  if (args.dbias.data != nullptr) sums.add_to(ctx, args.dbias.f32());
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(log_sigmoid_target);
HWY_EXPORT(log_sigmoid_backward_target);
void log_sigmoid(Context& ctx, const LogSigmoidArgs& args) {
  HWY_DYNAMIC_DISPATCH(log_sigmoid_target)(ctx, args);
}
void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(log_sigmoid_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
