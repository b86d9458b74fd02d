#include "model/blocks/projection.h"

#include <cassert>
#include <cmath>

#include "core/quantized.h"
#include "ops/activation.h"
#include "ops/linear.h"
#include "ops/short_conv.h"
#include "ops/tile_order.h"

namespace deltafox {

Param xavier_projection(std::int64_t rows, std::int64_t columns) {
  const double bound = std::exp2(-2.5) * std::sqrt(6.0 / static_cast<double>(rows + columns));
  return Param::matrix({rows, columns}, Init::uniform(bound));
}

Init default_init(std::int64_t fan_in) {
  return Init::uniform(1 / std::sqrt(static_cast<double>(fan_in)));
}

Param depthwise_convolution(std::int64_t channels, std::int64_t width) {
  return Param::vector({channels, 1, width}, default_init(width));
}

ConstTensorView rows_of(const ConstTensorView& tensor, std::int64_t begin, std::int64_t count) {
  const bool vector = tensor.shape.rank() == 1;
  const std::int64_t columns = vector ? 1 : tensor.shape[1];
  // The bytes of the rows before; panels of a packed matrix, and sets of tiles, are cut at their
  // ends only.
  assert(!is_packed(tensor.dtype) || begin % kPanelRows == 0);
  assert(tensor.dtype != DType::kBF16Tiles ||
         (begin % kTileOrderRows == 0 &&
          (count % kTileOrderRows == 0 || begin + count == tensor.shape[0])));
  const std::size_t offset =
      begin == 0 ? 0 : bytes_of(tensor.dtype, vector ? Shape{begin} : Shape{begin, columns});
  return {static_cast<const std::byte*>(tensor.data) + offset, tensor.dtype,
          vector ? Shape{count} : Shape{count, columns}};
}

TensorView rows_of(const TensorView& tensor, std::int64_t begin, std::int64_t count) {
  const ConstTensorView rows = rows_of(ConstTensorView(tensor), begin, count);
  return {const_cast<void*>(rows.data), rows.dtype, rows.shape};
}

ConstTensorView joined(std::initializer_list<ConstTensorView> matrices) {
  ConstTensorView all = *matrices.begin();
  std::int64_t rows = 0;
  for (const ConstTensorView& matrix : matrices) {
    const Shape before{rows, all.shape[1]};
    const auto* const end = static_cast<const std::byte*>(all.data) + bytes_of(all.dtype, before);
    if (matrix.dtype != all.dtype || matrix.shape[1] != all.shape[1] || matrix.data != end) {
      return {};
    }
    rows += matrix.shape[0];
  }
  all.shape = {rows, all.shape[1]};
  return all;
}

TensorView columns_of(const TensorView& tensor, std::int64_t begin) {
  return {static_cast<std::byte*>(tensor.data) +
              static_cast<std::size_t>(begin) * size_of(tensor.dtype),
          tensor.dtype, tensor.shape};
}

TensorView copy_of(Context& ctx, ScratchScope& scratch, const ConstTensorView& from) {
  const TensorView to = scratch.tensor(from.shape, from.dtype);
  ctx.copy(to.data, from.data, static_cast<std::size_t>(from.shape.size()) * size_of(from.dtype));
  return to;
}

std::span<float*> zero_states(Context& ctx, ScratchScope& scratch, const Sequences& sequences,
                              const Shape& shape) {
  constexpr std::int64_t kAlignment = 64;  // elements
  const std::int64_t size = (shape.size() + kAlignment - 1) / kAlignment * kAlignment;
  const TensorView all = scratch.tensor({sequences.count(), size});
  ctx.zero(all.data, bytes_of(all.dtype, all.shape));
  const std::span<float*> pointers = scratch.array<float*>(sequences.count());
  for (std::size_t b = 0; b < pointers.size(); ++b) {
    pointers[b] = all.f32() + static_cast<std::int64_t>(b) * size;
  }
  return pointers;
}

TensorView project(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                   const ConstTensorView& w, const ConstTensorView& bias,
                   std::optional<DType> dtype) {
  const TensorView y =
      scratch.tensor({x.shape[0], w.shape[0]}, dtype.value_or(ctx.activation_dtype()));
  ops::linear(ctx, {.x = x, .w = w, .y = y, .bias = bias});
  return y;
}

void add_output(Context& ctx, const ConstTensorView& y, const Param& w, const ConstTensorView& bias,
                const TensorView& hidden) {
  if (hidden.data == nullptr) return;
  ops::linear(ctx, {.x = y, .w = w.value, .y = hidden, .accumulate = true, .bias = bias});
}

TensorView convolve(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                    const Param& conv, const ConstTensorView& bias, const Sequences& sequences,
                    std::span<float* const> states, Activation activation,
                    std::int64_t norm_width) {
  const TensorView y = scratch.tensor(x.shape, x.dtype);
  ops::short_conv(ctx, {.x = x,
                        .w = conv.value.reshaped({conv.shape[0], conv.shape[2]}),
                        .bias = bias,
                        .sequences = sequences,
                        .states = states,
                        .activation = activation,
                        .norm_width = norm_width,
                        .y = y});
  return y;
}

TensorView project_and_convolve(Context& ctx, ScratchScope& scratch, const ConstTensorView& x,
                                const Param& proj, const std::optional<Param>& conv,
                                const Sequences& sequences, std::span<float* const> states,
                                Activation activation, TensorView* projected,
                                std::optional<DType> dtype) {
  const TensorView y = project(ctx, scratch, x, proj.value, {}, dtype);
  if (projected != nullptr) *projected = y;
  if (conv) return convolve(ctx, scratch, y, *conv, {}, sequences, states, activation);
  if (activation != Activation::kIdentity) {
    if (projected != nullptr) *projected = copy_of(ctx, scratch, y);
    ops::activation(ctx, {.activation = activation, .x = y});
  }
  return y;
}

void convolve_backward(Context& ctx, const ConstTensorView& x, const Param& conv,
                       const std::optional<Param>& bias, const Sequences& sequences,
                       Activation activation, const TensorView& dy, const TensorView& dx,
                       Gradients& gradients, std::int64_t norm_width) {
  const Shape taps{conv.shape[0], conv.shape[2]};
  const TensorView dw = gradients.of(conv);
  ops::short_conv_backward(ctx, {.x = x,
                                 .w = conv.value.reshaped(taps),
                                 .bias = value_of(bias),
                                 .sequences = sequences,
                                 .activation = activation,
                                 .norm_width = norm_width,
                                 .dy = dy,
                                 .dx = dx,
                                 .dw = dw.reshaped(taps),
                                 .dbias = gradients.of(bias)});
}

void project_and_convolve_backward(Context& ctx, const ConstTensorView& x,
                                   const ConstTensorView& projected, const Param& proj,
                                   const std::optional<Param>& conv, const Sequences& sequences,
                                   Activation activation, const TensorView& dy,
                                   const TensorView& dx, bool accumulate_dx, Gradients& gradients,
                                   std::int64_t norm_width) {
  ScratchScope scratch(ctx);
  TensorView dprojected = dy;  // [T, N]
  if (conv) {
    dprojected = scratch.like(dy);
    convolve_backward(ctx, projected, *conv, std::nullopt, sequences, activation, dy, dprojected,
                      gradients, norm_width);
  } else if (activation != Activation::kIdentity) {
    ops::activation_backward(ctx, {.activation = activation, .x = projected, .dy = dy, .dx = dy});
  }
  ops::linear_backward(ctx, {.dy = dprojected,
                             .x = x,
                             .w = proj.value,
                             .dx = dx,
                             .accumulate_dx = accumulate_dx,
                             .dw = gradients.sum_of(proj)});
}

}  // namespace deltafox
