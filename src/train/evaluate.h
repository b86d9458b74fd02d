// Losses without gradients, and their means over prefixes of a window.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/context.h"
#include "model/causal_lm.h"
#include "train/data.h"

namespace deltafox::train {

// loss [B·T] of B windows of `length` ids, each read from a new state, in bounded memory.
void window_losses(Context& ctx, const CausalLM& model, std::int64_t length,
                   std::span<const std::int32_t> input_ids, std::span<const std::int32_t> labels,
                   std::span<float> loss);

// The sum of losses at each position of a window.
class LossByPosition {
 public:
  explicit LossByPosition(std::int64_t length) : sums_(static_cast<std::size_t>(length)) {}

  void add(std::span<const float> loss);  // whole windows
  void clear();

  std::int64_t windows() const { return windows_; }
  std::vector<float> mean() const;  // [T]
  // Means over the first `length`, `length`/2, ... positions, down to min_length.
  std::vector<std::pair<std::int64_t, double>> prefix_means(std::int64_t min_length) const;

  // For checkpoints.
  std::vector<double>& sums() { return sums_; }
  const std::vector<double>& sums() const { return sums_; }
  void set_windows(std::int64_t windows) { windows_ = windows; }

 private:
  std::vector<double> sums_;  // [T]
  std::int64_t windows_ = 0;
};

}  // namespace deltafox::train
