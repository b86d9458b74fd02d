#include "infer/session.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/error.h"
#include "ops/choose_token.h"

namespace deltafox::infer {

namespace {

std::vector<std::int32_t> checked_eos_token_ids(const Model& model,
                                                const GenerationConfig& config) {
  std::vector<std::int32_t> ids = config.eos_token_id.value_or(model.info().eos_token_ids);
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= model.info().vocab_size) {
      fail("eos_token_id: must be in [0, {}), got {}", model.info().vocab_size, id);
    }
  }
  return ids;
}

// Filters compare logits, and a NaN has no place in an order.
void require_numbers(std::span<const float> logits) {
  const bool numbers = std::all_of(logits.begin(), logits.end(), [](float logit) {
    return logit <= std::numeric_limits<float>::max();
  });
  if (!numbers) fail(ChosenToken::kNotNumbersMessage);
}

}  // namespace

Session::Session(const Model& model_in, std::span<const std::vector<std::int32_t>> prompts_in,
                 const GenerationConfig& config_in, const GenerateOptions& options_in)
    : model(model_in),
      prompts(prompts_in),
      config(config_in),
      options(options_in),
      vocab_size(static_cast<std::size_t>(model_in.info().vocab_size)),
      eos_token_ids(checked_eos_token_ids(model_in, config_in)) {
  if (!config.stop_strings.empty() && options.tokenizer == nullptr) {
    fail("stop_strings: need a tokenizer");
  }
  if (config.num_beams > 1 && options.on_token) {
    fail("num_beams: must be 1 to receive tokens as they come, got {}", config.num_beams);
  }
  if (config.num_beams > 1 && (!options.initial_states.empty() || options.return_states)) {
    fail("num_beams: must be 1 to start from states or to return them, got {}", config.num_beams);
  }
  if (!options.initial_states.empty() && options.initial_states.size() != prompts.size()) {
    fail("initial_states: {} states for {} prompts", options.initial_states.size(), prompts.size());
  }
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    if (prompts[p].empty()) {
      fail("prompt {} is empty: it needs at least one token, such as the BOS token", p);
    }
    for (std::size_t t = 0; t < prompts[p].size(); ++t) {
      const std::int32_t id = prompts[p][t];
      if (id >= 0 && std::cmp_less(id, vocab_size)) continue;
      fail("prompt {}: id {} at position {} must be in [0, {})", p, id, t, vocab_size);
    }
    if (max_new_tokens(p) < 1) {
      fail("max_length: must be more than the {} tokens of prompt {}, got {}", prompts[p].size(), p,
           *config.max_length);
    }
  }
}

std::int64_t Session::max_new_tokens(std::size_t prompt) const {
  constexpr std::int64_t kDefault = 20;
  if (config.max_new_tokens) return *config.max_new_tokens;
  if (!config.max_length) return kDefault;
  return *config.max_length - static_cast<std::int64_t>(prompts[prompt].size());
}

bool Session::ends_sequence(std::int32_t id) const {
  return std::find(eos_token_ids.begin(), eos_token_ids.end(), id) != eos_token_ids.end();
}

std::uint32_t Session::prompt_index(std::size_t prompt) const {
  return options.first_prompt_index + static_cast<std::uint32_t>(prompt);
}

GeneratedSequence Session::new_sequence(std::size_t prompt) const {
  GeneratedSequence sequence;
  sequence.prompt = static_cast<std::int64_t>(prompt);
  sequence.ids = prompts[prompt];
  sequence.num_prompt_ids = static_cast<std::int64_t>(prompts[prompt].size());
  return sequence;
}

std::optional<TextStream> Session::text_stream(std::size_t prompt) const {
  if (options.tokenizer == nullptr) return std::nullopt;
  std::string before;  // a stop string may begin in the prompt
  if (!config.stop_strings.empty()) {
    before = options.tokenizer->decode(prompts[prompt], options.skip_special_tokens);
  }
  return TextStream(*options.tokenizer, options.skip_special_tokens,
                    StopMatcher(config.stop_strings, options.keep_stop_string, before));
}

std::vector<State> Session::prefill(std::vector<float>& logits) const {
  std::vector<std::int32_t> ids;
  std::vector<std::int64_t> cu_seqlens{0};
  for (const auto& prompt : prompts) {
    ids.insert(ids.end(), prompt.begin(), prompt.end());
    cu_seqlens.push_back(static_cast<std::int64_t>(ids.size()));
  }
  std::vector<State> states;
  std::vector<State*> pointers;
  states.reserve(prompts.size());
  pointers.reserve(prompts.size());
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    // Each on its own: a conditional expression would be a const State, to be copied.
    if (options.initial_states.empty()) {
      states.push_back(model.new_state());
    } else {
      states.push_back(options.initial_states[p]);
    }
  }
  for (State& state : states) pointers.push_back(&state);
  logits.resize(prompts.size() * vocab_size);
  model.forward({ids, cu_seqlens}, pointers, logits);
  require_numbers(logits);
  return states;
}

void Session::step(std::span<const std::int32_t> ids, std::span<State* const> states,
                   std::vector<float>& logits) const {
  logits.resize(ids.size() * vocab_size);
  model.step(ids, states, logits);
  require_numbers(logits);
}

}  // namespace deltafox::infer
