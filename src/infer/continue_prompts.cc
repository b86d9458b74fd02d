// Greedy search and sampling: every step of the model reads one token for each sequence still
// running.
#include <algorithm>
#include <array>
#include <utility>

#include "infer/sampler.h"
#include "infer/session.h"

namespace deltafox::infer {

namespace {

struct Continuation {
  std::size_t index = 0;  // in what is returned
  GeneratedSequence result;
  State state;
  std::optional<TextStream> text;
  bool running = true;
};

class Continuations {
 public:
  explicit Continuations(const Session& session)
      : session_(session),
        per_prompt_(static_cast<std::size_t>(session.config.num_return_sequences)),
        processors_(session.config, session.eos_token_ids, session.vocab_size) {}

  std::vector<GeneratedSequence> run();

 private:
  void start(std::vector<float>& logits);
  void step(std::span<Continuation* const> running, std::vector<float>& logits);
  void extend(Continuation& sequence, std::span<float> logits);
  std::int32_t choose(const Continuation& sequence, std::span<float> logits);
  std::optional<FinishReason> finish_reason(const Continuation& sequence) const;
  std::string finish(Continuation& sequence, FinishReason reason);

  const Session& session_;
  std::size_t per_prompt_;
  ProcessorChain processors_;
  std::vector<Continuation> sequences_;
  std::vector<float> model_logits_;  // [N] a row before the processors, with output_logprobs
  std::vector<std::uint64_t> weights_;  // scratch of sample()
};

std::int32_t Continuations::choose(const Continuation& sequence, std::span<float> logits) {
  const GeneratedSequence& result = sequence.result;
  const auto prompt_size = static_cast<std::size_t>(result.num_prompt_ids);
  processors_.apply(logits, result.ids, prompt_size);
  if (!session_.config.do_sample) return argmax(logits);
  const DrawKey key{.seed = session_.config.seed,
                    .prompt = session_.prompt_index(static_cast<std::size_t>(result.prompt)),
                    .sequence = static_cast<std::uint32_t>(sequence.index % per_prompt_),
                    .step = static_cast<std::uint32_t>(result.ids.size() - prompt_size)};
  return sample(logits, uniform(key), weights_);
}

std::optional<FinishReason> Continuations::finish_reason(const Continuation& sequence) const {
  const GeneratedSequence& result = sequence.result;
  if (session_.ends_sequence(result.ids.back())) return FinishReason::kEos;
  if (sequence.text && !sequence.text->stop_string().empty()) return FinishReason::kStopString;
  const auto prompt = static_cast<std::size_t>(result.prompt);
  if (std::ssize(result.new_ids()) == session_.max_new_tokens(prompt)) return FinishReason::kLength;
  return std::nullopt;
}

// Ends the sequence and returns the text that was still held back.
std::string Continuations::finish(Continuation& sequence, FinishReason reason) {
  sequence.running = false;
  if (session_.options.return_states) {
    State* const state = &sequence.state;
    constexpr std::array<std::int64_t, 2> kOneToken{0, 1};
    session_.model.forward({std::span(sequence.result.ids).last(1), kOneToken},
                           std::span(&state, 1), {});
    sequence.result.state = std::move(sequence.state);
  }
  sequence.state = State();  // its memory is worth having back
  sequence.result.finish_reason = reason;
  if (!sequence.text) return {};
  sequence.result.stop_string = sequence.text->stop_string();
  return sequence.text->finish();
}

// Adds the token that `logits` lead to, which the processors overwrite.
void Continuations::extend(Continuation& sequence, std::span<float> logits) {
  GeneratedSequence& result = sequence.result;
  const bool with_logprobs = session_.config.output_logprobs;
  if (with_logprobs) model_logits_.assign(logits.begin(), logits.end());
  const std::int32_t id = choose(sequence, logits);
  result.ids.push_back(id);
  if (with_logprobs) {
    result.logprobs.push_back(log_probability(logits, id));
    result.model_logprobs.push_back(log_probability(model_logits_, id));
  }
  std::string piece = sequence.text ? sequence.text->push(id) : std::string();
  const std::optional<FinishReason> reason = finish_reason(sequence);
  if (reason) piece += finish(sequence, *reason);
  result.text += piece;

  if (!session_.options.on_token) return;
  TokenEvent event;
  event.sequence = static_cast<std::int64_t>(sequence.index);
  event.id = id;
  event.text = piece;
  if (with_logprobs) event.logprob = result.logprobs.back();
  event.finish_reason = reason;
  if (!session_.options.on_token(event) && !reason) {
    result.text += finish(sequence, FinishReason::kCancelled);
  }
}

// Reads the prompts and gives every sequence its first token.
void Continuations::start(std::vector<float>& logits) {
  std::vector<State> states = session_.prefill(logits);
  sequences_.resize(states.size() * per_prompt_);
  std::vector<float> row;
  for (std::size_t s = 0; s < sequences_.size(); ++s) {
    const std::size_t prompt = s / per_prompt_;
    Continuation& sequence = sequences_[s];
    sequence.index = s;
    sequence.result = session_.new_sequence(prompt);
    sequence.text = session_.text_stream(prompt);
    const bool last_of_prompt = (s + 1) % per_prompt_ == 0;
    sequence.state = last_of_prompt ? std::move(states[prompt]) : states[prompt];
    const auto prompt_row =
        std::span(logits).subspan(prompt * session_.vocab_size, session_.vocab_size);
    row.assign(prompt_row.begin(), prompt_row.end());
    extend(sequence, row);
  }
}

void Continuations::step(std::span<Continuation* const> running, std::vector<float>& logits) {
  std::vector<std::int32_t> ids;
  std::vector<State*> states;
  for (Continuation* sequence : running) {
    ids.push_back(sequence->result.ids.back());
    states.push_back(&sequence->state);
  }
  session_.step(ids, states, logits);
  for (std::size_t i = 0; i < running.size(); ++i) {
    extend(*running[i], std::span(logits).subspan(i * session_.vocab_size, session_.vocab_size));
  }
}

std::vector<GeneratedSequence> Continuations::run() {
  std::vector<float> logits;
  start(logits);
  std::vector<Continuation*> running;
  for (Continuation& sequence : sequences_) running.push_back(&sequence);
  while (true) {
    std::erase_if(running, [](const Continuation* sequence) { return !sequence->running; });
    if (running.empty()) break;
    if (session_.should_stop()) {
      for (Continuation* sequence : running) {
        sequence->result.text += finish(*sequence, FinishReason::kCancelled);
      }
      break;
    }
    step(running, logits);
  }
  std::vector<GeneratedSequence> results;
  for (Continuation& sequence : sequences_) results.push_back(std::move(sequence.result));
  return results;
}

}  // namespace

std::vector<GeneratedSequence> continue_prompts(const Session& session) {
  return Continuations(session).run();
}

}  // namespace deltafox::infer
