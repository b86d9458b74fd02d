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

// What a layer's backward needs, in the context's kept memory.
struct CausalLM::LayerSaved {
  using MixerSaved = std::variant<DeltaNetMixer::Saved, AttentionMixer::Saved, Hgrn2Mixer::Saved,
                                  Mamba2Mixer::Saved, MambaMixer::Saved>;
  TensorView stream;  // [T, C] what the layer read; behind the mixer it is computed again
  MixerSaved mixer;
  Mlp::Saved mlp;
};

// The gradient of the residual stream.
struct CausalLM::StreamGradient {
  TensorView exact;    // [T, C] F32
  TensorView rounded;  // [T, C] BF16, the same for products to read; or no data
};

ConstTensorView CausalLM::layer_input(Context& ctx, ScratchScope& scratch,
                                      const std::optional<Param>& norm,
                                      const ConstTensorView& stream) const {
  if (!norm) return stream;
  const TensorView y = scratch.activation(stream.shape);
  ops::rms_norm(ctx, {.x = stream, .w = norm->value, .y = y, .eps = config_.norm_eps});
  return y;
}

void CausalLM::forward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                             const TensorView& in, const TensorView& out, LayerSaved& saved) const {
  ScratchScope scratch(ctx);
  // What the MLP reads lies where it adds, if it does.
  const bool only_saved = out.data == nullptr && layer.mlp.has_value();
  const TensorView between = only_saved ? scratch.tensor(in.shape) : out;  // [T, C]
  {
    ScratchScope mixer_scratch(ctx);
    const ConstTensorView x = layer_input(ctx, mixer_scratch, layer.mixer_norm, in);
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
          mixer.forward(ctx, x, sequences, pointers, between,
                        &saved.mixer.template emplace<Saved>(), in);
        },
        layer.mixer);
  }
  saved.stream = in;
  if (!layer.mlp) return;
  const ConstTensorView x = layer_input(ctx, scratch, layer.mlp_norm, between);
  layer.mlp->forward(ctx, x, out, &saved.mlp);
}

void CausalLM::backward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                              LayerSaved& saved, const StreamGradient& dhidden,
                              Gradients& gradients) const {
  // backward(x, dy, dx) of what read the stream through a norm; or, with the norm inside, adds to
  // dhidden itself.
  const auto through = [&](const std::optional<Param>& norm, const TensorView& stream,
                           const auto& backward) {
    if (!norm) return backward(stream, dhidden.exact, dhidden.exact);
    ScratchScope norm_scratch(ctx);
    const ConstTensorView x = layer_input(ctx, norm_scratch, norm, stream);  // [T, C]
    const TensorView dx = norm_scratch.activation(stream.shape);             // [T, C]
    backward(x, dhidden.rounded.data != nullptr ? dhidden.rounded : dhidden.exact, dx);
    ops::rms_norm_backward(ctx, {.x = stream,
                                 .w = norm->value,
                                 .eps = config_.norm_eps,
                                 .dy = dx,
                                 .dx = dhidden.exact,
                                 .accumulate_dx = true,
                                 .rounded = dhidden.rounded,
                                 .dw = gradients.of(norm)});
  };
  ScratchScope scratch(ctx);
  const auto with_mixer = [&](const auto& f) {
    std::visit(
        [&]<typename M>(const M& mixer) { f(mixer, std::get<typename M::Saved>(saved.mixer)); },
        layer.mixer);
  };
  with_mixer([&](const auto& mixer, auto& kept) { mixer.restore_output(ctx, scratch, kept); });
  if (layer.mlp) {
    ScratchScope mlp_scratch(ctx);
    const TensorView between = mlp_scratch.tensor(saved.stream.shape);  // [T, C]
    with_mixer(
        [&](const auto& mixer, auto& kept) { mixer.add_again(ctx, kept, saved.stream, between); });
    through(layer.mlp_norm, between,
            [&](const ConstTensorView& x, const TensorView& dy, const TensorView& dx) {
              layer.mlp->backward(ctx, x, saved.mlp, dy, dx, gradients);
            });
  }
  through(layer.mixer_norm, saved.stream,
          [&](const ConstTensorView& x, const TensorView& dy, const TensorView& dx) {
            with_mixer([&](const auto& mixer, auto& kept) {
              mixer.backward(ctx, x, sequences, kept, dy, dx, gradients);
            });
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
                               .dw = gradients.of(weight)});
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
  // With recomputation layers give back what they kept, and keep it once more on the way back: that
  // way both times compute the same bits.
  std::vector<TensorView> inputs;  // of the layers, [T, C]
  std::vector<LayerSaved> saved(layers_.size());
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    inputs.push_back(hidden);
    hidden = kept_scratch.tensor(stream);
    std::optional<KeptScope> of_layer;
    if (options.recompute) of_layer.emplace(ctx);
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
  if (const TensorView dtable = gradients.of(embeddings_); dtable.data != nullptr) {
    ops::embedding_backward(ctx, {.ids = ids, .dy = dhidden.exact, .dtable = dtable});
  }
}

}  // namespace deltafox
