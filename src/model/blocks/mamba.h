// The Mamba-1 mixer: h += out_proj(selective_scan(x, Δ, b, c) · silu(z))
//
// in_proj gives the input x of a short convolution with SiLU, and z; x_proj gives the time steps
// (at a low rank, which dt_proj widens) and b and c. See ops/selective_scan.h for the recurrence
// and Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023).
#pragma once

#include <optional>
#include <span>
#include <string>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"

namespace deltafox {

class MambaMixer {
 public:
  struct Config {
    std::int64_t hidden_size;  // C
    std::int64_t inner_size;   // E
    std::int64_t state_size;   // N
    std::int64_t dt_rank;      // R
    std::int64_t conv_size;    // W
    bool use_bias = false;
    bool use_conv_bias = true;
    Init dt_init;
    Init dt_bias_init;
    Init out_init;
  };
  struct Weights {
    Param in_proj;                     // [2·E, C]: rows of x, z
    std::optional<Param> in_bias;      // [2·E]
    Param conv1d;                      // [E, 1, W]
    std::optional<Param> conv1d_bias;  // [E]
    Param x_proj;                      // [R + 2·N, E]: rows of dt, b, c
    Param dt_proj;                     // [E, R]
    Param dt_bias;                     // [E]
    Param a_log;                       // [E, N]
    Param d;                           // [E]
    Param out_proj;                    // [C, E]
    std::optional<Param> out_bias;     // [C]
  };
  struct State {
    Tensor conv;  // [E, W], the last inputs of the convolution, oldest first
    Tensor ssm;   // [N, E]

    template <typename Visitor>
    void visit(Visitor&& visitor) {
      visitor("conv", conv);
      visitor("ssm", ssm);
    }
  };

  // What backward needs of a forward, in the context's scratch memory.
  struct Saved {
    TensorView input;     // [T, E] before the convolution
    TensorView z;         // [T, E]
    TensorView mixed;     // [T, E]
    TensorView low_rank;  // [T, R]
    TensorView b, c;      // [T, N]
    TensorView dt;        // [T, E]
    TensorView y;         // [T, E] before out_proj
  };

  explicit MambaMixer(const Config& config);

  State new_state(Device device = Device::kCpu, DType activation_dtype = DType::kF32) const;

  // hidden [T, C] += mixer(x [T, C]), continuing each sequence from
  // its state, or from new ones where there are no states.
  void forward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
               std::span<State* const> states, const TensorView& hidden,
               Saved* saved = nullptr) const;

  // Of whole sequences: dx [T, C] =, given dy [T, C], the gradient of what forward added.
  void backward(Context& ctx, const ConstTensorView& x, const Sequences& sequences,
                const Saved& saved, const TensorView& dy, const TensorView& dx,
                Gradients& gradients) const;

  template <typename Visitor>
  void visit_params(const std::string& prefix, Visitor&& visit) {
    const auto visit_optional = [&](const char* name, std::optional<Param>& param) {
      if (param) visit(prefix + name, *param);
    };
    visit(prefix + "A_log", weights_.a_log);
    visit(prefix + "D", weights_.d);
    visit(prefix + "conv1d.weight", weights_.conv1d);
    visit_optional("conv1d.bias", weights_.conv1d_bias);
    visit(prefix + "in_proj.weight", weights_.in_proj);
    visit_optional("in_proj.bias", weights_.in_bias);
    visit(prefix + "x_proj.weight", weights_.x_proj);
    visit(prefix + "dt_proj.weight", weights_.dt_proj);
    visit(prefix + "dt_proj.bias", weights_.dt_bias);
    visit(prefix + "out_proj.weight", weights_.out_proj);
    visit_optional("out_proj.bias", weights_.out_bias);
  }

 private:
  Config config_;
  Weights weights_;
};

}  // namespace deltafox
