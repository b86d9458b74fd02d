#include "train/evaluate.h"

#include <algorithm>
#include <numeric>

#include "model/blocks/projection.h"
#include "ops/cross_entropy.h"

namespace deltafox::train {
namespace {

// Tokens that pass through the layers at a time, a multiple of every mixer's chunk; and rows of
// logits in memory at a time.
constexpr std::int64_t kPieceTokens = 1024;
constexpr std::int64_t kGpuPieceTokens = 16384;
constexpr std::int64_t kLogitRows = 128;
constexpr std::int64_t kGpuLogitRows = 4096;

// loss [n] of the next ids of each sequence, continuing from its state.
void piece_losses(Context& ctx, const CausalLM& model, std::span<const std::int32_t> input_ids,
                  std::span<const std::int32_t> labels, const Sequences& sequences,
                  std::span<SequenceState* const> states, std::span<float> loss) {
  const std::int64_t tokens = sequences.tokens();
  const CausalLM::Config& config = model.config();
  const std::int64_t at_once =
      std::min(tokens, ctx.device() == Device::kCuda ? kGpuLogitRows : kLogitRows);
  ScratchScope scratch(ctx);
  const TensorView ids = scratch.tensor({tokens}, DType::kI32);
  const TensorView hidden = scratch.tensor({tokens, config.hidden_size});  // [n, C]
  const TensorView normed = scratch.activation(hidden.shape);              // [n, C]
  ctx.copy(ids.data, input_ids.data(), input_ids.size_bytes());
  model.forward(ctx, {static_cast<const std::int32_t*>(ids.data), input_ids.size()}, sequences,
                states, hidden);
  model.final_norm(ctx, hidden, normed);
  const TensorView memory = scratch.tensor({at_once, config.vocab_size});
  for (std::int64_t begin = 0; begin < tokens; begin += at_once) {
    const std::int64_t count = std::min(at_once, tokens - begin);
    const TensorView logits = rows_of(memory, 0, count);
    model.head(ctx, rows_of(normed, begin, count), logits);
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
  const std::int64_t piece = ctx.device() == Device::kCuda ? kGpuPieceTokens : kPieceTokens;
  const std::int64_t windows = static_cast<std::int64_t>(input_ids.size()) / length;
  // Short windows pass side by side, long ones in pieces.
  const std::int64_t beside = std::clamp<std::int64_t>(piece / length, 1, windows);
  const std::int64_t part = beside > 1 ? length : piece;
  for (std::int64_t window = 0; window < windows; window += beside) {
    const std::int64_t count = std::min(beside, windows - window);
    std::vector<SequenceState> states;
    std::vector<SequenceState*> pointers;
    states.reserve(static_cast<std::size_t>(count));
    for (std::int64_t w = 0; w < count; ++w) {
      states.push_back(model.new_state(ctx.device(), ctx.activation_dtype()));
      pointers.push_back(&states.back());
    }
    for (std::int64_t begin = 0; begin < length; begin += part) {
      const std::int64_t tokens = std::min(part, length - begin);
      std::vector<std::int64_t> cu_seqlens;
      for (std::int64_t w = 0; w <= count; ++w) cu_seqlens.push_back(w * tokens);
      const auto at = static_cast<std::size_t>(window * length + begin);
      const auto n = static_cast<std::size_t>(count * tokens);
      piece_losses(ctx, model, input_ids.subspan(at, n), labels.subspan(at, n),
                   Sequences(cu_seqlens), pointers, loss.subspan(at, n));
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
