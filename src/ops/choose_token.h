// The next token of each of B sequences, chosen from their logits where these are: on a GPU. The
// options are those of GenerationConfig (deltafox/generate.h) for one beam, and the token is the
// one that the CPU would choose from the same logits (infer/processors.h, infer/sampler.h), to the
// bit.
//
// The sequences' ids so far are kept on the GPU too, as far as an option asks for them, and go on
// with each call; the host sees what was chosen in memory that it shares.
#pragma once

#include "core/context.h"
#include "ops/token_weights.h"

namespace deltafox {

struct TokenOptions {
  bool do_sample = false;
  std::uint64_t seed = 0;
  // Before the choice; for all.
  float repetition_penalty = 1;
  std::int32_t no_repeat_ngram_size = 0;
  std::int32_t min_length = 0;
  std::int32_t min_new_tokens = 0;
  bool renormalize = false;
  // For sampling only.
  float temperature = 1;
  std::int32_t top_k = 0;
  double top_p = 1;
  double log_min_p = -std::numeric_limits<double>::infinity();
  double typical_p = 1;
  double epsilon_cutoff = 0;
  double eta_cutoff = 0;

  bool logprobs = false;

  bool filters() const {
    return top_p < 1 || log_min_p > -std::numeric_limits<double>::infinity() || typical_p < 1 ||
           epsilon_cutoff > 0 || eta_cutoff > 0;
  }
  // Whether logits change before a token is chosen, other than by top_k.
  bool changes_logits() const {
    return repetition_penalty != 1 || no_repeat_ngram_size > 0 || min_length > 0 ||
           min_new_tokens > 0 || renormalize || (do_sample && (temperature != 1 || filters()));
  }
  bool is_argmax() const { return !do_sample && !changes_logits() && !logprobs; }
};

// In the GPU's memory; each call makes it go on by a token.
struct TokenSequence {
  std::int32_t length = 0;      // ids so far
  std::int32_t new_tokens = 0;  // of them behind the prompt
  std::uint32_t prompt = 0;     // of the key of draws, as `sequence`
  std::uint32_t sequence = 0;
  std::int32_t calls = 0;
};

struct ChosenToken {
  static constexpr std::int32_t kPending = -1;     // not chosen yet
  static constexpr std::int32_t kNoneLeft = -2;    // all tokens were removed
  static constexpr std::int32_t kNotNumbers = -3;  // the logits hold NaN or infinity

  // What to say where there is none, on any device.
  static constexpr const char* kNoneLeftMessage =
      "no token is left to choose: the options (no_repeat_ngram_size, min_new_tokens) ban every "
      "one";
  static constexpr const char* kNotNumbersMessage =
      "the model's logits hold NaN or infinity: its weights may be damaged";

  std::int32_t id = kPending;
  float logprob = 0;        // with `logprobs`, after all options
  float model_logprob = 0;  // as the model gave it
};

struct ChooseTokenArgs {
  ConstTensorView logits;  // [B, N'] F32, N' >= N
  std::int64_t classes;    // N
  TokenOptions options;
  TensorView sequences;           // [B · sizeof(TokenSequence)] U8
  ConstTensorView eos_ids = {};   // [·] I32, with min_length or min_new_tokens
  TensorView seen = {};           // [B, ⌈N / 32⌉] I32 bits, with repetition_penalty
  TensorView history = {};        // [B, L] I32, with no_repeat_ngram_size
  TensorView ids;                 // [B] I32: what was chosen, 0 where nothing could be
  ChosenToken* chosen = nullptr;  // [slots, B] of cuda::allocate_shared: slot `calls` modulo slots
  std::int64_t slots = 0;
  TensorView counter = {};  // [1] I32, += 1 if it has data
};

namespace ops {
void choose_token(Context& ctx, const ChooseTokenArgs& args);
}
namespace cuda {
void choose_token(Context& ctx, const ChooseTokenArgs& args);
}
}  // namespace deltafox
