// Beam search over the model: every step reads one token for each running beam of all prompts, then
// each prompt's search decides which beams go on and the states follow them.
#include <algorithm>
#include <utility>

#include "infer/beam_search.h"
#include "infer/sampler.h"
#include "infer/session.h"

namespace deltafox::infer {

namespace {

struct PromptSearch {
  BeamSearch beams;
  std::vector<State> states;  // of the running beams
};

// The states of beams that continue those which `states` belong to. The last child of a beam takes
// its state over, the others get copies.
std::vector<State> inherit(std::vector<State> states, const std::vector<Beam>& beams) {
  std::vector<std::size_t> children(states.size(), 0);
  for (const Beam& beam : beams) ++children[beam.parent];
  std::vector<State> next;
  next.reserve(beams.size());
  for (const Beam& beam : beams) {
    State& parent = states[beam.parent];
    if (--children[beam.parent] == 0) {
      next.push_back(std::move(parent));
    } else {
      next.push_back(parent);
    }
  }
  return next;
}

class Searches {
 public:
  explicit Searches(const Session& session)
      : session_(session), processors_(session.config, session.eos_token_ids, session.vocab_size) {}

  std::vector<GeneratedSequence> run();

 private:
  void start(std::vector<float>& logits);
  bool step(std::vector<float>& logits);
  void advance(PromptSearch& search, std::span<float> logits);
  GeneratedSequence finished(std::size_t prompt, const Beam& beam) const;

  const Session& session_;
  ProcessorChain processors_;
  std::vector<PromptSearch> searches_;  // one for each prompt
  std::vector<float> model_logprobs_;   // [running, N] of one prompt, with output_logprobs
};

// Takes the logits [running, N] of the search's next tokens, which are overwritten.
void Searches::advance(PromptSearch& search, std::span<float> logits) {
  const auto row = [&](std::size_t b) {
    return logits.subspan(b * session_.vocab_size, session_.vocab_size);
  };
  const std::vector<Beam>& running = search.beams.running();
  for (std::size_t b = 0; b < running.size(); ++b) log_softmax(row(b));
  if (session_.config.output_logprobs) model_logprobs_.assign(logits.begin(), logits.end());
  for (std::size_t b = 0; b < running.size(); ++b) {
    processors_.apply(row(b), running[b].ids, search.beams.prompt_size());
  }
  search.beams.advance(logits, model_logprobs_);
  if (search.beams.done()) {
    search.states.clear();
  } else {
    search.states = inherit(std::move(search.states), search.beams.running());
  }
}

void Searches::start(std::vector<float>& logits) {
  std::vector<State> states = session_.prefill(logits);
  for (std::size_t p = 0; p < states.size(); ++p) {
    std::optional<TextStream> text;
    if (!session_.config.stop_strings.empty()) text = session_.text_stream(p);
    PromptSearch& search = searches_.emplace_back(
        PromptSearch{BeamSearch(session_.config, session_.eos_token_ids, session_.max_new_tokens(p),
                                session_.prompt_index(p), session_.prompts[p], std::move(text)),
                     {}});
    search.states.push_back(std::move(states[p]));
    advance(search, std::span(logits).subspan(p * session_.vocab_size, session_.vocab_size));
  }
}

// One step of all searches; false if none is left to do or the caller wants to stop.
bool Searches::step(std::vector<float>& logits) {
  std::vector<std::int32_t> ids;
  std::vector<State*> states;
  for (PromptSearch& search : searches_) {
    if (search.beams.done()) continue;
    for (const Beam& beam : search.beams.running()) ids.push_back(beam.ids.back());
    for (State& state : search.states) states.push_back(&state);
  }
  if (ids.empty() || session_.should_stop()) return false;
  session_.step(ids, states, logits);
  auto rest = std::span(logits);
  for (PromptSearch& search : searches_) {
    if (search.beams.done()) continue;
    const std::size_t size = search.beams.running().size() * session_.vocab_size;
    advance(search, rest.first(size));
    rest = rest.subspan(size);
  }
  return true;
}

GeneratedSequence Searches::finished(std::size_t prompt, const Beam& beam) const {
  GeneratedSequence result = session_.new_sequence(prompt);
  result.ids = beam.ids;
  result.finish_reason = *beam.finish_reason;
  result.logprobs = beam.logprobs;
  result.model_logprobs = beam.model_logprobs;
  result.score = beam.score;
  if (std::optional<TextStream> text = session_.text_stream(prompt)) {
    for (const std::int32_t id : result.new_ids()) result.text += text->push(id);
    result.stop_string = text->stop_string();
    result.text += text->finish();
  }
  return result;
}

std::vector<GeneratedSequence> Searches::run() {
  std::vector<float> logits;
  start(logits);
  while (step(logits)) {
  }
  std::vector<GeneratedSequence> results;
  for (std::size_t p = 0; p < searches_.size(); ++p) {
    for (const Beam& beam : searches_[p].beams.results()) results.push_back(finished(p, beam));
  }
  return results;
}

}  // namespace

std::vector<GeneratedSequence> search_beams(const Session& session) {
  return Searches(session).run();
}

}  // namespace deltafox::infer
