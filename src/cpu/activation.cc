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
  const float scale = args.norm == FeatureNorm::kL2 ? l2_scale(sum_of(squares)) : 1 / sum_of(sums);
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

namespace {

// f(begin, size) for blocks of n elements.
template <typename F>
void for_blocks(Context& ctx, std::int64_t n, F&& f) {
  ctx.threads().parallel_for((n + kBlock - 1) / kBlock, [&](std::int64_t task) {
    f(task * kBlock, std::min(kBlock, n - task * kBlock));
  });
}

}  // namespace

void activation_backward_target(Context& ctx, const ActivationBackwardArgs& args) {
  for_blocks(ctx, args.x.shape.size(), [&](std::int64_t begin, std::int64_t size) {
    const float* x = args.x.f32() + begin;
    const float* dy = args.dy.f32() + begin;
    float* dx = args.dx.f32() + begin;
    for_vectors(size, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 slope = activation_slope(args.activation, load_vector(x + i));
      store_vector(hn::Mul(load_vector(dy + i), slope), dx + i);
    });
  });
}

void glu_backward_target(Context& ctx, const GluBackwardArgs& args) {
  const std::int64_t width = args.dy.shape[1];
  ctx.threads().parallel_for(args.dy.shape[0], [&](std::int64_t t) {
    const float* gate = args.gate_up.f32() + t * 2 * width;
    const float* dy = args.dy.f32() + t * width;
    float* dgate = args.dgate_up.f32() + t * 2 * width;
    for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 x = load_vector(gate + i);
      const VF32 d = load_vector(dy + i);
      const VF32 slope = activation_slope(args.activation, x);
      store_vector(hn::Mul(hn::Mul(d, load_vector(gate + width + i)), slope), dgate + i);
      store_vector(hn::Mul(d, activate(args.activation, x)), dgate + width + i);
    });
  });
}

void forget_gate_backward_target(Context& ctx, const ForgetGateBackwardArgs& args) {
  for_blocks(ctx, args.g.shape.size(), [&](std::int64_t begin, std::int64_t size) {
    const float* g = args.g.f32() + begin;
    const float* k = args.k.f32() + begin;
    const float* dg = args.dg.f32() + begin;
    const float* dk = args.dk.f32() + begin;
    float* dx = args.dx.f32() + begin;
    for_vectors(size, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 d = hn::Sub(load_vector(dg + i), load_vector(dk + i));
      store_vector(hn::Mul(d, hn::Mul(load_vector(g + i), load_vector(k + i))), dx + i);
    });
  });
}

namespace {

HWY_INLINE void feature_row_backward(const FeatureMapBackwardArgs& args, std::int64_t row,
                                     std::int64_t width) {
  const float* x = args.x.f32() + row * width;
  const float* dy = args.dy.f32() + row * width;
  float* dx = args.dx.f32() + row * width;
  VF32 sums = hn::Zero(kF32);
  VF32 squares = hn::Zero(kF32);
  VF32 dots = hn::Zero(kF32);
  const auto count = [&](VF32 a, VF32 d) HWY_ATTR {
    sums = hn::Add(sums, a);
    squares = hn::MulAdd(a, a, squares);
    dots = hn::MulAdd(a, d, dots);
  };
  if (args.norm != FeatureNorm::kNone) {
    for_row(
        width,
        [&](std::int64_t i)
            HWY_ATTR { count(activate(args.activation, load(x + i)), load(dy + i)); },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          // act(0) need not be 0: mask what lies beyond the end.
          const auto inside = hn::FirstN(kF32, static_cast<std::size_t>(n));
          const VF32 a = activate(args.activation, load_first(x + i, n));
          count(hn::IfThenElseZero(inside, a), load_first(dy + i, n));
        });
  }
  // da = scale · dy − factor · a − shift
  float scale = 1;
  float factor = 0;
  float shift = 0;
  if (args.norm == FeatureNorm::kL2) {
    scale = l2_scale(sum_of(squares));
    factor = scale * scale * scale * sum_of(dots);
  } else if (args.norm == FeatureNorm::kSum) {
    scale = 1 / sum_of(sums);
    shift = scale * scale * sum_of(dots);
  }
  for_vectors(width, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    const VF32 logits = load_vector(x + i);
    VF32 da = hn::Mul(load_vector(dy + i), hn::Set(kF32, scale));
    da = hn::NegMulAdd(hn::Set(kF32, factor), activate(args.activation, logits), da);
    da = hn::Sub(da, hn::Set(kF32, shift));
    store_vector(hn::Mul(da, activation_slope(args.activation, logits)), dx + i);
  });
}

}  // namespace

void feature_map_backward_target(Context& ctx, const FeatureMapBackwardArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  ctx.threads().parallel_for(args.x.shape[0], [&](std::int64_t t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      feature_row_backward(args, t * heads + h, args.x.shape[2]);
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
HWY_EXPORT(activation_backward_target);
HWY_EXPORT(glu_backward_target);
HWY_EXPORT(forget_gate_backward_target);
HWY_EXPORT(feature_map_backward_target);
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
void activation_backward(Context& ctx, const ActivationBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(activation_backward_target)(ctx, args);
}
void glu_backward(Context& ctx, const GluBackwardArgs& args) {
  if (args.y.data != nullptr) {
    glu(ctx, {.activation = args.activation, .gate_up = args.gate_up, .y = args.y});
  }
  HWY_DYNAMIC_DISPATCH(glu_backward_target)(ctx, args);
}
void forget_gate_backward(Context& ctx, const ForgetGateBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(forget_gate_backward_target)(ctx, args);
}
void feature_map_backward(Context& ctx, const FeatureMapBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(feature_map_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
