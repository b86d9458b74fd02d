// The shape that all the architectures share: embedding, layers of a mixer and perhaps an MLP
// around a residual stream, a final norm, an LM head. Architectures differ in their mixers and in
// names.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "core/context.h"
#include "core/sequences.h"
#include "model/blocks/attention.h"
#include "model/blocks/delta_net.h"
#include "model/blocks/hgrn2.h"
#include "model/blocks/mamba.h"
#include "model/blocks/mamba2.h"
#include "model/blocks/mlp.h"
#include "model/gradients.h"
#include "model/param.h"

namespace deltafox {

using Mixer = std::variant<DeltaNetMixer, AttentionMixer, Hgrn2Mixer, Mamba2Mixer, MambaMixer>;
using MixerState = std::variant<DeltaNetMixer::State, AttentionMixer::State, Hgrn2Mixer::State,
                                Mamba2Mixer::State, MambaMixer::State>;

struct Layer {
  std::optional<Param> mixer_norm;  // [C]
  Mixer mixer;
  std::optional<Param> mlp_norm;  // [C]
  std::optional<Mlp> mlp;
};

// One sequence's memory, a mixer's state a layer.
struct SequenceState {
  std::uint64_t model_id = 0;  // of the loaded model that made it
  Device device = Device::kCpu;
  std::int64_t position = 0;  // tokens read
  std::vector<MixerState> layers;
};

// A parameter of the checkpoint that the forward pass does not read.
struct IdleParam {
  std::string name;
  Param param;
};

// Names of parameters, as the official checkpoint of an architecture has them.
struct ParamNames {
  std::string embeddings = "model.embeddings.weight";
  std::string layers = "model.layers.";
  std::string mixer = "attn.";
  std::string mixer_norm = "attn_norm.weight";
  std::string mlp = "mlp.";
  std::string mlp_norm = "mlp_norm.weight";
  std::string norm = "model.norm.weight";
  std::string lm_head = "lm_head.weight";
};

class CausalLM {
 public:
  struct Config {
    std::int64_t vocab_size;   // N
    std::int64_t hidden_size;  // C
    float norm_eps;
    Init embedding_init;
    std::optional<Init> lm_head_init = {};  // as the embedding's where absent
    bool tie_word_embeddings = false;
    ParamNames names;
  };

  CausalLM(const Config& config, std::vector<Layer> layers, std::vector<IdleParam> idle = {});

  // hidden [rows, C] after the embedding (0) or layer l (l), of rows first_row... of the batch.
  using LayerHook = std::function<void(std::int64_t layer, const ConstTensorView& hidden)>;

  // hidden [T, C] = the residual stream behind the last layer, before the final norm.
  void forward(Context& ctx, std::span<const std::int32_t> ids, const Sequences& sequences,
               std::span<SequenceState* const> states, const TensorView& hidden,
               const LayerHook& hook = {}) const;

  // Whether forward takes a fused way for one token of each of `count` sequences.
  bool has_step(const Context& ctx, std::int64_t count) const;

  // y [R, C] = the final norm of x [R, C]
  void final_norm(Context& ctx, const ConstTensorView& x, const TensorView& y) const;
  // logits [R, N] of normed rows [R, C]
  void head(Context& ctx, const ConstTensorView& x, const TensorView& logits) const;

  // logits [R, N'] of x [R, C] before the final norm; on a GPU N' >= N
  void norm_and_head(Context& ctx, const ConstTensorView& x, const TensorView& logits) const;

  struct BackwardOptions {
    // Keeps only what each layer reads, and computes the layer once more on the way back: the
    // gradients are the same bits.
    bool recompute = false;
  };
  // Of whole sequences, read from new states: loss[t] = -log softmax(logits_t)[labels_t], 0 where
  // the label is negative, and gradients += those of Σ_t scale · loss[t]. On a GPU ids,
  // labels and loss lie in its memory, and matrices are of the context's activation dtype; else
  // weights must be float32.
  void forward_backward(Context& ctx, std::span<const std::int32_t> ids, const Sequences& sequences,
                        std::span<const std::int32_t> labels, float scale, std::span<float> loss,
                        Gradients& gradients, const BackwardOptions& options) const;

  // Whether no layer's memory grows with the tokens read.
  bool replayable() const;
  // Room for so many more tokens, so that forward allocates none for them.
  void reserve(SequenceState& state, std::int64_t tokens) const;
  // A token more was read by running a recorded step.
  void advance(SequenceState& state) const;

  SequenceState new_state(Device device = Device::kCpu, DType activation_dtype = DType::kF32) const;

  // Before weights are bound: expects the MLPs' gate and up as matrices of their own.
  void split_gate_and_up();

  const Config& config() const { return config_; }
  std::int64_t num_layers() const { return static_cast<std::int64_t>(layers_.size()); }

  // visit(name, Param&) for every parameter, in the model's order.
  template <typename Visitor>
  void visit_params(Visitor&& visit) {
    const ParamNames& names = config_.names;
    visit(names.embeddings, embeddings_);
    for (IdleParam& idle : idle_) visit(idle.name, idle.param);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      Layer& layer = layers_[l];
      const std::string prefix = names.layers + std::to_string(l) + ".";
      if (layer.mixer_norm) visit(prefix + names.mixer_norm, *layer.mixer_norm);
      std::visit([&](auto& mixer) { mixer.visit_params(prefix + names.mixer, visit); },
                 layer.mixer);
      if (layer.mlp_norm) visit(prefix + names.mlp_norm, *layer.mlp_norm);
      if (layer.mlp) layer.mlp->visit_params(prefix + names.mlp, visit);
    }
    visit(names.norm, norm_);
    if (lm_head_) visit(names.lm_head, *lm_head_);
  }

 private:
  struct LayerInput;
  struct LayerSaved;
  struct StreamGradient;

  void step(Context& ctx, std::span<SequenceState* const> states, const TensorView& hidden) const;

  LayerInput layer_input(Context& ctx, const std::optional<Param>& norm,
                         const TensorView& stream) const;
  // out [T, C] = in [T, C] through a layer, from new states; out may be in. `saved` stays in the
  // context's kept memory. Without data of out only `saved` is computed.
  void forward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                     const TensorView& in, const TensorView& out, LayerSaved& saved) const;
  // dhidden: the gradient of what the layer left behind becomes that of what it read.
  void backward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                      const LayerSaved& saved, const StreamGradient& dhidden,
                      Gradients& gradients) const;
  // loss [T], and dhidden = the gradient of what the last layer left behind.
  void head_backward(Context& ctx, const TensorView& hidden, std::span<const std::int32_t> labels,
                     float scale, std::span<float> loss, const StreamGradient& dhidden,
                     Gradients& gradients) const;

  Config config_;
  Param embeddings_;  // [N, C]
  std::vector<Layer> layers_;
  std::vector<IdleParam> idle_;
  Param norm_;                    // [C]
  std::optional<Param> lm_head_;  // [N, C], absent where tied to the embedding
};

}  // namespace deltafox
