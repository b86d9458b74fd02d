#include "train/evaluate.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "ops/cross_entropy.h"

namespace deltafox::train {
namespace {

// Tokens that pass through the layers at a time, a multiple of every mixer's chunk; and rows of
// logits in memory at a time.
constexpr std::int64_t kPieceTokens = 1024;
constexpr std::int64_t kLogitRows = 128;

TensorView rows_at(const TensorView& x, std::int64_t begin, std::int64_t count) {
  return {x.f32() + begin * x.shape[1], DType::kF32, {count, x.shape[1]}};
}

// loss [n] of the next ids of one window, continuing from `state`.
void piece_losses(Context& ctx, const CausalLM& model, std::span<const std::int32_t> input_ids,
                  std::span<const std::int32_t> labels, SequenceState& state,
                  std::span<float> loss) {
  const auto tokens = static_cast<std::int64_t>(input_ids.size());
  const CausalLM::Config& config = model.config();
  const std::array<std::int64_t, 2> cu_seqlens{0, tokens};
  const std::array<SequenceState*, 1> states{&state};
  ScratchScope scratch(ctx);
  const TensorView hidden = scratch.tensor({tokens, config.hidden_size});  // [n, C]
  const TensorView normed = scratch.tensor({tokens, config.hidden_size});  // [n, C]
  model.forward(ctx, input_ids, Sequences(cu_seqlens), states, hidden);
  model.final_norm(ctx, hidden, normed);
  const TensorView memory = scratch.tensor({std::min(tokens, kLogitRows), config.vocab_size});
  for (std::int64_t begin = 0; begin < tokens; begin += kLogitRows) {
    const std::int64_t count = std::min(kLogitRows, tokens - begin);
    const TensorView logits = rows_at(memory, 0, count);
    model.head(ctx, rows_at(normed, begin, count), logits);
    const auto at = static_cast<std::size_t>(begin);
    const auto n = static_cast<std::size_t>(count);
    ops::cross_entropy(
        ctx, {.logits = logits, .labels = labels.subspan(at, n), .loss = loss.subspan(at, n)});
  }
}

}  // namespace

void window_losses(Context& ctx, const CausalLM& model, std::int64_t length,
                   std::span<const std::int32_t> input_ids, std::span<const std::int32_t> labels,
                   std::span<float> loss) {
  const auto total = static_cast<std::int64_t>(input_ids.size());
  for (std::int64_t window = 0; window < total; window += length) {
    SequenceState state = model.new_state();
    for (std::int64_t begin = 0; begin < length; begin += kPieceTokens) {
      const auto at = static_cast<std::size_t>(window + begin);
      const auto n = static_cast<std::size_t>(std::min(kPieceTokens, length - begin));
      piece_losses(ctx, model, input_ids.subspan(at, n), labels.subspan(at, n), state,
                   loss.subspan(at, n));
    }
  }
}

void LossByPosition::add(std::span<const float> loss) {
  for (std::size_t i = 0; i < loss.size(); ++i) sums_[i % sums_.size()] += loss[i];
  windows_ += static_cast<std::int64_t>(loss.size() / sums_.size());
}

void LossByPosition::clear() {
  std::fill(sums_.begin(), sums_.end(), 0.0);
  windows_ = 0;
}

std::vector<float> LossByPosition::mean() const {
  std::vector<float> result;
  result.reserve(sums_.size());
  for (const double sum : sums_) {
    result.push_back(static_cast<float>(sum / static_cast<double>(windows_)));
  }
  return result;
}

std::vector<std::pair<std::int64_t, double>> LossByPosition::prefix_means(
    std::int64_t min_length) const {
  const auto whole = static_cast<std::int64_t>(sums_.size());
  std::vector<std::pair<std::int64_t, double>> means;
  for (std::int64_t length = whole; length >= std::min(min_length, whole) && length > 0;
       length /= 2) {
    const double sum = std::accumulate(sums_.begin(), sums_.begin() + length, 0.0);
    means.emplace_back(length, sum / static_cast<double>(length * windows_));
  }
  return means;
}

}  // namespace deltafox::train
