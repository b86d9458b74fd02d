// h += down_proj(act(gate) · up), where (gate, up) are the halves of gate_proj(norm(x))
//
// The official code keeps gate and up in the one matrix gate_proj; newer versions of
// flash-linear-attention have an up_proj beside it. `norm` is there with norm_first only; else the
// layer has normed x.
#pragma once

#include <optional>
#include <string>

#include "core/context.h"
#include "model/gradients.h"
#include "model/param.h"
#include "ops/activation.h"

namespace deltafox {

class Mlp {
 public:
  struct Config {
    std::int64_t hidden_size;        // C
    std::int64_t intermediate_size;  // F
    Activation activation = Activation::kSilu;
    bool norm_first = false;
    float norm_eps = 1e-6F;
    Init gate_init;
    Init down_init;
  };
  struct Weights {
    std::optional<Param> norm;     // [C]
    Param gate_proj;               // [2F, C], or [F, C] beside up_proj
    std::optional<Param> up_proj;  // [F, C]
    Param down_proj;               // [C, F]
  };

  // What backward needs of a forward and what is costly to compute again, in the context's kept
  // memory.
  struct Saved {
    TensorView gate;  // [T, 2F], or [T, F] beside up_proj; backward overwrites it
    TensorView up;    // [T, F], with up_proj
  };

  explicit Mlp(const Config& config);

  // Before weights are bound: expects gate and up as matrices of their own.
  void split_gate_and_up();

  // hidden [T, C] += mlp(x [T, C]); x may be hidden with norm_first.
  void forward(Context& ctx, const ConstTensorView& x, const TensorView& hidden,
               Saved* saved = nullptr) const;

  // The fused way of a GPU for a few rows: hidden [B, C] += mlp(rms_norm(hidden) with the weight
  // `norm` and `eps`).
  bool has_step() const;
  void step(Context& ctx, const ConstTensorView& norm, float eps, const TensorView& hidden) const;

  // Given dy [T, C], the gradient of what forward added: dx [T, C] =, or with norm_first +=, and
  // then dx may be dy.
  void backward(Context& ctx, const ConstTensorView& x, const Saved& saved, const TensorView& dy,
                const TensorView& dx, Gradients& gradients) const;

  template <typename Visitor>
  void visit_params(const std::string& prefix, Visitor&& visit) {
    if (weights_.norm) visit(prefix + "norm.weight", *weights_.norm);
    visit(prefix + "gate_proj.weight", weights_.gate_proj);
    if (weights_.up_proj) visit(prefix + "up_proj.weight", *weights_.up_proj);
    visit(prefix + "down_proj.weight", weights_.down_proj);
  }

 private:
  ConstTensorView normed(Context& ctx, ScratchScope& scratch, const ConstTensorView& x) const;

  Config config_;
  Weights weights_;
};

}  // namespace deltafox
