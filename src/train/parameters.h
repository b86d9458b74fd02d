// A model with what training keeps of each parameter: the float32 master weight, its gradient, and
// AdamW's two moments; where products are of bfloat16 also a copy of each matrix to compute
// with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/context.h"
#include "model/causal_lm.h"
#include "model/gradients.h"
#include "train/config.h"

namespace deltafox::train {

// Whether AdamW decays the weight of this name, by the rule of the official script.
bool decays(std::string_view name, const DecayRule& rule);

class Parameters {
 public:
  struct Entry {
    std::string name;
    Param* param;           // of the model, which reads the weight or its copy
    Tensor weight;          // float32, as all but the copy
    TensorView rounded{};   // bfloat16, where the model reads a copy
    Tensor host{};          // a copy of what the model reads on the host as well
    Tensor m{}, v{};        // empty where it is not trained
    TensorView gradient{};  // no data where it is not trained
    bool trained = true;
    bool decayed = true;
  };

  // The model that `config_json` describes, with zeros for weights, in the memory of `ctx`'s
  // device. It computes with matrices of dtype `matrices`, F32 or BF16. The context must outlive
  // it.
  Parameters(Context& ctx, const std::string& config_json, const DecayRule& rule, DType matrices);
  // With matrices of the context's activation dtype.
  Parameters(Context& ctx, const std::string& config_json, const DecayRule& rule)
      : Parameters(ctx, config_json, rule, ctx.activation_dtype()) {}
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;

  const CausalLM& model() const { return *model_; }
  Gradients& gradients() { return *gradients_; }
  std::vector<Entry>& entries() { return entries_; }
  const std::vector<Entry>& entries() const { return entries_; }
  std::int64_t size() const;  // of all trained weights
  // Without the embedding, as the paper counts: what 6 N FLOPs a token are counted of.
  std::int64_t non_embedding_size() const;

  // As the official code initialises them.
  void initialise(std::uint64_t seed);
  // From a checkpoint directory in the Hugging Face layout.
  void load(const std::string& directory);
  // From the host's memory, and what is computed of it.
  void set_weight(Entry& entry, const float* values);

  // Clips the gradients, all of them together, to the norm `max_grad_norm`, and makes AdamW's step
  // number `step` (from 1). Returns the norm before clipping; if that is not finite, nothing is
  // changed. Waits for all ops before it.
  double step(const OptimizerConfig& optimizer, double lr, double max_grad_norm, std::int64_t step);

 private:
  void place_copies();
  void refresh_host(Entry& entry) const;

  Context& ctx_;
  std::string config_json_;
  std::unique_ptr<CausalLM> model_;
  std::unique_ptr<Gradients> gradients_;
  std::vector<Entry> entries_;  // in the model's order
  Tensor copies_;               // the rounded matrices, each aligned to 256 bytes
  Tensor norm_;                 // [1]
};

}  // namespace deltafox::train
