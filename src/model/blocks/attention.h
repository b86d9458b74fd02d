// The attention mixers of the Forgetting Transformer and the Transformer:
//   h += o_proj(gate(norm(attention(rope(norm(q)), rope(norm(shift(k))), shift(v), log f))))
//
// Every part but the projections and the attention is optional. See ops/forgetting_attention.h for
// the attention and Lin et al., "Forgetting Transformer: Softmax Attention with a Forget Gate"
// (2025).
#pragma once

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"
#include "model/state_tensor.h"
#include "ops/activation.h"
#include "ops/kv_cache.h"

namespace deltafox {

// Where log f = log σ(logit) comes from: a projection of x with a bias, a learned bias, a bias that
// is not trained, or none (f = 1).
enum class ForgetGate : std::uint8_t { kNone, kProjected, kBias, kFixed };

// RMS norm of each head of q and k: with one weight for all heads, or one for each head.
enum class QkNorm : std::uint8_t { kNone, kShared, kPerHead };

class AttentionMixer {
 public:
  struct Config {
    std::int64_t hidden_size;                      // C
    std::int64_t num_heads;                        // H
    std::int64_t num_kv_heads;                     // G, divides H
    std::int64_t head_dim;                         // D
    std::optional<std::int64_t> window_size = {};  // positions a query sees, its own included
    bool use_rope = false;
    float rope_base = 10000;
    ForgetGate forget_gate = ForgetGate::kNone;
    Init forget_gate_bias_init = {};  // of kBias and kFixed
    QkNorm qk_norm = QkNorm::kNone;
    bool use_k_shift = false;
    bool use_v_shift = false;
    bool use_output_gate = false;
    Activation output_gate_activation = Activation::kSigmoid;
    bool use_output_norm = false;
    float norm_eps = 1e-6F;  // of the output norm
    // Skips keys whose weights total at most e^tolerance; see ops/forgetting_attention.h.
    std::optional<float> log_pruning_tolerance = {};
    Init projection_init = {};
    std::optional<Init> o_init = {};  // as the other projections' where absent
    std::string forget_gate_name = "fgate_proj";
    std::string output_gate_name = "ogate_proj";
  };
  struct Weights {
    Param q_proj;                                     // [H·D, C]
    Param k_proj, v_proj;                             // [G·D, C]
    std::optional<Param> k_shift_proj, v_shift_proj;  // [G, C]
    std::optional<Param> q_norm, k_norm;              // [D] or [H·D], [G·D]
    std::optional<Param> fgate_proj;                  // [H, C]
    std::optional<Param> fgate_bias;                  // [H], of the projection or on its own
    std::optional<Param> ogate_proj;                  // [H·D, C]
    std::optional<Param> output_norm;                 // [H·D]
    Param o_proj;                                     // [C, H·D]
  };
  struct State {
    Tensor k_shift, v_shift;  // [G, D], the last token's projection before the shift
    KvCache cache;

    template <typename Visitor>
    void visit(Visitor&& visitor) {
      visitor("k_shift", StateTensor(k_shift));
      visitor("v_shift", StateTensor(v_shift));
      if (cache.layout().device != Device::kCpu) {
        visitor("pages", pages(&KvPage::block));
        return;
      }
      visitor("keys", pages(&KvPage::keys));
      visitor("values", pages(&KvPage::values));
      visitor("gates", pages(&KvPage::gates));
      visitor("key_norms", pages(&KvPage::key_norms));
    }
    // Of a new state: makes room for what a state holds that has read so many tokens.
    void grow_to(std::int64_t position) { cache.grow_to(position); }
    std::int64_t bytes_at(std::int64_t position) const { return cache.bytes_at(position); }

   private:
    StateTensor pages(Tensor KvPage::*tensor);
  };

  // What backward needs of a forward, in the context's scratch memory.
  struct Saved {
    struct Shifted {
      TensorView projected;            // [T, G, D] before the shift
      TensorView alpha_logits, alpha;  // [T, G], with a shift
      TensorView unnormed;             // [T, G, D] before the norm
    };
    TensorView q_unnormed;       // [T, H, D] before the norm
    TensorView q;                // [T, H, D]
    Shifted k_before, v_before;  // of k and v
    TensorView k, v;             // [T, G, D]
    TensorView log_gates;        // [T, H]
    TensorView lse;              // [T, H] of the scores, on a GPU
    TensorView o;                // [T, H, D] before norm and gate
    TensorView gate;             // [T, H·D], with ogate_proj
  };

  explicit AttentionMixer(const Config& config);

  State new_state(Device device = Device::kCpu, DType activation_dtype = DType::kF32) const;

  // hidden [T, C] += mixer(x [T, C]), continuing each sequence from
  // its state.
  void forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
               std::span<State* const> states, const TensorView& hidden,
               Saved* saved = nullptr) const;

  // The fused way of a GPU for one token of each of a few sequences: hidden [B, C] +=
  // mixer(rms_norm(hidden) with the weight `norm` and `eps`).
  bool has_step() const;
  void step(Context& ctx, const ConstTensorView& norm, float eps, std::span<State* const> states,
            const TensorView& hidden) const;

  // Of whole sequences: dx [T, C] =, given dy [T, C], the gradient of what forward added.
  void backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                const Saved& saved, const TensorView& dy, const TensorView& dx,
                Gradients& gradients) const;

  template <typename Visitor>
  void visit_params(const std::string& prefix, Visitor&& visit) {
    const auto visit_optional = [&](const std::string& name, std::optional<Param>& param) {
      if (param) visit(prefix + name, *param);
    };
    visit(prefix + "q_proj.weight", weights_.q_proj);
    visit(prefix + (weights_.k_shift_proj ? "k_proj.linear.weight" : "k_proj.weight"),
          weights_.k_proj);
    visit_optional("k_proj.shift_proj.weight", weights_.k_shift_proj);
    visit(prefix + (weights_.v_shift_proj ? "v_proj.linear.weight" : "v_proj.weight"),
          weights_.v_proj);
    visit_optional("v_proj.shift_proj.weight", weights_.v_shift_proj);
    visit(prefix + "o_proj.weight", weights_.o_proj);
    visit_optional(config_.forget_gate_name + ".weight", weights_.fgate_proj);
    visit_optional(weights_.fgate_proj ? config_.forget_gate_name + ".bias" : "fgate_bias",
                   weights_.fgate_bias);
    visit_optional(config_.output_gate_name + ".weight", weights_.ogate_proj);
    visit_optional("output_norm.weight", weights_.output_norm);
    visit_optional("q_norm.weight", weights_.q_norm);
    visit_optional("k_norm.weight", weights_.k_norm);
  }

 private:
  // Keys or values [T, G, D]; `before` receives what backward needs.
  TensorView shifted(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                     const Sequences& sequences, const Param& proj,
                     const std::optional<Param>& shift_proj, std::span<State* const> states,
                     Tensor State::*shift_state, Saved::Shifted* before) const;
  // dx [T, C] +=, given the gradient d [T, G, D] of keys or values.
  void shifted_backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                        const Param& proj, const std::optional<Param>& shift_proj,
                        const Saved::Shifted& before, const TensorView& d, const TensorView& dx,
                        Gradients& gradients) const;
  // What o_proj reads [T, H·D], from o.
  TensorView output(Context& ctx, ScratchScope& scratch, const Saved& saved) const;
  // Norm, gate and projection of the output: d_o [T, H, D] = and dgate [T, H·D] =, given dy [T, C].
  void output_backward(Context& ctx, const Saved& saved, const TensorView& dy,
                       const TensorView& d_o, const TensorView& dgate, Gradients& gradients) const;
  // dq, dk, dv behind the projections and shifts, and dgates [T, H], given d_o.
  void attend_backward(Context& ctx, const Sequences& sequences, const Saved& saved,
                       const TensorView& d_o, const TensorView& dq, const TensorView& dk,
                       const TensorView& dv, const TensorView& dgates, Gradients& gradients) const;
  // log f [T, H]; no data without gates.
  TensorView log_gates(Context& ctx, ScratchScope& scratch, const ConstTensorView& x) const;
  // The bounds of |q·k| / √D that the norms' weights give, [H]; empty without them.
  std::span<const float> score_bounds(ScratchScope& scratch) const;
  // The states' caches, with room for the tokens to come; `positions` are those of the first.
  static std::span<KvCache*> extended(ScratchScope& scratch, const Sequences& sequences,
                                      std::span<State* const> states,
                                      std::span<std::int64_t> positions);
  // Once all that looks at them was launched.
  static void drop_unseen(const Context& ctx, std::span<KvCache* const> caches);
  // o [T, H, D], and lse [T, H] if it has data
  void attend(Context& ctx, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& gates, const Sequences& sequences, std::span<State* const> states,
              const TensorView& o, const TensorView& lse) const;

  Config config_;
  Weights weights_;
};

}  // namespace deltafox
