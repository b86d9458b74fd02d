#include "ops/rms_norm.h"

#include "core/float_convert.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rms_norm.cc"
#include <hwy/foreach_target.h>

#include "cpu/row_sums-inl.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// As invertible_weight.
HWY_INLINE VF32 invertible(VF32 w) {
  const VF32 least = hn::Set(kF32, kLeastNormWeight);
  return hn::IfThenElse(hn::Lt(hn::Abs(w), least), least, w);
}

// y = x · scale [· w] [· act(gate)]
template <bool kInvertible>
HWY_INLINE void scale_row(const float* x, float scale, const float* w, const float* gate,
                          Activation activation, float* y, std::int64_t width) {
  const VF32 scales = hn::Set(kF32, scale);
  const auto weights = [](VF32 v) HWY_ATTR { return kInvertible ? invertible(v) : v; };
  for_row(
      width,
      [&](std::int64_t i) HWY_ATTR {
        VF32 v = hn::Mul(load(x + i), scales);
        if (w != nullptr) v = hn::Mul(v, weights(load(w + i)));
        if (gate != nullptr) v = hn::Mul(v, activate(activation, load(gate + i)));
        store(v, y + i);
        // The next row.
        __builtin_prefetch(x + width + i);
        __builtin_prefetch(y + width + i);
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        VF32 v = hn::Mul(load_first(x + i, n), scales);
        if (w != nullptr) v = hn::Mul(v, weights(load_first(w + i, n)));
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
    scale_row<false>(x, 1, nullptr, gate, args.gate_activation, y, width);
    x = y;
    gate = nullptr;
  }
  const float mean = sum_of_squares(x, width) / static_cast<float>(width);
  const float scale = 1 / std::sqrt(mean + args.eps);
  if (args.scales.data != nullptr) {
    args.scales.f32()[r] = scale;
    return scale_row<true>(x, scale, w, gate, args.gate_activation, y, width);
  }
  scale_row<false>(x, scale, w, gate, args.gate_activation, y, width);
}

void rms_norm_target(Context& ctx, const RmsNormArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t width = args.x.shape[1];
  // Long stretches, which are read the faster, but enough for all threads to end together.
  const std::int64_t rows_per_task = std::max<std::int64_t>(
      {1, 4096 / width, rows / (8 * static_cast<std::int64_t>(ctx.threads().size()))});
  ctx.threads().parallel_for((rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task) {
    const std::int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (std::int64_t r = task * rows_per_task; r < end; ++r) norm_row(args, r, width);
  });
}

namespace {

// One row; dw may be null.
HWY_INLINE void norm_row_backward(const RmsNormBackwardArgs& args, std::int64_t row,
                                  std::int64_t width, float* dw) {
  const std::int64_t at = row * width;
  const float* x = args.x.f32() + at;
  const float* dy = args.dy.f32() + at;
  const std::int64_t group = args.w.data != nullptr ? at % args.w.shape[0] : 0;
  const float* w = args.w.data != nullptr ? args.w.f32() + group : nullptr;
  const float* gate = args.gate.data != nullptr ? args.gate.f32() + at : nullptr;
  const VF32 one = hn::Set(kF32, 1.0f);
  // What is normed: x, or its product with the gate.
  const auto input = [&](std::int64_t i, VF32 factor, auto&& load_vector) HWY_ATTR {
    const VF32 v = load_vector(x + i);
    return args.gate_first ? hn::Mul(v, factor) : v;
  };
  const auto gate_factor = [&](std::int64_t i, auto&& load_vector) HWY_ATTR {
    return gate != nullptr ? activate(args.gate_activation, load_vector(gate + i)) : one;
  };
  // dy times what follows the norm.
  const auto dnormed = [&](std::int64_t i, VF32 factor, auto&& load_vector) HWY_ATTR {
    VF32 d = load_vector(dy + i);
    if (w != nullptr) d = hn::Mul(d, load_vector(w + i));
    return args.gate_first ? d : hn::Mul(d, factor);
  };
  VF32 squares = hn::Zero(kF32);
  VF32 dots = hn::Zero(kF32);
  for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& /*store_vector*/) HWY_ATTR {
    const VF32 factor = gate_factor(i, load_vector);
    const VF32 v = input(i, factor, load_vector);
    squares = hn::MulAdd(v, v, squares);
    dots = hn::MulAdd(dnormed(i, factor, load_vector), v, dots);
  });
  const float mean = sum_of(squares) / static_cast<float>(width);
  const float scale = 1 / std::sqrt(mean + args.eps);
  const VF32 scales = hn::Set(kF32, scale);
  const VF32 pull = hn::Set(kF32, scale * scale * scale * sum_of(dots) / static_cast<float>(width));
  for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    const VF32 factor = gate_factor(i, load_vector);
    const VF32 v = input(i, factor, load_vector);
    const VF32 normed = hn::Mul(v, scales);
    const VF32 d = load_vector(dy + i);
    if (dw != nullptr) {
      const VF32 gated = args.gate_first ? normed : hn::Mul(normed, factor);
      store_vector(hn::MulAdd(d, gated, load_vector(dw + group + i)), dw + group + i);
    }
    VF32 dv = hn::NegMulAdd(pull, v, hn::Mul(dnormed(i, factor, load_vector), scales));
    if (gate != nullptr) {
      const VF32 slope = activation_slope(args.gate_activation, load_vector(gate + i));
      const VF32 weighted = w != nullptr ? hn::Mul(normed, load_vector(w + i)) : normed;
      const VF32 dfactor = args.gate_first ? hn::Mul(dv, load_vector(x + i)) : hn::Mul(d, weighted);
      store_vector(hn::Mul(dfactor, slope), args.dgate.f32() + at + i);
      if (args.gate_first) dv = hn::Mul(dv, factor);
    }
    float* dx = args.dx.f32() + at + i;
    store_vector(args.accumulate_dx ? hn::Add(load_vector(dx), dv) : dv, dx);
  });
}

// The same from y and the scales.
HWY_INLINE void output_row_backward(const RmsNormBackwardArgs& args, std::int64_t row,
                                    std::int64_t width, float* dw) {
  const std::int64_t at = row * width;
  const float* y = args.y.f32() + at;
  const float* dy = args.dy.f32() + at;
  float* dx = args.dx.f32() + at;
  const std::int64_t group = args.w.data != nullptr ? at % args.w.shape[0] : 0;
  const float* w = args.w.data != nullptr ? args.w.f32() + group : nullptr;
  const VF32 one = hn::Set(kF32, 1.0f);
  VF32 dots = hn::Zero(kF32);
  for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& /*store_vector*/) HWY_ATTR {
    dots = hn::MulAdd(load_vector(dy + i), load_vector(y + i), dots);
  });
  const VF32 scales = hn::Set(kF32, args.scales.f32()[row]);
  const VF32 share = hn::Set(kF32, sum_of(dots) / static_cast<float>(width));
  for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    const VF32 weights = w != nullptr ? invertible(load_vector(w + i)) : one;
    const VF32 normed = hn::Div(load_vector(y + i), weights);
    const VF32 d = load_vector(dy + i);
    if (dw != nullptr) {
      store_vector(hn::MulAdd(d, normed, load_vector(dw + group + i)), dw + group + i);
    }
    const VF32 own = hn::Mul(scales, hn::NegMulAdd(normed, share, hn::Mul(d, weights)));
    store_vector(args.accumulate_dx ? hn::Add(load_vector(dx + i), own) : own, dx + i);
  });
}

}  // namespace

void rms_norm_backward_target(Context& ctx, const RmsNormBackwardArgs& args) {
  const std::int64_t rows = args.dy.shape[0];
  const std::int64_t width = args.dy.shape[1];
  const bool has_dw = args.dw.data != nullptr;
  ScratchScope scratch(ctx);
  const RowSums sums(scratch, rows, width, has_dw ? args.w.shape[0] / width : 1);
  ctx.threads().parallel_for(sums.tasks(), [&](std::int64_t task) {
    float* dw = has_dw ? sums.of(task) : nullptr;
    for (std::int64_t r = sums.begin(task); r < sums.end(task); ++r) {
      if (args.x.data == nullptr) {
        output_row_backward(args, r, width, dw);
      } else {
        norm_row_backward(args, r, width, dw);
      }
    }
  });
  if (has_dw) sums.add_to(ctx, args.dw.f32());
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(rms_norm_target);
HWY_EXPORT(rms_norm_backward_target);
void rms_norm(Context& ctx, const RmsNormArgs& args) {
  HWY_DYNAMIC_DISPATCH(rms_norm_target)(ctx, args);
}
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(rms_norm_backward_target)(ctx, args);
  if (args.rounded.data != nullptr) convert(args.dx, args.rounded);
}
}  // namespace deltafox::cpu
#endif
