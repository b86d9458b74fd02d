// The Mamba-2 mixer: h += out_proj(norm(ssd(x, b, c, Δ) · silu(z)))
//
// in_proj gives z, the inputs (x, b, c) of a short convolution with SiLU, and the time steps. The
// norm is over each of G groups. See ops/ssd.h for the recurrence and Dao & Gu, "Transformers are
// SSMs" (2024).
#pragma once

#include <optional>
#include <span>
#include <string>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"
#include "ops/activation.h"

namespace deltafox {

class Mamba2Mixer {
 public:
  struct Config {
    std::int64_t hidden_size;  // C
    std::int64_t num_heads;    // H
    std::int64_t head_dim;     // P
    std::int64_t state_size;   // N
    std::int64_t num_groups;   // G
    std::int64_t conv_size;    // W
    bool use_bias = false;
    bool use_conv_bias = true;
    Activation conv_activation = Activation::kSilu;
    float dt_min = 0;
    float dt_max = 0;
    float norm_eps = 1e-5F;
    Init dt_bias_init;
    Init out_init;

    std::int64_t inner() const { return num_heads * head_dim; }
    std::int64_t conv_channels() const { return inner() + 2 * num_groups * state_size; }
  };
  struct Weights {
    Param in_proj;                     // [2·H·P + 2·G·N + H, C]: rows of z, (x, b, c), dt
    std::optional<Param> in_bias;      // as many
    Param conv1d;                      // [H·P + 2·G·N, 1, W]
    std::optional<Param> conv1d_bias;  // [H·P + 2·G·N]
    Param dt_bias, a_log, d;           // [H]
    Param norm;                        // [H·P]
    Param out_proj;                    // [C, H·P]
    std::optional<Param> out_bias;     // [C]
  };
  struct State {
    Tensor conv;  // [H·P + 2·G·N, W], the last inputs of the convolution, oldest first
    Tensor ssm;   // [H, N, P]

    template <typename Visitor>
    void visit(Visitor&& visitor) {
      visitor("conv", conv);
      visitor("ssm", ssm);
    }
  };

  // What backward needs of a forward, in the context's scratch memory.
  struct Saved {
    TensorView z;       // [T, H·P]
    TensorView inputs;  // [T, H·P + 2·G·N] before the convolution
    TensorView xbc;     // [T, H·P + 2·G·N]
    TensorView dt;      // [T, H]
    TensorView y;       // [T, H, P] before the norm
  };

  explicit Mamba2Mixer(const Config& config);

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
    visit(prefix + "dt_bias", weights_.dt_bias);
    visit(prefix + "A_log", weights_.a_log);
    visit(prefix + "D", weights_.d);
    visit(prefix + "conv1d.weight", weights_.conv1d);
    visit_optional("conv1d.bias", weights_.conv1d_bias);
    visit(prefix + "in_proj.weight", weights_.in_proj);
    visit_optional("in_proj.bias", weights_.in_bias);
    visit(prefix + "norm.weight", weights_.norm);
    visit(prefix + "out_proj.weight", weights_.out_proj);
    visit_optional("out_proj.bias", weights_.out_bias);
  }

 private:
  TensorView output(Context& ctx, ScratchScope& scratch, const Saved& saved) const;

  Config config_;
  Weights weights_;
};

}  // namespace deltafox
