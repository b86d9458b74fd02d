#include "model/causal_lm.h"

#include <algorithm>

#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/step.h"

namespace deltafox {
namespace {

// What the layer's mixer keeps of the sequences.
template <typename M>
std::span<typename M::State*> states_of(ScratchScope& scratch, const M& /*mixer*/,
                                        std::span<SequenceState* const> states, std::size_t layer) {
  using State = typename M::State;
  const std::span<State*> of_layer =
      scratch.array<State*>(static_cast<std::int64_t>(states.size()));
  for (std::size_t b = 0; b < states.size(); ++b) {
    of_layer[b] = &std::get<State>(states[b]->layers[layer]);
  }
  return of_layer;
}

template <typename M>
void mix(Context& ctx, const M& mixer, const ConstTensorView& x, const Sequences& sequences,
         std::span<SequenceState* const> states, std::size_t layer, const TensorView& hidden) {
  ScratchScope scratch(ctx);
  mixer.forward(ctx, x, sequences, states_of(scratch, mixer, states, layer), hidden);
}

}  // namespace

CausalLM::CausalLM(const Config& config, std::vector<Layer> layers, std::vector<IdleParam> idle)
    : config_(config),
      embeddings_(Param::matrix({config.vocab_size, config.hidden_size}, config.embedding_init)),
      layers_(std::move(layers)),
      idle_(std::move(idle)),
      norm_(Param::vector({config.hidden_size}, Init::constant(1))) {
  if (!config.tie_word_embeddings) {
    lm_head_ = Param::matrix({config.vocab_size, config.hidden_size},
                             config.lm_head_init.value_or(config.embedding_init));
  }
}

void CausalLM::forward(Context& ctx, std::span<const std::int32_t> ids, const Sequences& sequences,
                       std::span<SequenceState* const> states, const TensorView& hidden,
                       const LayerHook& hook) const {
  ScratchScope scratch(ctx);
  const TensorView normed = scratch.activation(hidden.shape);  // [T, C]
  // What a mixer or MLP reads: the normed stream, or with norm_first the stream itself.
  const auto input = [&](const std::optional<Param>& norm) -> ConstTensorView {
    if (!norm) return hidden;
    ops::rms_norm(ctx, {.x = hidden, .w = norm->value, .y = normed, .eps = config_.norm_eps});
    return normed;
  };
  ops::embedding(ctx, {.ids = ids, .table = embeddings_.value, .y = hidden});
  if (!hook && sequences.tokens() == sequences.count() && has_step(ctx, sequences.count())) {
    return step(ctx, states, hidden);
  }
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    if (hook) hook(static_cast<std::int64_t>(l), hidden);
    const Layer& layer = layers_[l];
    const ConstTensorView x = input(layer.mixer_norm);
    std::visit([&](const auto& mixer) { mix(ctx, mixer, x, sequences, states, l, hidden); },
               layer.mixer);
    if (layer.mlp) layer.mlp->forward(ctx, input(layer.mlp_norm), hidden);
  }
  if (hook) hook(num_layers(), hidden);
  for (std::size_t b = 0; b < states.size(); ++b) {
    states[b]->position += sequences.length(static_cast<std::int64_t>(b));
  }
}

bool CausalLM::has_step(const Context& ctx, std::int64_t count) const {
  if (ctx.device() == Device::kCpu || ctx.activation_dtype() != DType::kBF16 ||
      count > kStepLinearRows) {
    return false;
  }
  return std::all_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
    const bool mixes = std::visit(
        [](const auto& mixer) {
          if constexpr (requires { mixer.has_step(); }) return mixer.has_step();
          return false;
        },
        layer.mixer);
    return mixes && layer.mixer_norm && (!layer.mlp || layer.mlp->has_step());
  });
}

bool CausalLM::replayable() const {
  return std::none_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
    return std::holds_alternative<AttentionMixer>(layer.mixer);
  });
}

void CausalLM::reserve(SequenceState& state, std::int64_t tokens) const {
  for (MixerState& layer : state.layers) {
    if (auto* attention = std::get_if<AttentionMixer::State>(&layer)) {
      attention->cache.reserve(tokens);
    }
  }
}

void CausalLM::advance(SequenceState& state) const {
  ++state.position;
  for (MixerState& layer : state.layers) {
    if (auto* attention = std::get_if<AttentionMixer::State>(&layer)) attention->cache.extend(1);
  }
}

void CausalLM::step(Context& ctx, std::span<SequenceState* const> states,
                    const TensorView& hidden) const {
  ScratchScope scratch(ctx);
  ops::StepProgram program(ctx);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    std::visit(
        [&](const auto& mixer) {
          if constexpr (requires { mixer.has_step(); }) {
            mixer.step(ctx, layer.mixer_norm->value, config_.norm_eps,
                       states_of(scratch, mixer, states, l), hidden);
          }
        },
        layer.mixer);
    if (layer.mlp) layer.mlp->step(ctx, layer.mlp_norm->value, config_.norm_eps, hidden);
  }
  program.run();
  for (SequenceState* state : states) ++state->position;
}

void CausalLM::final_norm(Context& ctx, const ConstTensorView& x, const TensorView& y) const {
  ops::rms_norm(ctx, {.x = x, .w = norm_.value, .y = y, .eps = config_.norm_eps});
}

void CausalLM::head(Context& ctx, const ConstTensorView& x, const TensorView& logits) const {
  ops::linear(ctx, {.x = x, .w = lm_head_ ? lm_head_->value : embeddings_.value, .y = logits});
}

void CausalLM::norm_and_head(Context& ctx, const ConstTensorView& x,
                             const TensorView& logits) const {
  if (has_step(ctx, x.shape[0])) {
    const StepLinearPart part{.w = lm_head_ ? lm_head_->value : embeddings_.value, .y = logits};
    return ops::step_linear(
        ctx, {.x = x, .norm = norm_.value, .norm_eps = config_.norm_eps, .parts = {&part, 1}});
  }
  ScratchScope scratch(ctx);
  const TensorView normed = scratch.activation(x.shape);  // [R, C]
  final_norm(ctx, x, normed);
  head(ctx, normed, logits);
}

void CausalLM::split_gate_and_up() {
  for (Layer& layer : layers_) {
    if (layer.mlp) layer.mlp->split_gate_and_up();
  }
}

SequenceState CausalLM::new_state(Device device, DType activation_dtype) const {
  SequenceState state;
  state.device = device;
  state.layers.reserve(layers_.size());
  for (const Layer& layer : layers_) {
    state.layers.push_back(std::visit(
        [&](const auto& mixer) -> MixerState { return mixer.new_state(device, activation_dtype); },
        layer.mixer));
  }
  return state;
}

}  // namespace deltafox
