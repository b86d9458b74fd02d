// Decoding on a GPU with the tokens chosen there (ops/choose_token.h): a step reads the tokens that
// the one before chose, and the host sees them a moment later, in memory that it shares. Steps are
// recorded as a graph, one for each batch; nothing waits for the host or allocates between them.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/context.h"
#include "deltafox/model.h"
#include "model/causal_lm.h"
#include "ops/choose_token.h"

namespace deltafox {

// A state's contents.
SequenceState& contents_of(State& state);

class Decoder {
 public:
  // Steps that may be under way at a time.
  static constexpr std::int64_t kMostUnderWay = 7;

  struct Sequence {
    SequenceState* state = nullptr;
    std::span<const std::int32_t> ids;  // so far; the state has read all but the last
    std::int64_t prompt_size = 0;       // of them
    std::uint32_t prompt = 0;           // of the key of draws, as `sequence`
    std::uint32_t sequence = 0;
  };

  // `lm` must outlive it; `ctx` is its own.
  Decoder(std::shared_ptr<Context> ctx, const CausalLM& lm, const TokenOptions& options,
          std::span<const std::int32_t> eos_ids);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // The sequences that go on, for at most `steps` steps; their states must stay where they are.
  // Nothing may be under way.
  void start(std::span<const Sequence> sequences, std::int64_t steps);
  // One more step for all of them. States count it at once.
  void launch();
  std::int64_t under_way() const { return launched_ - taken_; }
  // What the oldest step under way chose [B]; valid until the next call. Throws Error where no
  // token could be chosen.
  std::span<const ChosenToken> take();

 private:
  std::int64_t count() const { return static_cast<std::int64_t>(states_.size()); }
  static void upload(Tensor& to, DType dtype, const Shape& shape, const void* from);
  void upload_ids(std::span<const Sequence> sequences, std::int64_t steps);
  void reserve();
  void step();
  void record();

  std::shared_ptr<Context> ctx_;
  const CausalLM& lm_;
  TokenOptions options_;
  Tensor eos_ids_;  // [·]

  std::vector<SequenceState*> states_;    // [B]
  std::vector<std::int64_t> cu_seqlens_;  // [B+1]
  std::int64_t steps_left_ = 0;           // of start's
  Tensor ids_;                            // [B] what the next step reads
  Tensor sequences_;                      // [B] of TokenSequence
  Tensor seen_;                           // [B, ⌈N / 32⌉]
  Tensor history_;                        // [B, L]
  Tensor runs_;                           // [1] of the recorded step
  std::shared_ptr<cuda::Graph> graph_;
  std::int64_t recorded_left_ = 0;  // runs that the recording has room for
  bool warm_ = false;               // whether a step with these shapes has run

  std::shared_ptr<void> memory_;   // of chosen_
  std::int64_t capacity_ = 0;      // sequences that it has room for
  ChosenToken* chosen_ = nullptr;  // [slots, B]
  std::int64_t launched_ = 0;      // since start
  std::int64_t taken_ = 0;
  std::vector<ChosenToken> row_;  // [B]
};

}  // namespace deltafox
