// Sums over rows, as gradients of weights are.
#if defined(DELTAFOX_CPU_ROW_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DELTAFOX_CPU_ROW_SUMS_INL_H_
#undef DELTAFOX_CPU_ROW_SUMS_INL_H_
#else
#define DELTAFOX_CPU_ROW_SUMS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "core/context.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// Each task has its own sums, which are added in order. How many tasks there are depends on the
// shape alone.
class RowSums {
 public:
  // `period` rows share one set of sums.
  RowSums(ScratchScope& scratch, std::int64_t rows, std::int64_t width, std::int64_t period)
      : rows_(rows), size_(period * width) {
    constexpr std::int64_t kMaxTasks = 64;
    const std::int64_t least = std::max<std::int64_t>(4096 / width, (rows - 1) / kMaxTasks + 1);
    rows_per_task_ = (std::max<std::int64_t>(1, least) + period - 1) / period * period;
    sums_ = scratch.tensor({tasks(), size_}).f32();
  }

  std::int64_t tasks() const { return (rows_ + rows_per_task_ - 1) / rows_per_task_; }
  std::int64_t begin(std::int64_t task) const { return task * rows_per_task_; }
  std::int64_t end(std::int64_t task) const { return std::min(rows_, begin(task + 1)); }
  // Zeros.
  float* of(std::int64_t task) const {
    float* sums = sums_ + task * size_;
    std::fill(sums, sums + size_, 0.0f);
    return sums;
  }
  void add_to(Context& ctx, float* total) const {
    constexpr std::int64_t kStretch = 1024;
    ctx.threads().parallel_for((size_ + kStretch - 1) / kStretch, [&](std::int64_t stretch) {
      const std::int64_t end = std::min(size_, (stretch + 1) * kStretch);
      for (std::int64_t task = 0; task < tasks(); ++task) {
        const float* sums = sums_ + task * size_;
        for (std::int64_t i = stretch * kStretch; i < end; ++i) total[i] += sums[i];
      }
    });
  }

 private:
  std::int64_t rows_, size_;
  std::int64_t rows_per_task_ = 1;
  float* sums_ = nullptr;
};

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
