// Beam search for one prompt: which beams go on, which finished, and when to end. It sees rows of
// scores only; the model and its states are the caller's.
//
// The rules are those of transformers 5.17 (generation/utils.py, _beam_search): of all (beam, id)
// continuations, the K = max(2, 1 + number of end-of-sequence ids)·num_beams with the largest sums
// of log-probabilities are candidates (or are drawn, with do_sample); candidates that end are
// finished sequences if they are among the first num_beams; the best num_beams of the others run
// on. Continuations of probability zero are no candidates here, so fewer beams may run.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "deltafox/generate.h"
#include "infer/text_stream.h"

namespace deltafox::infer {

struct Beam {
  std::vector<std::int32_t> ids;  // prompt and continuation
  std::vector<float> logprobs;    // with output_logprobs
  std::vector<float> model_logprobs;
  float score = 0.0F;      // sum of log-probabilities; once finished, length-penalised
  std::size_t parent = 0;  // the beam of the step before that it continues
  std::optional<FinishReason> finish_reason;
  std::optional<TextStream> text;  // only if there are stop strings
};

class BeamSearch {
 public:
  // `max_new_tokens` >= 1 for this prompt. `text` is given if and only if there are stop strings.
  // `prompt_index` is the prompt's number in the seed's stream.
  BeamSearch(const GenerationConfig& config, std::span<const std::int32_t> eos_token_ids,
             std::int64_t max_new_tokens, std::uint32_t prompt_index,
             std::vector<std::int32_t> prompt, std::optional<TextStream> text);

  const std::vector<Beam>& running() const { return running_; }
  bool done() const { return done_; }
  std::size_t prompt_size() const { return prompt_size_; }

  // One step: `scores` [running, N] are the log-probabilities of the next id after the processors,
  // `model_logprobs`, of the same shape, those of the model; empty without output_logprobs.
  // Afterwards running()[i].parent tells where each beam comes from.
  void advance(std::span<const float> scores, std::span<const float> model_logprobs);

  // The best num_return_sequences sequences, best first; before done(), running beams fill up the
  // finished ones, as cancelled.
  std::vector<Beam> results() const;

 private:
  struct Candidate {
    std::size_t index;  // beam·N + id
    float score;
  };
  template <typename Visit>
  void visit_continuations(std::span<const float> scores, Visit visit) const;
  void choose_best(std::span<const float> scores, std::size_t count);
  void draw(std::span<const float> scores, std::size_t count);
  std::optional<FinishReason> finish_reason(const Beam& beam) const;
  float penalised(float score, std::int64_t length) const;
  void add_finished(Beam beam);
  bool can_improve() const;

  const GenerationConfig& config_;
  std::span<const std::int32_t> eos_token_ids_;
  std::size_t prompt_size_;
  std::int64_t max_new_tokens_;
  std::uint32_t prompt_index_;
  std::int64_t new_tokens_ = 0;        // of every running beam
  std::vector<Beam> running_;          // best first
  std::vector<Beam> finished_;         // best first, at most num_beams
  std::vector<Candidate> candidates_;  // of the current step
  bool done_ = false;
};

}  // namespace deltafox::infer
