// What all sequences of one generate() call share, and the two ways to continue them.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "deltafox/generate.h"
#include "infer/processors.h"
#include "infer/text_stream.h"

namespace deltafox::infer {

struct Session {
  // Throws Error for options and prompts that cannot be served. The arguments must outlive it.
  Session(const Model& model, std::span<const std::vector<std::int32_t>> prompts,
          const GenerationConfig& config, const GenerateOptions& options);

  std::int64_t max_new_tokens(std::size_t prompt) const;
  bool ends_sequence(std::int32_t id) const;
  // The prompt's number in the seed's stream.
  std::uint32_t prompt_index(std::size_t prompt) const;
  // The prompt's result before its first new token.
  GeneratedSequence new_sequence(std::size_t prompt) const;
  // Decodes what follows the prompt; empty without a tokenizer.
  std::optional<TextStream> text_stream(std::size_t prompt) const;
  bool should_stop() const { return options.should_stop && options.should_stop(); }

  // Reads all prompts; `logits` becomes [prompts, N], those after each prompt.
  std::vector<State> prefill(std::vector<float>& logits) const;
  // One token for each state; `logits` becomes [ids, N].
  void step(std::span<const std::int32_t> ids, std::span<State* const> states,
            std::vector<float>& logits) const;

  const Model& model;
  const std::span<const std::vector<std::int32_t>> prompts;
  const GenerationConfig& config;
  const GenerateOptions& options;
  const std::size_t vocab_size;
  const std::vector<std::int32_t> eos_token_ids;  // those in force
};

// Greedy search and sampling, for num_beams = 1.
std::vector<GeneratedSequence> continue_prompts(const Session& session);
// Beam search and beam sampling, for num_beams > 1.
std::vector<GeneratedSequence> search_beams(const Session& session);

}  // namespace deltafox::infer
