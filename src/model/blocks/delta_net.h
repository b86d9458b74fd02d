// The DeltaNet mixer: h += o_proj(norm(delta_rule(q, k, v, β)))
//
// q, k, v are projections of x, each through a short convolution (or, without it, v through SiLU);
// q and k get an activation and a norm per head; β = sigmoid(b_proj x). See ops/delta_rule.h for
// the recurrence and Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
// Sequence Length" (2024).
#pragma once

#include <optional>
#include <span>
#include <string>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"
#include "ops/activation.h"
#include "ops/delta_mixer.h"

namespace deltafox {

class DeltaNetMixer {
 public:
  struct Config {
    std::int64_t hidden_size;    // C
    std::int64_t num_heads;      // H
    std::int64_t key_dim;        // H·K
    std::int64_t value_dim;      // H·V
    std::int64_t conv_size = 4;  // W
    bool use_gate = false;
    bool use_short_conv = true;
    bool use_beta = true;
    Activation qk_activation = Activation::kSilu;
    FeatureNorm qk_norm = FeatureNorm::kL2;
    bool norm_first = false;
    float norm_eps = 1e-6F;
  };
  struct Weights {
    std::optional<Param> norm;                          // [C], with norm_first
    Param q_proj, k_proj;                               // [H·K, C]
    Param v_proj;                                       // [H·V, C]
    std::optional<Param> b_proj;                        // [H, C]
    std::optional<Param> q_conv1d, k_conv1d, v_conv1d;  // [channels, 1, W]
    std::optional<Param> g_proj;                        // [H·V, C]
    Param o_norm;                                       // [V]
    Param o_proj;                                       // [C, H·V]
  };
  struct State {
    Tensor q_conv, k_conv,
        v_conv;        // [channels, W], the last inputs of the convolutions, oldest first
    Tensor recurrent;  // [H, K, V]

    template <typename Visitor>
    void visit(Visitor&& visitor) {
      visitor("q_conv", q_conv);
      visitor("k_conv", k_conv);
      visitor("v_conv", v_conv);
      visitor("recurrent", recurrent);
    }
  };

  // What backward needs of a forward and what is costly to compute again, in the context's kept
  // memory.
  struct Saved {
    TensorView joined;                    // [T, 3·H·K] of joined_projections, or
    TensorView q_projected, k_projected;  // [T, H·K] before the convolutions
    TensorView v_projected;               // [T, H·V]
    TensorView beta_logits;               // [T, H], with b_proj
    TensorView gate;                      // [T, H·V], with g_proj
    TensorView o;                         // [T, H, V] before the norm, with g_proj; else
    TensorView output;                    // [T, H·V] what o_proj reads, and
    TensorView output_scales;             // [T·H] of its norm
  };

  explicit DeltaNetMixer(const Config& config);

  State new_state(Device device = Device::kCpu, DType activation_dtype = DType::kF32) const;

  // hidden [T, C] += mixer(x [T, C]), continuing each sequence from
  // its state, or from new ones where there are no states; x may be hidden with norm_first.
  void forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
               std::span<State* const> states, const TensorView& hidden,
               Saved* saved = nullptr) const;

  // The fused way of a GPU for one token of each of a few sequences: hidden [B, C] +=
  // mixer(rms_norm(hidden) with the weight `norm` and `eps`).
  bool has_step() const;
  void step(Context& ctx, const ConstTensorView& norm, float eps, std::span<State* const> states,
            const TensorView& hidden) const;

  // Of whole sequences, given dy [T, C], the gradient of what forward added: dx [T, C] =, or with
  // norm_first +=, and then dx may be dy.
  void backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                const Saved& saved, const TensorView& dy, const TensorView& dx,
                Gradients& gradients) const;

  template <typename Visitor>
  void visit_params(const std::string& prefix, Visitor&& visit) {
    const auto visit_optional = [&](const char* name, std::optional<Param>& param) {
      if (param) visit(prefix + name, *param);
    };
    visit_optional("norm.weight", weights_.norm);
    visit(prefix + "q_proj.weight", weights_.q_proj);
    visit(prefix + "k_proj.weight", weights_.k_proj);
    visit(prefix + "v_proj.weight", weights_.v_proj);
    visit_optional("b_proj.weight", weights_.b_proj);
    visit_optional("q_conv1d.weight", weights_.q_conv1d);
    visit_optional("k_conv1d.weight", weights_.k_conv1d);
    visit_optional("v_conv1d.weight", weights_.v_conv1d);
    visit_optional("g_proj.weight", weights_.g_proj);
    visit(prefix + "o_norm.weight", weights_.o_norm);
    visit(prefix + "o_proj.weight", weights_.o_proj);
  }

 private:
  // SiLU belongs to the convolution: without one, q and k stay raw. The other activations belong to
  // the heads, with or without one.
  Activation qk_conv_activation() const {
    const bool silu = config_.qk_activation == Activation::kSilu && config_.use_short_conv;
    return silu ? Activation::kSilu : Activation::kIdentity;
  }
  Activation head_activation() const {
    const bool silu = config_.qk_activation == Activation::kSilu;
    return silu ? Activation::kIdentity : config_.qk_activation;
  }
  // q_proj, k_proj and v_proj as one matrix, where they lie so in memory and delta_inputs
  // (ops/delta_mixer.h) takes what they give; else no data.
  ConstTensorView joined_projections(const Context& ctx) const;
  // And b_proj below them, padded; where there are joined projections.
  ConstTensorView joined_inputs(const Context& ctx) const;
  // Of the convolution's state: [channels, W].
  static Shape state_shape(const Param& conv) { return {conv.shape[0], conv.shape[2]}; }

  // What the delta rule reads.
  struct Inputs {
    TensorView q_convolved,
        k_convolved;  // [T, H, K] before the feature maps that are by themselves
    TensorView q, k;  // [T, H, K], in place of those unless for backward
    TensorView v;     // [T, H, V]
    TensorView beta;  // [T, H], with b_proj
    std::optional<DeltaInputsArgs> within;  // the rule computes all that from these
  };
  // What delta_inputs and delta_token convolve with.
  DeltaConvolutions convolutions(Context& ctx, ScratchScope& scratch, const Sequences& sequences,
                                 std::span<State* const> states) const;
  // From the normed input to what o_proj reads, for one token of each sequence.
  bool has_token(const Context& ctx) const;
  TensorView token(Context& ctx, ScratchScope& scratch, const ConstTensorView& input,
                   const Sequences& sequences, std::span<State* const> states) const;
  // x [T, C] through the norm, with norm_first.
  ConstTensorView normed(Context& ctx, ScratchScope& scratch, const ConstTensorView& x) const;
  // From the projections in `saved`, of which the logits of beta stay what they are with `keep`;
  // with `of_beta` [T, C] they are not there, and the rule computes its inputs from that too.
  Inputs inputs(Context& ctx, ScratchScope& scratch, const ConstTensorView& of_beta,
                const Sequences& sequences, std::span<State* const> states, const Saved& saved,
                bool keep, bool backward) const;
  // What o_proj reads [T, H·V], from o [T, H, V] and with g_proj the gate; scales [T·H] or no data.
  TensorView output(Context& ctx, ScratchScope& scratch, const TensorView& o,
                    const TensorView& gate, const TensorView& scales = {}) const;
  Shape keys(std::int64_t tokens) const {
    return {tokens, config_.num_heads, config_.key_dim / config_.num_heads};
  }
  Shape values(std::int64_t tokens) const {
    return {tokens, config_.num_heads, config_.value_dim / config_.num_heads};
  }

  // d_o [T, H, V] = and dgate [T, H·V] =, given dy [T, C].
  void output_backward(Context& ctx, const Saved& saved, const TensorView& dy,
                       const TensorView& d_o, const TensorView& dgate, Gradients& gradients) const;
  // dinput [T, C] =, or += with g_proj, given d_o; `input` is what the projections read.
  void inputs_backward(Context& ctx, const ConstTensorView& input, const Sequences& sequences,
                       const Saved& saved, const TensorView& d_o, const TensorView& dinput,
                       Gradients& gradients) const;
  // The same, given the gradients behind the convolutions, where projections are not joined.
  void projections_backward(Context& ctx, const ConstTensorView& input, const Sequences& sequences,
                            const Saved& saved, const TensorView& dq, const TensorView& dk,
                            const TensorView& dv, const TensorView& dinput,
                            Gradients& gradients) const;

  Config config_;
  Weights weights_;
};

}  // namespace deltafox
