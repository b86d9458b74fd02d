// linear of a few rows: the frame of step_linear without its norm and with one part.
#pragma once

#include <algorithm>

#include "core/context.h"
#include "cuda/step_packed.h"
#include "ops/linear.h"
#include "ops/step.h"

namespace deltafox::cuda {

constexpr std::int64_t kSmallLinearRows = kStepLinearRows;

inline bool fits_small_linear(const LinearArgs& args) {
  if (args.x.shape[0] > kSmallLinearRows || args.x.dtype != DType::kBF16) return false;
  const std::int64_t k = args.x.shape[1];
  return is_packed(args.w.dtype) ? fits_packed_step(1, k)
                                 : args.w.dtype == DType::kBF16 && k % 256 == 0;
}

// Rows of [T, N] from `first` on.
template <typename View>
View some_rows(const View& matrix, std::int64_t first, std::int64_t count) {
  const auto offset = static_cast<std::size_t>(first * matrix.shape[1]) * size_of(matrix.dtype);
  using Byte = std::conditional_t<std::is_same_v<View, TensorView>, std::byte, const std::byte>;
  return {static_cast<Byte*>(matrix.data) + offset, matrix.dtype, {count, matrix.shape[1]}};
}

inline void small_linear(Context& ctx, const LinearArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  // As many as a thread block has memory for.
  const std::int64_t at_once =
      is_packed(args.w.dtype) && !fits_packed_step(rows, args.x.shape[1]) ? 8 : rows;
  for (std::int64_t first = 0; first < rows; first += at_once) {
    const std::int64_t count = std::min(at_once, rows - first);
    const StepLinearPart part{
        .w = args.w,
        .y = some_rows(args.y, first, count),
        .epilogue = args.accumulate ? StepEpilogue::kAdd : StepEpilogue::kStore};
    step_linear(ctx, {.x = some_rows(args.x, first, count), .parts = {&part, 1}});
  }
}

}  // namespace deltafox::cuda
