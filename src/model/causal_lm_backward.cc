// The loss and its gradients: forward with what backward needs kept, or computed once more block by
// block; then the head, the layers from the last to the first, and the embedding.
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

TensorView rows_at(const TensorView& x, std::int64_t begin, std::int64_t count) {
  return {x.f32() + begin * x.shape[1], DType::kF32, {count, x.shape[1]}};
}

}  // namespace

// What a layer's backward needs, in scratch memory of the caller's.
struct CausalLM::LayerSaved {
  using MixerSaved = std::variant<DeltaNetMixer::Saved, AttentionMixer::Saved, Hgrn2Mixer::Saved,
                                  Mamba2Mixer::Saved, MambaMixer::Saved>;
  TensorView before_mixer;  // [T, C] the residual stream
  TensorView mixer_input;   // [T, C] normed, or the same
  MixerSaved mixer;
  TensorView before_mlp;  // [T, C] the residual stream
  TensorView mlp_input;   // [T, C] normed, or the same
  Mlp::Saved mlp;
};

void CausalLM::forward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                             const TensorView& hidden, LayerSaved* saved) const {
  // Without `saved` the memory goes with this call.
  ScratchScope scratch(ctx, saved != nullptr);
  const auto input = [&](const std::optional<Param>& norm, const ConstTensorView& x) {
    const TensorView y = norm ? scratch.tensor(x.shape) : copy_of(ctx, scratch, x);
    if (norm) ops::rms_norm(ctx, {.x = x, .w = norm->value, .y = y, .eps = config_.norm_eps});
    return y;
  };
  if (saved != nullptr) saved->before_mixer = copy_of(ctx, scratch, hidden);
  const TensorView x = input(layer.mixer_norm, hidden);
  std::visit(
      [&]<typename M>(const M& mixer) {
        using State = typename M::State;
        std::vector<State> states;
        std::vector<State*> pointers;
        states.reserve(static_cast<std::size_t>(sequences.count()));
        for (std::int64_t b = 0; b < sequences.count(); ++b) {
          pointers.push_back(&states.emplace_back(mixer.new_state()));
        }
        using OfMixer = typename M::Saved;
        OfMixer* of_mixer = saved != nullptr ? &saved->mixer.template emplace<OfMixer>() : nullptr;
        mixer.forward(ctx, x, sequences, pointers, hidden, of_mixer);
      },
      layer.mixer);
  if (saved != nullptr) saved->mixer_input = x;
  if (!layer.mlp) return;
  if (saved != nullptr) saved->before_mlp = copy_of(ctx, scratch, hidden);
  const TensorView mlp_x = input(layer.mlp_norm, hidden);
  layer.mlp->forward(ctx, mlp_x, hidden, saved != nullptr ? &saved->mlp : nullptr);
  if (saved != nullptr) saved->mlp_input = mlp_x;
}

void CausalLM::backward_layer(Context& ctx, const Layer& layer, const Sequences& sequences,
                              const LayerSaved& saved, const TensorView& dhidden,
                              Gradients& gradients) const {
  ScratchScope scratch(ctx);
  const TensorView dnormed = scratch.tensor(dhidden.shape);  // [T, C]
  // backward(dx) of what read the stream x through a norm; or, with the norm inside, adds to
  // dhidden itself.
  const auto through = [&](const std::optional<Param>& norm, const TensorView& x,
                           const auto& backward) {
    backward(norm ? dnormed : dhidden);
    if (!norm) return;
    ops::rms_norm_backward(ctx, {.x = x,
                                 .w = norm->value,
                                 .eps = config_.norm_eps,
                                 .dy = dnormed,
                                 .dx = dhidden,
                                 .accumulate_dx = true,
                                 .dw = gradients.of(norm)});
  };
  if (layer.mlp) {
    through(layer.mlp_norm, saved.before_mlp, [&](const TensorView& dx) {
      layer.mlp->backward(ctx, saved.mlp_input, saved.mlp, dhidden, dx, gradients);
    });
  }
  through(layer.mixer_norm, saved.before_mixer, [&](const TensorView& dx) {
    std::visit(
        [&]<typename M>(const M& mixer) {
          mixer.backward(ctx, saved.mixer_input, sequences,
                         std::get<typename M::Saved>(saved.mixer), dhidden, dx, gradients);
        },
        layer.mixer);
  });
}

void CausalLM::head_backward(Context& ctx, const TensorView& hidden,
                             std::span<const std::int32_t> labels, float scale,
                             std::span<float> loss, const TensorView& dhidden,
                             Gradients& gradients) const {
  const std::int64_t rows = hidden.shape[0];
  const Param& weight = lm_head_ ? *lm_head_ : embeddings_;
  ScratchScope scratch(ctx);
  const TensorView normed = scratch.tensor(hidden.shape);   // [T, C]
  const TensorView dnormed = scratch.tensor(hidden.shape);  // [T, C]
  const TensorView memory = scratch.tensor({std::min(rows, kHeadRows), config_.vocab_size});
  final_norm(ctx, hidden, normed);
  for (std::int64_t begin = 0; begin < rows; begin += kHeadRows) {
    const std::int64_t count = std::min(kHeadRows, rows - begin);
    const auto at = static_cast<std::size_t>(begin);
    const TensorView x = rows_at(normed, begin, count);
    const TensorView logits = rows_at(memory, 0, count);
    head(ctx, x, logits);
    ops::cross_entropy_backward(ctx, {.logits = logits,
                                      .labels = labels.subspan(at, static_cast<std::size_t>(count)),
                                      .scale = scale,
                                      .loss = loss.subspan(at, static_cast<std::size_t>(count))});
    ops::linear_backward(ctx, {.dy = logits,
                               .x = x,
                               .w = weight.value,
                               .dx = rows_at(dnormed, begin, count),
                               .dw = gradients.of(weight)});
  }
  ops::rms_norm_backward(ctx, {.x = hidden,
                               .w = norm_.value,
                               .eps = config_.norm_eps,
                               .dy = dnormed,
                               .dx = dhidden,
                               .dw = gradients.of(norm_)});
}

void CausalLM::forward_backward(Context& ctx, std::span<const std::int32_t> ids,
                                const Sequences& sequences, std::span<const std::int32_t> labels,
                                float scale, std::span<float> loss, Gradients& gradients,
                                const BackwardOptions& options) const {
  const std::int64_t tokens = sequences.tokens();
  ScratchScope scratch(ctx);
  const TensorView hidden = scratch.tensor({tokens, config_.hidden_size});   // [T, C]
  const TensorView dhidden = scratch.tensor({tokens, config_.hidden_size});  // [T, C]
  ops::embedding(ctx, {.ids = ids, .table = embeddings_.value, .y = hidden});
  // What layers read, for those that are computed once more; else what they keep.
  std::vector<TensorView> inputs;
  std::vector<LayerSaved> saved(options.recompute ? 0 : layers_.size());
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    if (options.recompute) inputs.push_back(copy_of(ctx, scratch, hidden));
    forward_layer(ctx, layers_[l], sequences, hidden, options.recompute ? nullptr : &saved[l]);
  }
  head_backward(ctx, hidden, labels, scale, loss, dhidden, gradients);
  for (std::size_t l = layers_.size(); l-- > 0;) {
    if (!options.recompute) {
      backward_layer(ctx, layers_[l], sequences, saved[l], dhidden, gradients);
      continue;
    }
    ScratchScope layer_scratch(ctx);
    LayerSaved once_more;
    forward_layer(ctx, layers_[l], sequences, inputs[l], &once_more);
    backward_layer(ctx, layers_[l], sequences, once_more, dhidden, gradients);
  }
  if (const TensorView dtable = gradients.of(embeddings_); dtable.data != nullptr) {
    ops::embedding_backward(ctx, {.ids = ids, .dy = dhidden, .dtable = dtable});
  }
}

}  // namespace deltafox
