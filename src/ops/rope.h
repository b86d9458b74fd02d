// Rotary position embedding, half-split (Su et al., "RoFormer", 2021): the pair (x_i, x_{i+D/2}) of
// a head at position p is turned by the angle p · base^(−2i/D).
//
// Angles are float32 products of float32 factors, as the models were trained with: at a position of
// a hundred thousand they differ from exact ones by some thousandths.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"

namespace deltafox {

// In place.
struct RopeArgs {
  TensorView q;  // [T, H, D], D even
  TensorView k;  // [T, G, D]
  Sequences sequences;
  std::span<const std::int64_t> positions;  // [B], of each sequence's first row
  float base = 10000;
};

// In place of dq and dk: the turn back by the same angles.
struct RopeBackwardArgs {
  TensorView dq;  // [T, H, D], on a GPU F32 or of the activation dtype, as in rope
  TensorView dk;  // [T, G, D]
  Sequences sequences;
  std::span<const std::int64_t> positions;  // [B]
  float base = 10000;
};

namespace ops {
void rope(Context& ctx, const RopeArgs& args);
void rope_backward(Context& ctx, const RopeBackwardArgs& args);
}  // namespace ops
namespace cpu {
void rope(Context& ctx, const RopeArgs& args);
void rope_backward(Context& ctx, const RopeBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void rope(Context& ctx, const RopeArgs& args);
void rope_backward(Context& ctx, const RopeBackwardArgs& args);
}  // namespace cuda
namespace reference {
void rope(const RopeArgs& args);
void rope_backward(const RopeBackwardArgs& args);
}  // namespace reference
}  // namespace deltafox
