#include "deltafox/generate.h"

#include <algorithm>

#include "infer/session.h"

namespace deltafox {

std::string_view name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kEos:
      return "eos";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStopString:
      return "stop_string";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "?";
}

std::vector<GeneratedSequence> generate(const Model& model,
                                        std::span<const std::vector<std::int32_t>> prompts,
                                        const GenerationConfig& config,
                                        const GenerateOptions& options) {
  config.validate();
  const infer::Session session(model, prompts, config, options);
  if (prompts.empty()) return {};
  return config.num_beams > 1 ? infer::search_beams(session) : infer::continue_prompts(session);
}

std::int32_t pad_token_id(const Model& model, const GenerationConfig& config) {
  if (config.pad_token_id) return *config.pad_token_id;
  if (model.info().pad_token_id) return *model.info().pad_token_id;
  const auto ends = config.eos_token_id.value_or(model.info().eos_token_ids);
  return ends.empty() ? 0 : ends.front();
}

std::vector<std::vector<std::int32_t>> padded_ids(std::span<const GeneratedSequence> sequences,
                                                  std::int32_t pad_token_id) {
  std::size_t longest = 0;
  for (const GeneratedSequence& sequence : sequences) {
    longest = std::max(longest, sequence.ids.size());
  }
  std::vector<std::vector<std::int32_t>> rows;
  rows.reserve(sequences.size());
  for (const GeneratedSequence& sequence : sequences) {
    rows.push_back(sequence.ids);
    rows.back().resize(longest, pad_token_id);
  }
  return rows;
}

}  // namespace deltafox
