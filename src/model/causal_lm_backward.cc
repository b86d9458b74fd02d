// The loss and its gradients: forward with what backward needs kept, or computed once more block by
// block; then the head, the layers from the last to the first, and the embedding.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "model/blocks/projection.h"
#include "model/causal_lm.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace deltafox {
namespace {

// Rows of logits in memory at a time. Every piece passes by the head's gradient once, which fewer
// rows would not pay for.
constexpr std::int64_t kHeadRows = 512;
constexpr std::int64_t kGpuHeadRows = 4096;
// A GPU's products are several times as fast where rows start aligned.
constexpr std::int64_t kGpuColumns = 8;

}  // namespace

// What a mixer or MLP reads of the stream, in the context's kept memory: the normed stream, from
// which the gradient of the stream can be found with the scales alone; or with norm_first a copy.
struct CausalLM::LayerInput {
  TensorView x;       // [T, C]
  TensorView scales;  // [T] of the norm, or no data
};

// What a layer's backward needs, in the context's kept memory.
struct CausalLM::LayerSaved {
  using MixerSaved = std::variant<DeltaNetMixer::Saved, AttentionMixer::Saved, Hgrn2Mixer::Saved,
                                  Mamba2Mixer::Saved, MambaMixer::Saved>;
  LayerInput mixer_input;
  MixerSaved mixer;
  LayerInput mlp_input;
  Mlp::Saved mlp;
};

// The gradient of the residual stream.
struct CausalLM::StreamGradient {
  TensorView exact;    // [T, C] F32
  TensorView rounded;  // [T, C] BF16, the same for products to read; or no data
};

CausalLM::LayerInput CausalLM::layer_input(Context& ctx, const std::optional<Param>& norm,
                                           const TensorView& stream) const {
  ScratchScope kept(ctx, true);
  if (!norm) return {.x = copy_of(ctx, kept, stream), .scales = {}};
  const LayerInput input{.x = kept.activation(stream.shape),
                         .scales = kept.tensor({stream.shape[0]})};
  ops::rms_norm(ctx, {.x = stream,
                      .w = norm->value,
                      .y = input.x,
                      .scales = input.scales,
                      .eps = config_.norm_eps});
  return input;
}

void CausalLM::forward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                             const TensorView& in, const TensorView& out, LayerSaved& saved) const {
  ScratchScope scratch(ctx);
  // What the MLP reads lies where it adds, if it does.
  const bool only_saved = out.data == nullptr && layer.mlp.has_value();
  const TensorView between = only_saved ? scratch.tensor(in.shape) : out;  // [T, C]
  saved.mixer_input = layer_input(ctx, layer.mixer_norm, in);
  if (between.data != nullptr && between.data != in.data) {  // the mixer adds to it
    ctx.copy(between.data, in.data, bytes_of(in.dtype, in.shape));
  }
  std::visit(
      [&]<typename M>(const M& mixer) {
        using Saved = typename M::Saved;
        // Attention reads keys and values from its cache; the others begin by themselves.
        std::vector<typename M::State> states;
        std::vector<typename M::State*> pointers;
        if constexpr (std::is_same_v<M, AttentionMixer>) {
          states.reserve(static_cast<std::size_t>(sequences.count()));
          for (std::int64_t b = 0; b < sequences.count(); ++b) {
            states.push_back(mixer.new_state(ctx.device(), ctx.activation_dtype()));
            pointers.push_back(&states.back());
          }
        }
        mixer.forward(ctx, saved.mixer_input.x, sequences, pointers, between,
                      &saved.mixer.template emplace<Saved>());
      },
      layer.mixer);
  if (!layer.mlp) return;
  saved.mlp_input = layer_input(ctx, layer.mlp_norm, between);
  layer.mlp->forward(ctx, saved.mlp_input.x, out, &saved.mlp);
}

void CausalLM::backward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                              const LayerSaved& saved, const StreamGradient& dhidden,
                              Gradients& gradients) const {
  // backward(x, dy, dx) of what read the stream through a norm; or, with the norm inside, adds to
  // dhidden itself.
  const auto through = [&](const std::optional<Param>& norm, const LayerInput& input,
                           const auto& backward) {
    if (!norm) return backward(input.x, dhidden.exact, dhidden.exact);
    ScratchScope scratch(ctx);
    const TensorView dx = scratch.activation(input.x.shape);  // [T, C]
    backward(input.x, dhidden.rounded.data != nullptr ? dhidden.rounded : dhidden.exact, dx);
    ops::rms_norm_backward(ctx, {.y = input.x,
                                 .scales = input.scales,
                                 .w = norm->value,
                                 .dy = dx,
                                 .dx = dhidden.exact,
                                 .accumulate_dx = true,
                                 .rounded = dhidden.rounded,
                                 .dw = gradients.of(norm)});
  };
  if (layer.mlp) {
    through(layer.mlp_norm, saved.mlp_input,
            [&](const ConstTensorView& x, const TensorView& dy, const TensorView& dx) {
              layer.mlp->backward(ctx, x, saved.mlp, dy, dx, gradients);
            });
  }
  through(layer.mixer_norm, saved.mixer_input,
          [&](const ConstTensorView& x, const TensorView& dy, const TensorView& dx) {
            std::visit(
                [&]<typename M>(const M& mixer) {
                  mixer.backward(ctx, x, sequences, std::get<typename M::Saved>(saved.mixer), dy,
                                 dx, gradients);
                },
                layer.mixer);
          });
}

void CausalLM::head_backward(Context& ctx, const TensorView& hidden,
                             std::span<const std::int32_t> labels, float scale,
                             std::span<float> loss, const StreamGradient& dhidden,
                             Gradients& gradients) const {
  const bool on_gpu = ctx.device() == Device::kCuda;
  const std::int64_t rows = hidden.shape[0];
  const std::int64_t at_once = std::min(rows, on_gpu ? kGpuHeadRows : kHeadRows);
  const std::int64_t columns =
      on_gpu ? (config_.vocab_size + kGpuColumns - 1) / kGpuColumns * kGpuColumns
             : config_.vocab_size;
  const Param& weight = lm_head_ ? *lm_head_ : embeddings_;
  ScratchScope scratch(ctx);
  const TensorView normed = scratch.activation(hidden.shape);        // [T, C]
  const TensorView dnormed = scratch.activation(hidden.shape);       // [T, C]
  const TensorView memory = scratch.activation({at_once, columns});  // logits and their gradient
  final_norm(ctx, hidden, normed);
  for (std::int64_t begin = 0; begin < rows; begin += at_once) {
    const std::int64_t count = std::min(at_once, rows - begin);
    const auto at = static_cast<std::size_t>(begin);
    const TensorView x = rows_of(normed, begin, count);
    const TensorView logits = rows_of(memory, 0, count);
    head(ctx, x, logits);
    ops::cross_entropy_backward(ctx, {.logits = logits,
                                      .classes = config_.vocab_size,
                                      .labels = labels.subspan(at, static_cast<std::size_t>(count)),
                                      .scale = scale,
                                      .loss = loss.subspan(at, static_cast<std::size_t>(count))});
    ops::linear_backward(ctx, {.dy = logits,
                               .x = x,
                               .w = weight.value,
                               .dx = rows_of(dnormed, begin, count),
                               .dw = gradients.sum_of(weight)});
  }
  ops::rms_norm_backward(ctx, {.x = hidden,
                               .w = norm_.value,
                               .eps = config_.norm_eps,
                               .dy = dnormed,
                               .dx = dhidden.exact,
                               .rounded = dhidden.rounded,
                               .dw = gradients.of(norm_)});
}

void CausalLM::forward_backward(Context& ctx, std::span<const std::int32_t> ids,
                                const Sequences& sequences, std::span<const std::int32_t> labels,
                                float scale, std::span<float> loss, Gradients& gradients,
                                const BackwardOptions& options) const {
  const Shape stream{sequences.tokens(), config_.hidden_size};
  // What norms hand down is rounded on the way; inside of blocks they do not.
  const bool rounds = ctx.activation_dtype() != DType::kF32 &&
                      std::all_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
                        return layer.mixer_norm && (!layer.mlp || layer.mlp_norm);
                      });
  KeptScope kept(ctx);
  ScratchScope kept_scratch(ctx, true);
  ScratchScope scratch(ctx);
  TensorView hidden = kept_scratch.tensor(stream);  // [T, C]
  ops::embedding(ctx, {.ids = ids, .table = embeddings_.value, .y = hidden});
  // With recomputation layers give back what they kept but their input, and keep it once more on
  // the way back: that way both times compute the same bits.
  std::vector<TensorView> inputs;  // of the layers, [T, C]
  std::vector<LayerSaved> saved(layers_.size());
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    inputs.push_back(hidden);
    std::optional<KeptScope> of_layer;
    if (options.recompute) {
      hidden = kept_scratch.tensor(stream);
      of_layer.emplace(ctx);
    }
    forward_layer(ctx, layers_[l], sequences, inputs[l], hidden, saved[l]);
  }
  const StreamGradient dhidden{
      .exact = scratch.tensor(stream),
      .rounded = rounds ? scratch.activation(stream) : TensorView{},
  };
  head_backward(ctx, hidden, labels, scale, loss, dhidden, gradients);
  for (std::size_t l = layers_.size(); l-- > 0;) {
    std::optional<KeptScope> of_layer;
    if (options.recompute) {
      of_layer.emplace(ctx);
      forward_layer(ctx, layers_[l], sequences, inputs[l], {}, saved[l]);
    }
    backward_layer(ctx, layers_[l], sequences, saved[l], dhidden, gradients);
  }
  if (const TensorView dtable = gradients.zeroed(ctx, embeddings_); dtable.data != nullptr) {
    ops::embedding_backward(ctx, {.ids = ids, .dy = dhidden.exact, .dtable = dtable});
  }
  gradients.settle(ctx);
}

}  // namespace deltafox
