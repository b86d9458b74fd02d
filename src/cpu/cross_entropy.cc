#include "ops/cross_entropy.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cross_entropy.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

HWY_INLINE float row_max(const float* x, std::int64_t size) {
  VF32 max = hn::Set(kF32, x[0]);
  for_row(
      size, [&](std::int64_t i) HWY_ATTR { max = hn::Max(max, load(x + i)); },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        const auto inside = hn::FirstN(kF32, static_cast<std::size_t>(n));
        max = hn::IfThenElse(inside, hn::Max(max, load_first(x + i, n)), max);
      });
  return hn::GetLane(hn::MaxOfLanes(kF32, max));
}

// Σ exp(x − max). Float32 within a stretch, float64 across: a vocabulary has some 50,000 terms.
HWY_INLINE double sum_exp(const float* x, std::int64_t size, float max) {
  constexpr std::int64_t kStretch = 1024;
  const VF32 shift = hn::Set(kF32, max);
  double total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kStretch) {
    VF32 sum = hn::Zero(kF32);
    const float* stretch = x + begin;
    for_row(
        std::min(kStretch, size - begin),
        [&](std::int64_t i)
            HWY_ATTR { sum = hn::Add(sum, hn::Exp(kF32, hn::Sub(load(stretch + i), shift))); },
        [&](std::int64_t i, std::int64_t n) HWY_ATTR {
          const auto inside = hn::FirstN(kF32, static_cast<std::size_t>(n));
          const VF32 e = hn::Exp(kF32, hn::Sub(load_first(stretch + i, n), shift));
          sum = hn::Add(sum, hn::IfThenElseZero(inside, e));
        });
    total += sum_of(sum);
  }
  return total;
}

// The loss of a row whose maximum and Σ exp(x − max) are known. The two large terms first: their
// difference is exact or nearly so.
HWY_INLINE float loss_of(const float* row, std::int32_t label, float max, double sum) {
  return static_cast<float>(static_cast<double>(max) - row[label] + std::log(sum));
}

void cross_entropy_target(Context& ctx, const CrossEntropyArgs& args) {
  const std::int64_t vocab = args.logits.shape[1];
  ctx.threads().parallel_for(static_cast<std::int64_t>(args.labels.size()), [&](std::int64_t task) {
    const auto t = static_cast<std::size_t>(task);
    const float* row = args.logits.f32() + task * vocab;
    if (args.labels[t] < 0) {
      args.loss[t] = 0;
      return;
    }
    const float max = row_max(row, vocab);
    args.loss[t] = loss_of(row, args.labels[t], max, sum_exp(row, vocab, max));
  });
}

void cross_entropy_backward_target(Context& ctx, const CrossEntropyBackwardArgs& args) {
  const std::int64_t vocab = args.logits.shape[1];
  ctx.threads().parallel_for(static_cast<std::int64_t>(args.labels.size()), [&](std::int64_t task) {
    const auto t = static_cast<std::size_t>(task);
    float* row = args.logits.f32() + task * vocab;
    const std::int32_t label = args.labels[t];
    if (label < 0) {
      args.loss[t] = 0;
      std::fill(row, row + vocab, 0.0f);
      return;
    }
    const float max = row_max(row, vocab);
    const double sum = sum_exp(row, vocab, max);
    args.loss[t] = loss_of(row, label, max, sum);
    const VF32 shift = hn::Set(kF32, max);
    const VF32 factor = hn::Set(kF32, static_cast<float>(args.scale / sum));
    for_vectors(vocab, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      const VF32 e = hn::Exp(kF32, hn::Sub(load_vector(row + i), shift));
      store_vector(hn::Mul(e, factor), row + i);
    });
    row[label] -= args.scale;
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(cross_entropy_target);
HWY_EXPORT(cross_entropy_backward_target);
void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  HWY_DYNAMIC_DISPATCH(cross_entropy_target)(ctx, args);
}
void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(cross_entropy_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
