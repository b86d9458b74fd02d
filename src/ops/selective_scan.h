// Mamba-1's selective scan, per channel, on a state h [N]:
//   Δ = softplus(dt + dt_bias),  h_n ← e^(−e^a_log_n · Δ) h_n + Δ b_n x,
//   y = (Σ_n c_n h_n + d x) [· silu(gate)]
// b and c are shared by the channels.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

struct SelectiveScanArgs {
  ConstTensorView x;          // [T, C]
  ConstTensorView dt;         // [T, C]
  ConstTensorView dt_bias;    // [C]
  ConstTensorView a_log;      // [C, N]
  ConstTensorView b;          // [T, N]
  ConstTensorView c;          // [T, N]
  ConstTensorView d;          // [C]
  ConstTensorView gate = {};  // [T, C] or no data
  Sequences sequences;
  std::span<float* const> states;  // [B], each [N, C]; updated
  TensorView y;                    // [T, C]
};

// Of whole sequences, which begin from a zero state. With ȳ = Σ_n c_n h_n + d x, dȳ = dy [·
// silu(gate)] and dh the gradient of the state behind a token, per token from the last to the
// first:
//   dh_n ← dh_n + c_n dȳ,  dc_n = Σ_channels h_n dȳ,  db_n = Σ_channels dh_n Δ x,
//   da_n = dh_n h₋_n,  dh₋_n = a_n dh_n     (a_n = e^(−e^a_log_n · Δ), h₋: before the token)
//   dx = d dȳ + Δ Σ_n dh_n b_n,  dΔ = x Σ_n dh_n b_n − Σ_n e^a_log_n a_n da_n
//
// On a GPU x, b, c, gate, dy and the gradients of the first four are each F32 or of the Context's
// activation dtype, the rest is F32.
struct SelectiveScanBackwardArgs {
  ConstTensorView x;          // [T, C]
  ConstTensorView dt;         // [T, C]
  ConstTensorView dt_bias;    // [C]
  ConstTensorView a_log;      // [C, N]
  ConstTensorView b;          // [T, N]
  ConstTensorView c;          // [T, N]
  ConstTensorView d;          // [C]
  ConstTensorView gate = {};  // [T, C] or no data
  Sequences sequences;
  ConstTensorView dy;     // [T, C]
  TensorView dx;          // [T, C], =
  TensorView ddt;         // [T, C], =
  TensorView d_dt_bias;   // [C], +=
  TensorView d_a_log;     // [C, N], +=
  TensorView db;          // [T, N], =
  TensorView dc;          // [T, N], =
  TensorView dd;          // [C], +=
  TensorView dgate = {};  // [T, C], =; with a gate
};

namespace ops {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args);
}  // namespace ops
namespace cpu {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args);
}  // namespace cuda
namespace reference {
void selective_scan(const SelectiveScanArgs& args);
void selective_scan_backward(const SelectiveScanBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
