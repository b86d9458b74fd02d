// Greedy search and sampling: every step of the model reads one token for each sequence still
// running. On a GPU the tokens behind the first are chosen there.
#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "infer/sampler.h"
#include "infer/session.h"
#include "model/decoder.h"

namespace deltafox::infer {

namespace {

struct Continuation {
  std::size_t index = 0;  // in what is returned
  GeneratedSequence result;
  State state;
  std::optional<TextStream> text;
  bool running = true;
};

std::int32_t clamped(std::int64_t value) {
  return static_cast<std::int32_t>(
      std::min<std::int64_t>(value, std::numeric_limits<std::int32_t>::max()));
}

TokenOptions token_options(const GenerationConfig& config) {
  return {.do_sample = config.do_sample,
          .seed = config.seed,
          .repetition_penalty = static_cast<float>(config.repetition_penalty),
          .no_repeat_ngram_size = clamped(config.no_repeat_ngram_size),
          .min_length = clamped(config.min_length),
          .min_new_tokens = clamped(config.min_new_tokens),
          .renormalize = config.renormalize_logits,
          .temperature = static_cast<float>(config.temperature),
          .top_k = clamped(config.top_k),
          .top_p = config.top_p,
          .log_min_p = exact_log(config.min_p.value_or(0)),
          .typical_p = config.typical_p,
          .epsilon_cutoff = config.epsilon_cutoff,
          .eta_cutoff = config.eta_cutoff,
          .logprobs = config.output_logprobs};
}

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
  bool decode(Decoder& decoder, std::span<Continuation* const> running);
  std::int64_t tokens_left(const Continuation& sequence) const;
  ChosenToken choose(const Continuation& sequence, std::span<float> logits);
  void extend(Continuation& sequence, const ChosenToken& chosen);
  void cancel(std::span<Continuation* const> running);
  std::optional<FinishReason> finish_reason(const Continuation& sequence) const;
  std::string finish(Continuation& sequence, FinishReason reason);

  const Session& session_;
  std::size_t per_prompt_;
  ProcessorChain processors_;
  std::vector<Continuation> sequences_;
  std::vector<float> model_logits_;     // [N] a row before the processors, with output_logprobs
  std::vector<std::uint64_t> weights_;  // scratch of sample()
};

// The token that `logits` lead to, which the processors overwrite.
ChosenToken Continuations::choose(const Continuation& sequence, std::span<float> logits) {
  const GeneratedSequence& result = sequence.result;
  const auto prompt_size = static_cast<std::size_t>(result.num_prompt_ids);
  const bool with_logprobs = session_.config.output_logprobs;
  if (with_logprobs) model_logits_.assign(logits.begin(), logits.end());
  processors_.apply(logits, result.ids, prompt_size);
  const auto chosen = [&](std::int32_t id) {
    if (!with_logprobs) return ChosenToken{.id = id};
    return ChosenToken{.id = id,
                       .logprob = log_probability(logits, id),
                       .model_logprob = log_probability(model_logits_, id)};
  };
  if (!session_.config.do_sample) return chosen(argmax(logits));
  const DrawKey key{.seed = session_.config.seed,
                    .prompt = session_.prompt_index(static_cast<std::size_t>(result.prompt)),
                    .sequence = static_cast<std::uint32_t>(sequence.index % per_prompt_),
                    .step = static_cast<std::uint32_t>(result.ids.size() - prompt_size)};
  return chosen(sample(logits, uniform(key), weights_));
}

std::int64_t Continuations::tokens_left(const Continuation& sequence) const {
  return session_.max_new_tokens(static_cast<std::size_t>(sequence.result.prompt)) -
         std::ssize(sequence.result.new_ids());
}

std::optional<FinishReason> Continuations::finish_reason(const Continuation& sequence) const {
  const GeneratedSequence& result = sequence.result;
  if (session_.ends_sequence(result.ids.back())) return FinishReason::kEos;
  if (sequence.text && !sequence.text->stop_string().empty()) return FinishReason::kStopString;
  if (tokens_left(sequence) == 0) return FinishReason::kLength;
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

void Continuations::extend(Continuation& sequence, const ChosenToken& chosen) {
  GeneratedSequence& result = sequence.result;
  const bool with_logprobs = session_.config.output_logprobs;
  result.ids.push_back(chosen.id);
  if (with_logprobs) {
    result.logprobs.push_back(chosen.logprob);
    result.model_logprobs.push_back(chosen.model_logprob);
  }
  std::string piece = sequence.text ? sequence.text->push(chosen.id) : std::string();
  const std::optional<FinishReason> reason = finish_reason(sequence);
  if (reason) piece += finish(sequence, *reason);
  result.text += piece;

  if (!session_.options.on_token) return;
  TokenEvent event;
  event.sequence = static_cast<std::int64_t>(sequence.index);
  event.id = chosen.id;
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
    extend(sequence, choose(sequence, row));
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
    const auto row = std::span(logits).subspan(i * session_.vocab_size, session_.vocab_size);
    extend(*running[i], choose(*running[i], row));
  }
}

// Until one of the sequences ends; false if the caller wants to stop. A step is launched before the
// tokens of the one before are looked at, unless states are wanted as the last token left them.
bool Continuations::decode(Decoder& decoder, std::span<Continuation* const> running) {
  std::vector<Decoder::Sequence> sequences;
  std::int64_t steps = std::numeric_limits<std::int64_t>::max();
  for (Continuation* sequence : running) {
    const GeneratedSequence& result = sequence->result;
    steps = std::min(steps, tokens_left(*sequence));
    sequences.push_back({.state = &contents_of(sequence->state),
                         .ids = result.ids,
                         .prompt_size = result.num_prompt_ids,
                         .prompt = session_.prompt_index(static_cast<std::size_t>(result.prompt)),
                         .sequence = static_cast<std::uint32_t>(sequence->index % per_prompt_)});
  }
  const std::int64_t ahead = session_.options.return_states ? 1 : 2;
  decoder.start(sequences, steps);
  bool all_run = true;
  for (std::int64_t launched = 0; all_run || decoder.under_way() > 0;) {
    if (session_.should_stop()) return false;
    for (; all_run && launched < steps && decoder.under_way() < ahead; ++launched) decoder.launch();
    const std::span<const ChosenToken> chosen = decoder.take();
    for (std::size_t i = 0; i < running.size(); ++i) {
      if (!running[i]->running) continue;
      extend(*running[i], chosen[i]);
      all_run = all_run && running[i]->running;
    }
  }
  return true;
}

void Continuations::cancel(std::span<Continuation* const> running) {
  for (Continuation* sequence : running) {
    if (sequence->running) sequence->result.text += finish(*sequence, FinishReason::kCancelled);
  }
}

std::vector<GeneratedSequence> Continuations::run() {
  std::vector<float> logits;
  start(logits);
  std::vector<Continuation*> running;
  for (Continuation& sequence : sequences_) running.push_back(&sequence);
  const std::unique_ptr<Decoder> decoder =
      session_.model.decoder(token_options(session_.config), session_.eos_token_ids);
  while (true) {
    std::erase_if(running, [](const Continuation* sequence) { return !sequence->running; });
    if (running.empty()) break;
    if (decoder != nullptr) {
      if (!decode(*decoder, running)) cancel(running);
    } else if (session_.should_stop()) {
      cancel(running);
    } else {
      step(running, logits);
    }
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
