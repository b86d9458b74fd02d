#include "ops/adamw.h"

#include <algorithm>
#include <cmath>

#include "core/float_convert.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/adamw.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// Elements of a task; the sums of squares are taken over stretches of as many.
constexpr std::int64_t kPiece = 16 * 1024;

struct AdamWFactors {
  VF32 decay, scale, beta2, one_minus_beta1, one_minus_beta2, step_size, inverse_root, eps;

  HWY_INLINE explicit AdamWFactors(const AdamWArgs& args) {
    const auto t = static_cast<double>(args.step);
    const auto set = [](double x) HWY_ATTR { return hn::Set(kF32, static_cast<float>(x)); };
    decay = set(1 - args.lr * args.weight_decay);
    scale = set(args.scale);
    beta2 = set(args.beta2);
    one_minus_beta1 = set(1 - args.beta1);
    one_minus_beta2 = set(1 - args.beta2);
    step_size = set(args.lr / (1 - std::pow(args.beta1, t)));
    inverse_root = set(1 / std::sqrt(1 - std::pow(args.beta2, t)));
    eps = set(args.eps);
  }
  HWY_INLINE void step(VF32 grad, VF32& w, VF32& m, VF32& v) const {
    const VF32 g = hn::Mul(scale, grad);
    m = hn::MulAdd(one_minus_beta1, hn::Sub(g, m), m);
    v = hn::MulAdd(hn::Mul(one_minus_beta2, g), g, hn::Mul(beta2, v));
    const VF32 spread = hn::MulAdd(hn::Sqrt(v), inverse_root, eps);
    w = hn::NegMulAdd(step_size, hn::Div(m, spread), hn::Mul(w, decay));
  }
};

void adamw_target(Context& ctx, const AdamWArgs& args) {
  const std::int64_t size = args.w.shape.size();
  ctx.threads().parallel_for((size + kPiece - 1) / kPiece, [&](std::int64_t task) {
    const AdamWFactors factors(args);
    const std::int64_t begin = task * kPiece;
    const std::int64_t count = std::min(kPiece, size - begin);
    const float* grad = args.grad.f32() + begin;
    float* w = args.w.f32() + begin;
    float* m = args.m.f32() + begin;
    float* v = args.v.f32() + begin;
    for_row(
        count,
        [&](std::int64_t i) HWY_ATTR {
          VF32 wi = load(w + i);
          VF32 mi = load(m + i);
          VF32 vi = load(v + i);
          factors.step(load(grad + i), wi, mi, vi);
          store(wi, w + i);
          store(mi, m + i);
          store(vi, v + i);
        },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          VF32 wi = load_first(w + i, n);
          VF32 mi = load_first(m + i, n);
          VF32 vi = load_first(v + i, n);
          factors.step(load_first(grad + i, n), wi, mi, vi);
          store_first(wi, w + i, n);
          store_first(mi, m + i, n);
          store_first(vi, v + i, n);
        });
  });
}

double sum_of_squares_target(Context& ctx, const ConstTensorView& x) {
  const std::int64_t size = x.shape.size();
  const std::int64_t pieces = (size + kPiece - 1) / kPiece;
  ScratchScope scratch(ctx);
  const std::span<double> sums = scratch.array<double>(pieces);
  ctx.threads().parallel_for(pieces, [&](std::int64_t task) {
    const hn::CappedTag<double, 8> f64;
    const hn::Rebind<float, decltype(f64)> f32;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(f64));
    const float* data = x.f32() + task * kPiece;
    const std::int64_t count = std::min(kPiece, size - task * kPiece);
    auto sum = hn::Zero(f64);
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const auto wide = hn::PromoteTo(f64, hn::LoadU(f32, data + i));
      sum = hn::MulAdd(wide, wide, sum);
    }
    double total = hn::GetLane(hn::SumOfLanes(f64, sum));
    for (; i < count; ++i) total += static_cast<double>(data[i]) * data[i];
    sums[static_cast<std::size_t>(task)] = total;
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(adamw_target);
HWY_EXPORT(sum_of_squares_target);
void adamw(Context& ctx, const AdamWArgs& args) {
  HWY_DYNAMIC_DISPATCH(adamw_target)(ctx, args);
}
double sum_of_squares(Context& ctx, const ConstTensorView& x) {
  return HWY_DYNAMIC_DISPATCH(sum_of_squares_target)(ctx, x);
}
void adamw_step(Context& ctx, const AdamWStepArgs& args) {
  double squares = 0;
  for (const AdamWParam& param : args.params) squares += sum_of_squares(ctx, param.grad);
  const double norm = std::sqrt(squares);
  *args.norm.f32() = static_cast<float>(norm);
  if (!std::isfinite(norm)) return;
  for (const AdamWParam& param : args.params) {
    adamw(ctx, {.grad = param.grad,
                .w = param.w,
                .m = param.m,
                .v = param.v,
                .lr = args.lr,
                .beta1 = args.beta1,
                .beta2 = args.beta2,
                .eps = args.eps,
                .weight_decay = param.weight_decay,
                .scale = std::min(1.0, args.max_norm / (norm + 1e-6)),
                .step = args.step});
    if (param.rounded.data != nullptr) convert(param.w, param.rounded);
  }
}
}  // namespace deltafox::cpu
#endif
