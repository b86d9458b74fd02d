#include "infer/beam_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "infer/sampler.h"

namespace deltafox::infer {

namespace {

constexpr float kImpossible = -std::numeric_limits<float>::infinity();

std::size_t as_size(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

void truncate(std::vector<Beam>& beams, std::size_t size) {
  if (beams.size() > size)
    beams.erase(beams.begin() + static_cast<std::ptrdiff_t>(size), beams.end());
}

}  // namespace

BeamSearch::BeamSearch(const GenerationConfig& config, std::span<const std::int32_t> eos_token_ids,
                       std::int64_t max_new_tokens, std::uint32_t prompt_index,
                       std::vector<std::int32_t> prompt, std::optional<TextStream> text)
    : config_(config),
      eos_token_ids_(eos_token_ids),
      prompt_size_(prompt.size()),
      max_new_tokens_(max_new_tokens),
      prompt_index_(prompt_index) {
  Beam& beam = running_.emplace_back();
  beam.ids = std::move(prompt);
  beam.text = std::move(text);
}

// Calls visit(index, score) for every continuation that is possible, with the sum of its
// log-probabilities.
template <typename Visit>
void BeamSearch::visit_continuations(std::span<const float> scores, Visit visit) const {
  const std::size_t vocab_size = scores.size() / running_.size();
  std::size_t index = 0;
  for (const Beam& beam : running_) {
    for (const std::size_t end = index + vocab_size; index < end; ++index) {
      const float score = scores[index] + beam.score;
      if (score != kImpossible) visit(index, score);
    }
  }
}

// Leaves in candidates_ the `count` best continuations, best first; of equal ones, the first.
void BeamSearch::choose_best(std::span<const float> scores, std::size_t count) {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.score != b.score ? a.score > b.score : a.index < b.index;
  };
  // A heap of the best so far, with the worst of them on top.
  candidates_.clear();
  visit_continuations(scores, [&](std::size_t index, float score) {
    if (candidates_.size() == count) {
      if (!better({index, score}, candidates_.front())) return;
      std::pop_heap(candidates_.begin(), candidates_.end(), better);
      candidates_.pop_back();
    }
    candidates_.push_back({index, score});
    std::push_heap(candidates_.begin(), candidates_.end(), better);
  });
  std::sort_heap(candidates_.begin(), candidates_.end(), better);
}

// Leaves in candidates_ `count` continuations drawn without replacement from the softmax of their
// scores, in the order of the draws.
void BeamSearch::draw(std::span<const float> scores, std::size_t count) {
  std::vector<Candidate> possible;
  float max = kImpossible;
  visit_continuations(scores, [&](std::size_t index, float score) {
    possible.push_back({index, score});
    max = std::max(max, score);
  });
  std::vector<std::uint64_t> weights;
  weights.reserve(possible.size());
  // So many beams that the sum might not fit make the unit of the weights larger.
  const int shift = std::bit_width(possible.size() / static_cast<std::size_t>(kMostWeights));
  for (const Candidate& candidate : possible) {
    weights.push_back(token_weight(candidate.score, max).weight >> shift);
  }
  candidates_.clear();
  DrawKey key{config_.seed, prompt_index_, 0, static_cast<std::uint32_t>(new_tokens_), 0};
  const auto positive = [](std::uint64_t weight) { return weight > 0; };
  while (candidates_.size() < count && std::any_of(weights.begin(), weights.end(), positive)) {
    const std::size_t at = sample_weights(weights, uniform(key));
    candidates_.push_back(possible[at]);
    weights[at] = 0;
    ++key.draw;
  }
}

std::optional<FinishReason> BeamSearch::finish_reason(const Beam& beam) const {
  if (std::find(eos_token_ids_.begin(), eos_token_ids_.end(), beam.ids.back()) !=
      eos_token_ids_.end()) {
    return FinishReason::kEos;
  }
  if (beam.text && !beam.text->stop_string().empty()) return FinishReason::kStopString;
  if (new_tokens_ == max_new_tokens_) return FinishReason::kLength;
  return std::nullopt;
}

float BeamSearch::penalised(float score, std::int64_t length) const {
  return score / static_cast<float>(std::pow(static_cast<double>(length), config_.length_penalty));
}

void BeamSearch::add_finished(Beam beam) {
  beam.score = penalised(beam.score, new_tokens_);
  const auto worse = std::find_if(finished_.begin(), finished_.end(),
                                  [&](const Beam& other) { return other.score < beam.score; });
  finished_.insert(worse, std::move(beam));
  if (finished_.size() > as_size(config_.num_beams)) finished_.pop_back();
}

bool BeamSearch::can_improve() const {
  if (running_.empty()) return false;
  if (finished_.size() < as_size(config_.num_beams)) return true;
  if (config_.early_stopping == EarlyStopping::kTrue) return false;
  const bool at_full_length =
      config_.early_stopping == EarlyStopping::kNever && config_.length_penalty > 0.0;
  const std::int64_t length = at_full_length ? max_new_tokens_ : new_tokens_;
  return penalised(running_.front().score, length) > finished_.back().score;
}

void BeamSearch::advance(std::span<const float> scores, std::span<const float> model_logprobs) {
  const std::size_t vocab_size = scores.size() / running_.size();
  std::vector<double> log_sums(running_.size(), 0.0);
  if (config_.output_logprobs) {
    for (std::size_t b = 0; b < running_.size(); ++b) {
      log_sums[b] = weight_sum(scores.subspan(b * vocab_size, vocab_size)).log();
    }
  }
  const std::size_t num_beams = as_size(config_.num_beams);
  const std::size_t count = std::max<std::size_t>(2, 1 + eos_token_ids_.size()) * num_beams;
  if (config_.do_sample) {
    draw(scores, count);
  } else {
    choose_best(scores, count);
  }

  ++new_tokens_;
  std::vector<Beam> next;
  for (std::size_t rank = 0; rank < candidates_.size(); ++rank) {
    const auto [index, score] = candidates_[rank];
    const std::size_t parent = index / vocab_size;
    Beam beam = running_[parent];
    beam.parent = parent;
    beam.score = score;
    beam.ids.push_back(static_cast<std::int32_t>(index % vocab_size));
    if (config_.output_logprobs) {
      beam.logprobs.push_back(normalised(scores[index], log_sums[parent]));
      beam.model_logprobs.push_back(model_logprobs[index]);
    }
    if (beam.text) beam.text->push(beam.ids.back());
    beam.finish_reason = finish_reason(beam);
    if (!beam.finish_reason) {
      next.push_back(std::move(beam));
    } else if (rank < num_beams) {
      add_finished(std::move(beam));
    }
  }
  std::stable_sort(next.begin(), next.end(),
                   [](const Beam& a, const Beam& b) { return a.score > b.score; });
  truncate(next, num_beams);
  running_ = std::move(next);
  done_ = !can_improve();
}

std::vector<Beam> BeamSearch::results() const {
  std::vector<Beam> results = finished_;
  if (!done_ && new_tokens_ > 0) {
    for (Beam beam : running_) {
      beam.score = penalised(beam.score, new_tokens_);
      beam.finish_reason = FinishReason::kCancelled;
      results.push_back(std::move(beam));
    }
  }
  truncate(results, as_size(config_.num_return_sequences));
  return results;
}

}  // namespace deltafox::infer
