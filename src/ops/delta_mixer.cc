#include "ops/delta_mixer.h"

#include <algorithm>
#include <bit>

#include "ops/check.h"

namespace deltafox::ops {
namespace {

void check_convolutions(std::string_view op, const DeltaConvolutions& of, std::int64_t channels,
                        std::int64_t sequences) {
  const Shape taps{channels, kDeltaConvWidth};
  check(op, "the convolution of q", of.q, taps);
  check(op, "the convolution of k", of.k, taps);
  check(op, "the convolution of v", of.v, taps);
  for (const auto& states : {of.q_states, of.k_states, of.v_states}) {
    if (static_cast<std::int64_t>(states.size()) != sequences) {
      fail("{}: {} states for {} sequences", op, states.size(), sequences);
    }
  }
}

}  // namespace

void check_delta_inputs(const Context& ctx, const DeltaInputsArgs& args) {
  if (ctx.device() == Device::kCpu) fail("delta_inputs: runs on a GPU only");
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t keys = args.q.shape[2];
  if (keys < 8 || keys > 256 || !std::has_single_bit(static_cast<std::uint64_t>(keys))) {
    fail("delta_inputs: heads of {} do not fit", keys);
  }
  check("delta_inputs", "projected", args.projected, {tokens, 3 * heads * keys}, args.q.dtype);
  check_convolutions("delta_inputs", args.convolutions, heads * keys, args.sequences.count());
  check("delta_inputs", "beta", args.beta, {tokens, heads});
  if (args.x.data != nullptr) {
    const std::int64_t width = args.x.shape[1];
    if (width % 8 != 0 || heads > kDeltaInputsHeads) {
      fail("delta_inputs: {} columns or {} heads do not fit", width, heads);
    }
    check("delta_inputs", "x", args.x, {tokens, width}, DType::kBF16);
    check("delta_inputs", "b_proj", args.b_proj, {heads, width}, DType::kBF16);
  }
  check_activation(ctx, "delta_inputs", "q", args.q, {tokens, heads, keys});
  check("delta_inputs", "k", args.k, args.q.shape, args.q.dtype);
  check("delta_inputs", "v", args.v, args.q.shape, args.q.dtype);
}

void delta_inputs(Context& ctx, const DeltaInputsArgs& args) {
  const OpTimer timer("delta_inputs");
  check_delta_inputs(ctx, args);
  cuda::delta_inputs(ctx, args);
}

void delta_inputs_backward(Context& ctx, const DeltaInputsBackwardArgs& args) {
  constexpr const char* kOp = "delta_inputs_backward";
  const OpTimer timer(kOp);
  if (ctx.device() == Device::kCpu) fail("{}: runs on a GPU only", kOp);
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t heads = args.dq.shape[1];
  const std::int64_t channels = heads * args.dq.shape[2];
  const DType dtype = args.projected.dtype;
  const Shape taps{channels, kDeltaConvWidth};
  const std::int64_t columns = std::max(3 * channels + heads, args.d_projected.shape[1]);
  check_activation(ctx, kOp, "projected", args.projected, {tokens, 3 * channels});
  check(kOp, "beta_logits", args.beta_logits, {tokens, heads});
  check(kOp, "dbeta", args.dbeta, {tokens, heads});
  check(kOp, "d_projected", args.d_projected, {tokens, columns}, dtype);
  if (columns % 8 != 0) fail("{}: rows of {} do not begin aligned", kOp, columns);
  for (const ConstTensorView& d : {args.dq, args.dk, args.dv}) {
    check(kOp, "a gradient", d, args.dq.shape, dtype);
  }
  for (const ConstTensorView& w : {args.q, args.k, args.v}) check(kOp, "a weight", w, taps);
  for (const TensorView& dw : {args.dq_conv, args.dk_conv, args.dv_conv}) {
    check(kOp, "the gradient of a weight", dw, taps);
  }
  cuda::delta_inputs_backward(ctx, args);
}

void delta_token(Context& ctx, const DeltaTokenArgs& args) {
  const OpTimer timer("delta_token");
  if (ctx.device() == Device::kCpu) fail("delta_token: runs on a GPU only");
  const std::int64_t batch = args.x.shape[0];
  const std::int64_t width = args.x.shape[1];
  const std::int64_t channels = args.b_proj.shape[0] * kDeltaTokenHead;
  if (width % 8 != 0) fail("delta_token: {} columns are not a multiple of 8", width);
  check_activation(ctx, "delta_token", "x", args.x, {batch, width});
  check("delta_token", "b_proj", args.b_proj, {args.b_proj.shape[0], width}, args.x.dtype);
  check("delta_token", "projected", args.projected, {batch, 3 * channels}, args.x.dtype);
  check_convolutions("delta_token", args.convolutions, channels, batch);
  check("delta_token", "norm", args.norm, {kDeltaTokenHead});
  check("delta_token", "o", args.o, {batch, channels}, args.projected.dtype);
  if (static_cast<std::int64_t>(args.states.size()) != batch) {
    fail("delta_token: {} states for {} sequences", args.states.size(), batch);
  }
  cuda::delta_token(ctx, args);
}

}  // namespace deltafox::ops
