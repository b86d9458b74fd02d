#include "ops/token_shift.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/token_shift.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

HWY_INLINE void mix_row(const float* previous, const float* x, float alpha, float* y,
                        std::int64_t size) {
  const VF32 before = hn::Set(kF32, alpha);
  const VF32 now = hn::Set(kF32, 1 - alpha);
  for_row(
      size,
      [&](std::int64_t i) HWY_ATTR {
        store(hn::MulAdd(before, load(previous + i), hn::Mul(now, load(x + i))), y + i);
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        const VF32 mixed =
            hn::MulAdd(before, load_first(previous + i, n), hn::Mul(now, load_first(x + i, n)));
        store_first(mixed, y + i, n);
      });
}

void token_shift_target(Context& ctx, const TokenShiftArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  const std::int64_t dim = args.x.shape[2];
  const std::int64_t width = heads * dim;
  constexpr std::int64_t kTokens = 16;  // of a task
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t begin = args.sequences.begin(b);
    const std::int64_t length = args.sequences.length(b);
    float* state = args.states[static_cast<std::size_t>(b)];
    ctx.threads().parallel_for((length + kTokens - 1) / kTokens, [&](std::int64_t task) {
      const std::int64_t end = std::min(length, (task + 1) * kTokens);
      for (std::int64_t t = task * kTokens; t < end; ++t) {
        const float* x = args.x.f32() + (begin + t) * width;
        const float* previous = t == 0 ? state : x - width;
        for (std::int64_t h = 0; h < heads; ++h) {
          mix_row(previous + h * dim, x + h * dim, args.alpha.f32()[(begin + t) * heads + h],
                  args.y.f32() + (begin + t) * width + h * dim, dim);
        }
      }
    });
    std::copy_n(args.x.f32() + (begin + length - 1) * width, width, state);
  }
}

namespace {

// One token of one head: dx, and dα returned. `previous` and `next_dy` are null where the sequence
// has no such token.
HWY_INLINE float shift_row_backward(const float* previous, const float* x, const float* dy,
                                    const float* next_dy, float alpha, float next_alpha, float* dx,
                                    std::int64_t size) {
  const VF32 now = hn::Set(kF32, 1 - alpha);
  const VF32 next = hn::Set(kF32, next_alpha);
  VF32 sum = hn::Zero(kF32);
  for_vectors(size, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    const VF32 d = load_vector(dy + i);
    const VF32 before = previous != nullptr ? load_vector(previous + i) : hn::Zero(kF32);
    sum = hn::MulAdd(d, hn::Sub(before, load_vector(x + i)), sum);
    VF32 result = hn::Mul(now, d);
    if (next_dy != nullptr) result = hn::MulAdd(next, load_vector(next_dy + i), result);
    store_vector(result, dx + i);
  });
  return sum_of(sum);
}

}  // namespace

void token_shift_backward_target(Context& ctx, const TokenShiftBackwardArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  const std::int64_t dim = args.x.shape[2];
  const std::int64_t width = heads * dim;
  constexpr std::int64_t kTokens = 16;  // of a task
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t begin = args.sequences.begin(b);
    const std::int64_t length = args.sequences.length(b);
    ctx.threads().parallel_for((length + kTokens - 1) / kTokens, [&](std::int64_t task) {
      const std::int64_t end = std::min(length, (task + 1) * kTokens);
      for (std::int64_t t = task * kTokens; t < end; ++t) {
        for (std::int64_t h = 0; h < heads; ++h) {
          const std::int64_t at = (begin + t) * width + h * dim;
          const float* x = args.x.f32() + at;
          const float* dy = args.dy.f32() + at;
          const float* alpha = args.alpha.f32() + (begin + t) * heads + h;
          const bool last = t + 1 == length;
          args.dalpha.f32()[(begin + t) * heads + h] =
              shift_row_backward(t > 0 ? x - width : nullptr, x, dy, last ? nullptr : dy + width,
                                 alpha[0], last ? 0.0f : alpha[heads], args.dx.f32() + at, dim);
        }
      }
    });
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(token_shift_target);
HWY_EXPORT(token_shift_backward_target);
void token_shift(Context& ctx, const TokenShiftArgs& args) {
  HWY_DYNAMIC_DISPATCH(token_shift_target)(ctx, args);
}
void token_shift_backward(Context& ctx, const TokenShiftBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(token_shift_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
