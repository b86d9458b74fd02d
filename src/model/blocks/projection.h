// What mixers are made of besides their recurrence: projections with or without a short
// convolution, and how the official code initialises them.
#pragma once

#include <initializer_list>
#include <optional>
#include <span>

#include "core/context.h"
#include "core/sequences.h"
#include "model/gradients.h"
#include "model/param.h"
#include "ops/activation.h"

namespace deltafox {

// As the official layers of DeltaNet and HGRN2 initialise their projections, before the model's
// initialiser (normal, and the scaling of o_proj by depth) gets to them: xavier_uniform with gain
// 2^-2.5.
Param xavier_projection(std::int64_t rows, std::int64_t columns);

// PyTorch's default for linear and convolution layers, kaiming_uniform with a = √5.
Init default_init(std::int64_t fan_in);

// The weight [channels, 1, W] of a depthwise convolution.
Param depthwise_convolution(std::int64_t channels, std::int64_t width);

// Rows [begin, begin + count) of a matrix, or as many elements of a vector.
ConstTensorView rows_of(const ConstTensorView& tensor, std::int64_t begin, std::int64_t count);
TensorView rows_of(const TensorView& tensor, std::int64_t begin, std::int64_t count);

// The matrices one below the other as one, where they lie so in memory; else no data.
ConstTensorView joined(std::initializer_list<ConstTensorView> matrices);

// A view that begins at a column of each row and has the rows of the whole.
TensorView columns_of(const TensorView& tensor, std::int64_t begin);

// No data for a weight that a block lacks.
inline ConstTensorView value_of(const std::optional<Param>& param) {
  return param ? param->value : ConstTensorView{};
}

// A copy in scratch memory, of what an op in place is about to overwrite.
TensorView copy_of(Context& ctx, ScratchScope& scratch, const ConstTensorView& from);

// Where one tensor of each sequence's state lies.
template <typename State>
std::span<float*> state_pointers(ScratchScope& scratch, std::span<State* const> states,
                                 Tensor State::*tensor) {
  const std::span<float*> pointers =
      scratch.array<float*>(static_cast<std::int64_t>(states.size()));
  for (std::size_t b = 0; b < states.size(); ++b) pointers[b] = (states[b]->*tensor).f32();
  return pointers;
}

// Zeros of `shape` for each sequence, in scratch memory: new states that nobody goes on from.
std::span<float*> zero_states(Context& ctx, ScratchScope& scratch, const Sequences& sequences,
                              const Shape& shape);

// Those of the states, or zeros where there are no states.
template <typename State>
std::span<float*> state_pointers(Context& ctx, ScratchScope& scratch, const Sequences& sequences,
                                 std::span<State* const> states, Tensor State::*tensor,
                                 const Shape& shape) {
  return states.empty() ? zero_states(ctx, scratch, sequences, shape)
                        : state_pointers(scratch, states, tensor);
}

// y [T, N] = x [T, C] wᵀ [+ bias], in scratch memory; an activation where no dtype is given
TensorView project(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                   const ConstTensorView& w, const ConstTensorView& bias = {},
                   std::optional<DType> dtype = {});

// What ends a block: hidden [T, C] += y [T, N] wᵀ [+ bias]. Nothing where hidden has no data: only
// what is saved is wanted.
void add_output(Context& ctx, const ConstTensorView& y, const Param& w, const ConstTensorView& bias,
                const TensorView& hidden);

// y [T, N] = act(conv(x [T, N])), with `norm_width` behind an L2 norm of each so many columns, in
// scratch memory
TensorView convolve(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                    const Param& conv, const ConstTensorView& bias, const Sequences& sequences,
                    std::span<float* const> states, Activation activation,
                    std::int64_t norm_width = 0);

// y [T, N] = act(conv(x [T, C] wᵀ)), or act(x wᵀ) without a convolution, in scratch memory.
// `projected` receives x wᵀ, which backward needs.
TensorView project_and_convolve(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                                const Param& proj, const std::optional<Param>& conv,
                                const Sequences& sequences, std::span<float* const> states,
                                Activation activation, TensorView* projected = nullptr,
                                std::optional<DType> dtype = {});

// Of convolve over whole sequences: dx [T, N] =, given dy [T, N]; with `norm_width`, behind an L2
// norm of heads of that width.
void convolve_backward(Context& ctx, const ConstTensorView& x, const Param& conv,
                       const std::optional<Param>& bias, const Sequences& sequences,
                       Activation activation, const TensorView& dy, const TensorView& dx,
                       Gradients& gradients, std::int64_t norm_width = 0);

// Of project_and_convolve over whole sequences: dx [T, C] = or +=, given dy [T, N], which it
// overwrites; `norm_width`, with a convolution, as in convolve_backward.
void project_and_convolve_backward(Context& ctx, const ConstTensorView& x,
                                   const ConstTensorView& projected, const Param& proj,
                                   const std::optional<Param>& conv, const Sequences& sequences,
                                   Activation activation, const TensorView& dy,
                                   const TensorView& dx, bool accumulate_dx, Gradients& gradients,
                                   std::int64_t norm_width = 0);

}  // namespace deltafox
