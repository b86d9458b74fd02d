// The HGRN2 mixer: h += o_proj(norm(gla(q, k, g, v)))
//
// q = silu(q_proj x); g = sigmoid(f_proj x) is the forget gate and k = 1 − g the input gate;
// v = i_proj x; each may pass a short convolution first. The norm is over the whole hidden size.
// See ops/gla.h for the recurrence and Qin et al., "HGRN2: Gated Linear RNNs with State Expansion"
// (2024).
#pragma once

#include <optional>
#include <span>
#include <string>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"

namespace deltafox {

class Hgrn2Mixer {
 public:
  struct Config {
    std::int64_t hidden_size;    // C = H·V
    std::int64_t num_heads;      // H
    std::int64_t expand_ratio;   // K
    std::int64_t conv_size = 4;  // W
    bool use_short_conv = false;
    bool elementwise_affine = true;
    float norm_eps = 1e-6F;
  };
  struct Weights {
    Param q_proj, f_proj;                               // [H·K, C]
    Param i_proj;                                       // [C, C]
    std::optional<Param> q_conv1d, f_conv1d, i_conv1d;  // [channels, 1, W]
    std::optional<Param> g_norm;                        // [C]
    Param o_proj;                                       // [C, C]
  };
  struct State {
    Tensor q_conv, f_conv, i_conv;  // [channels, W], the last inputs of the convolutions, oldest
                                    // first
    Tensor recurrent;               // [H, K, V]

    template <typename Visitor>
    void visit(Visitor&& visitor) {
      visitor("q_conv", q_conv);
      visitor("f_conv", f_conv);
      visitor("i_conv", i_conv);
      visitor("recurrent", recurrent);
    }
  };

  // What backward needs of a forward, in the context's scratch memory.
  struct Saved {
    TensorView q_projected, f_projected;  // [T, H·K] before the convolutions
    TensorView i_projected;               // [T, C]
    TensorView q, g, k;                   // [T, H, K]
    TensorView v;                         // [T, H, V]
    TensorView o;                         // [T, C] before the norm
  };

  explicit Hgrn2Mixer(const Config& config);

  State new_state(Device device = Device::kCpu, DType activation_dtype = DType::kF32) const;

  // hidden [T, C] += mixer(x [T, C]), continuing each sequence from
  // its state, or from new ones where there are no states.
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
    const auto visit_optional = [&](const char* name, std::optional<Param>& param) {
      if (param) visit(prefix + name, *param);
    };
    visit(prefix + "q_proj.weight", weights_.q_proj);
    visit(prefix + "f_proj.weight", weights_.f_proj);
    visit(prefix + "i_proj.weight", weights_.i_proj);
    visit_optional("q_conv1d.weight", weights_.q_conv1d);
    visit_optional("f_conv1d.weight", weights_.f_conv1d);
    visit_optional("i_conv1d.weight", weights_.i_conv1d);
    visit_optional("g_norm.weight", weights_.g_norm);
    visit(prefix + "o_proj.weight", weights_.o_proj);
  }

 private:
  TensorView output(Context& ctx, ScratchScope& scratch, const Saved& saved) const;

  Config config_;
  Weights weights_;
};

}  // namespace deltafox
