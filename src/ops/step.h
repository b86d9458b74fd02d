// What a decoding step of a few sequences is made of on a GPU, where it is bound by reading the
// weights once: products with all that comes before and after them in one pass.
//
// step_linear: for each part, y = epilogue(norm(x) wᵀ), where the epilogue is one of
//   kStore    y = p
//   kAdd      y += p
//   kSigmoid  y = σ(p)
//   kGlu      y = silu(p) · p', with w the rows of p and then those of p'
//   kConvSilu y = silu(short_conv(p)) with W = 4; see ops/short_conv.h
// and norm(x) is x, or rms_norm(x) in groups as wide as the weight of the norm.
//
// delta_rule_step: delta_rule (ops/delta_rule.h) of one token a sequence, with
// q and k of length one first: q · rsqrt(Σq² + 1e-6).
//
// StepProgram: while one lives, step_linear and delta_rule_step of its Context are gathered where
// the card can run them in one launch; run() launches, and so do attention_step, gla_step and
// ssd_step what comes before them. Nothing else may be launched between them that they depend on or
// that depends on them.
//
// Sums do not depend on B.
#pragma once

#include <span>

#include "core/context.h"

namespace deltafox {

constexpr std::int64_t kStepLinearRows = 16;  // B at most
constexpr std::int64_t kStepLinearParts = 6;
constexpr std::int64_t kStepConvWidth = 4;  // W
constexpr std::int64_t kStepHeadDim = 128;  // K and V of delta_rule_step, groups of a norm

enum class StepEpilogue : std::uint8_t { kStore, kAdd, kSigmoid, kGlu, kConvSilu };

struct StepLinearPart {
  // [N, K] BF16, kQ8 or kQ4; [2·N, K] with kGlu, N being whole panels if it is packed
  ConstTensorView w;
  TensorView y;  // [B, N'] F32 or BF16, N' >= N; what lies behind N is not touched
  StepEpilogue epilogue = StepEpilogue::kStore;
  ConstTensorView conv = {};                 // [N, W]
  ConstTensorView conv_bias = {};            // [N]; no data for none
  std::span<float* const> conv_states = {};  // [B], each [N, W]
};

// N
inline std::int64_t outputs_of(const StepLinearPart& part) {
  return part.epilogue == StepEpilogue::kGlu ? part.w.shape[0] / 2 : part.w.shape[0];
}

struct StepLinearArgs {
  ConstTensorView x;          // [B, K] F32 or BF16, K a multiple of 256
  ConstTensorView norm = {};  // [K] or [kStepHeadDim]; no data for none
  float norm_eps = 0;
  ConstTensorView gate = {};              // [B, K] F32, under a norm of all of K; no data for none
  std::span<const StepLinearPart> parts;  // at most kStepLinearParts
};

struct DeltaRuleStepArgs {
  ConstTensorView q;               // [B, H, 128] F32
  ConstTensorView k;               // [B, H, 128] F32
  ConstTensorView v;               // [B, H, 128] F32
  ConstTensorView beta;            // [B, H] F32
  std::span<float* const> states;  // [B], each [H, 128, 128]; updated
  TensorView o;                    // [B, H, 128] F32
};

namespace ops {
void step_linear(Context& ctx, const StepLinearArgs& args);
void delta_rule_step(Context& ctx, const DeltaRuleStepArgs& args);
}  // namespace ops
namespace cuda {
void step_linear(Context& ctx, const StepLinearArgs& args);
void delta_rule_step(Context& ctx, const DeltaRuleStepArgs& args);
// False where one is open already, which then goes on, or where the card has no use for one.
bool begin_step_program(Context& ctx);
// Launches what was gathered.
void run_step_program(Context& ctx);
// Drops what was not launched.
void end_step_program(Context& ctx);
}  // namespace cuda
namespace ops {

class StepProgram {
 public:
  // Gathers only if `wanted`.
  explicit StepProgram(Context& ctx, bool wanted = true)
      : ctx_(ctx), opened_(wanted && cuda::begin_step_program(ctx)) {}
  ~StepProgram() {
    if (opened_) cuda::end_step_program(ctx_);
  }
  StepProgram(const StepProgram&) = delete;
  StepProgram& operator=(const StepProgram&) = delete;
  // Does nothing where a program around this one goes on.
  void run() {
    if (opened_) cuda::run_step_program(ctx_);
  }

 private:
  Context& ctx_;
  bool opened_;
};

}  // namespace ops
}  // namespace deltafox
