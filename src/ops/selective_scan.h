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

namespace ops {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
}
namespace cpu {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
}
namespace cuda {
void selective_scan(Context& ctx, const SelectiveScanArgs& args);
}
namespace reference {
void selective_scan(const SelectiveScanArgs& args);
}
}  // namespace deltafox
