#include "deltafox/generate.h"

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

}  // namespace deltafox
