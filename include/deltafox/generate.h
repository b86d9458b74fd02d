// Continuing prompts: greedy, sampling, beam search and beam sampling, with the semantics and the
// option names of Hugging Face transformers' `generate` (5.17).
//
// What a prompt gets depends on the prompt, the options, the seed and its index alone: not on the
// other prompts of the call, nor on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "deltafox/model.h"
#include "deltafox/tokenizer.h"

namespace deltafox {

// When a beam search with as many finished sequences as beams stops: kTrue at once, kFalse when the
// best running beam could not beat the worst finished one if it ended now, kNever when it could not
// do so at any length that max_new_tokens allows.
enum class EarlyStopping : std::uint8_t { kFalse, kTrue, kNever };

// Names, defaults and meanings are those of transformers' GenerationConfig; the ones that only
// sampling uses (temperature ... eta_cutoff) are ignored without do_sample, those of beam search
// (early_stopping, length_penalty) with one beam.
struct GenerationConfig {
  std::optional<std::int64_t> max_new_tokens;  // >= 1; unset: up to max_length, else 20
  std::optional<std::int64_t> max_length;      // prompt included; max_new_tokens goes first
  std::int64_t min_new_tokens = 0;             // no end-of-sequence token before so many
  std::int64_t min_length = 0;                 // the same, prompt included

  bool do_sample = false;
  double temperature = 1.0;         // > 0
  std::int64_t top_k = 50;          // >= 0; 0: off
  double top_p = 1.0;               // [0, 1]; 1: off
  std::optional<double> min_p;      // [0, 1]
  double typical_p = 1.0;           // (0, 1]; 1: off
  double epsilon_cutoff = 0.0;      // [0, 1); 0: off
  double eta_cutoff = 0.0;          // [0, 1); 0: off
  bool renormalize_logits = false;  // log-softmax after all processors

  double repetition_penalty = 1.0;        // > 0; 1: off
  std::int64_t no_repeat_ngram_size = 0;  // >= 0; 0: off

  std::int64_t num_beams = 1;   // 1 ... 1024; 1: no beam search
  double length_penalty = 1.0;  // scores are divided by length^length_penalty
  EarlyStopping early_stopping = EarlyStopping::kFalse;
  std::int64_t num_return_sequences = 1;  // 1 ... 4096; at most num_beams; 1 for greedy search

  // Unset: what the model's files say. An empty list: none, so that only the length ends a
  // sequence.
  std::optional<std::vector<std::int32_t>> eos_token_id;
  std::optional<std::int32_t> pad_token_id;  // for padded_ids()
  std::vector<std::string> stop_strings;     // not empty ones; need a tokenizer

  // Not of transformers: the seed of every draw, and whether to compute log-probabilities.
  std::uint64_t seed = 0;
  bool output_logprobs = false;

  // The options in the text of a generation_config.json; unset and null ones keep their defaults,
  // unknown ones are ignored. `source` names the text in errors. Throws Error that names the key of
  // a value of the wrong type. Ranges are left to validate().
  static GenerationConfig from_json(std::string_view text, const std::string& source);
  // Reads DIRECTORY/generation_config.json; the defaults where there is none.
  static GenerationConfig load(const std::string& directory);

  // Throws Error that names the option, what is allowed and what it got.
  void validate() const;
};

enum class FinishReason : std::uint8_t { kEos, kLength, kStopString, kCancelled };

// "eos", "length", "stop_string", "cancelled".
std::string_view name_of(FinishReason reason);

struct TokenEvent {
  std::int64_t sequence = 0;  // index of the sequence in what generate() returns
  std::int32_t id = 0;
  // Text that became certain with this token; empty without a tokenizer. Pieces end neither inside
  // a character nor inside what may become a stop string, which is held back until it is one or is
  // not. The pieces of a sequence together are GeneratedSequence::text, unless the sequence is
  // cancelled: then what was held back appears in the latter only.
  std::string_view text;
  float logprob = std::numeric_limits<float>::quiet_NaN();  // with output_logprobs
  std::optional<FinishReason> finish_reason;                // set in the sequence's last event
};

struct GenerateOptions {
  // For the text and for stop strings; may be null without the latter. Used during the call only.
  const Tokenizer* tokenizer = nullptr;
  bool skip_special_tokens = true;  // in texts
  // True: as in transformers, a sequence that a stop string ended keeps it, and the rest of the
  // token that completed it. False: the text (not the ids) ends before the stop string.
  bool keep_stop_string = true;
  // The first prompt's index, which the draws depend on: a list of prompts continued in several
  // calls gets the same texts as in one.
  std::uint32_t first_prompt_index = 0;

  // Where the prompts continue from: nothing, or a state of this model for each prompt, which is
  // copied. What such a state has read counts neither for penalties nor for lengths. Not for beam
  // search.
  std::span<const State> initial_states;
  // Whether to fill GeneratedSequence::state. Not for beam search.
  bool return_states = false;

  // Called with each new token, in step order, from the calling thread. Returning false cancels
  // this sequence. Not for beam search, whose tokens are not final before the end.
  std::function<bool(const TokenEvent&)> on_token;
  // Asked before every step of the model; true cancels every sequence that is still running.
  std::function<bool()> should_stop;
};

struct GeneratedSequence {
  std::int64_t prompt = 0;  // index of its prompt
  std::vector<std::int32_t>
      ids;  // the prompt and what continues it, the end-of-sequence id included
  std::int64_t num_prompt_ids = 0;  // how many of them are the prompt
  FinishReason finish_reason = FinishReason::kLength;
  std::string text;         // of the new ids; empty without a tokenizer
  std::string stop_string;  // the one that ended it

  // With output_logprobs, one for each new id: the logarithm of its probability after all
  // processors (as compute_transition_scores(normalize_logits=True)) and as the model gave it.
  std::vector<float> logprobs;
  std::vector<float> model_logprobs;
  // Beam search only, transformers' sequences_scores: the sum of the processed log-probabilities
  // (not normalised again after the processors), divided by length^length_penalty.
  std::optional<float> score;

  // With return_states: what the model remembers once it has read all of ids, the last one too.
  std::optional<State> state;

  std::span<const std::int32_t> new_ids() const {
    return std::span(ids).subspan(static_cast<std::size_t>(num_prompt_ids));
  }
};

// Continues every prompt num_return_sequences times: sequence p·num_return_sequences + r is
// continuation r of prompt p, best first in beam search. (Beam search returns fewer where so few
// sequences are possible.) Throws Error for an option out of range, an empty prompt, an id outside
// the vocabulary, and logits that leave no token to choose.
//
// A draw takes the uniform number u in [0, 1) made of the first two words of Philox4x32-10 with the
// key (seed low, seed high) and the counter (step, draw, r, prompt index): u = floor((w0·2^32 +
// w1) / 2^11) / 2^53. With the integers w_i nearest to 2^40·exp(logit_i - max logit), it chooses
// the first id i, in index order, whose running sum w_0 + ... + w_i exceeds u·Σw. `draw` is 0,
// except in beam sampling: there r is 0 and draws 0, 1, ... choose among all (beam, id) pairs,
// without replacement. A GPU draws what the CPU would from the same logits.
std::vector<GeneratedSequence> generate(const Model& model,
                                        std::span<const std::vector<std::int32_t>> prompts,
                                        const GenerationConfig& config,
                                        const GenerateOptions& options = {});

// What fills rows up: the configuration's pad token, else the model's, else the first
// end-of-sequence id in force, else 0.
std::int32_t pad_token_id(const Model& model, const GenerationConfig& config);

// The ids of all sequences as rows of one length, filled at the end.
std::vector<std::vector<std::int32_t>> padded_ids(std::span<const GeneratedSequence> sequences,
                                                  std::int32_t pad_token_id);

}  // namespace deltafox
