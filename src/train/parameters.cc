#include "train/parameters.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/init.h"
#include "model/loader.h"
#include "model/registry.h"
#include "ops/adamw.h"

namespace deltafox::train {
namespace {

constexpr std::int64_t kPiece = std::int64_t{1} << 16;  // elements a task

// visit(begin, count) for pieces of `size` elements, in parallel.
template <typename Visit>
void for_pieces(ThreadPool& threads, std::int64_t size, Visit&& visit) {
  threads.parallel_for((size + kPiece - 1) / kPiece, [&](std::int64_t task) {
    visit(task * kPiece, std::min(kPiece, size - task * kPiece));
  });
}

}  // namespace

bool decays(std::string_view name, const DecayRule& rule) {
  // What the official layers mark: parameters that are no weight of a linear map.
  constexpr std::array<std::string_view, 5> kNever{"A_log", "D", "dt_bias", "lower_bounds",
                                                   "fgate_bias"};
  const std::string_view last = name.substr(name.rfind('.') + 1);
  if (std::find(kNever.begin(), kNever.end(), last) != kNever.end()) return false;
  const bool is_bias = last == "bias";
  const std::string_view owner = name.substr(0, name.size() - last.size());
  if (owner.ends_with("conv1d.")) return rule.convolution && (!is_bias || rule.bias);
  const bool is_norm = owner.ends_with("norm.") || owner.ends_with("norm_f.");
  if (is_norm) return rule.normalization && (!is_bias || rule.bias);
  return !is_bias || rule.bias;
}

Parameters::Parameters(const std::string& config_json, const DecayRule& rule)
    : config_json_(config_json),
      model_(std::make_unique<CausalLM>(
          build_model(io::JsonObject::parse(config_json, "the model's config")))),
      gradients_(std::make_unique<Gradients>(*model_)) {
  model_->visit_params([&](const std::string& name, Param& param) {
    Entry entry{.name = name, .weight = Tensor(DType::kF32, param.shape)};
    entry.trained = param.trainable;
    entry.decayed = decays(name, rule);
    if (param.trainable) {
      entry.m = Tensor(DType::kF32, param.shape);
      entry.v = Tensor(DType::kF32, param.shape);
      entry.gradient = gradients_->of(param);
    }
    entries_.push_back(std::move(entry));
  });
  std::size_t i = 0;
  model_->visit_params(
      [&](const std::string&, Param& param) { param.value = entries_[i++].weight.view(); });
}

std::int64_t Parameters::size() const {
  std::int64_t total = 0;
  for (const Entry& entry : entries_) {
    if (entry.trained) total += entry.weight.view().shape.size();
  }
  return total;
}

std::int64_t Parameters::non_embedding_size() const {
  std::int64_t total = size();
  for (const Entry& entry : entries_) {
    if (entry.name == model_->config().names.embeddings) total -= entry.weight.view().shape.size();
  }
  return total;
}

void Parameters::initialise(std::uint64_t seed, ThreadPool& threads) {
  std::uint32_t index = 0;
  model_->visit_params([&](const std::string&, Param& param) {
    float* const weight = entries_[index].weight.f32();
    for_pieces(threads, param.shape.size(), [&](std::int64_t begin, std::int64_t n) {
      initial_values(param, seed, index, begin, {weight + begin, static_cast<std::size_t>(n)});
    });
    ++index;
  });
}

void Parameters::load(const std::string& directory, ThreadPool& threads) {
  // A model of its own: checkpoints may spread weights otherwise than ours, and loading knows how.
  const io::Checkpoint checkpoint = io::Checkpoint::open(directory);
  CausalLM source = build_model(io::JsonObject::parse(config_json_, "the model's config"));
  const std::vector<Tensor> buffers = bind_params(source, checkpoint, DType::kF32, threads);
  std::size_t i = 0;
  source.visit_params([&](const std::string& name, Param& param) {
    if (i >= entries_.size() || entries_[i].name != name) {
      fail("{}: tensor '{}' is not how the model to train keeps its weights", directory, name);
    }
    std::memcpy(entries_[i].weight.f32(), param.value.f32(), entries_[i].weight.bytes());
    ++i;
  });
}

double Parameters::step(Context& ctx, const OptimizerConfig& optimizer, double lr,
                        double max_grad_norm, std::int64_t step) {
  double squares = 0;
  for (const Entry& entry : entries_) {
    if (entry.trained) squares += ops::sum_of_squares(ctx, entry.gradient);
  }
  const double norm = std::sqrt(squares);
  if (!std::isfinite(norm)) return norm;
  // As torch.nn.utils.clip_grad_norm_ does.
  const double scale = std::min(1.0, max_grad_norm / (norm + 1e-6));
  for (Entry& entry : entries_) {
    if (!entry.trained) continue;
    ops::adamw(ctx, {.grad = entry.gradient,
                     .w = entry.weight.view(),
                     .m = entry.m.view(),
                     .v = entry.v.view(),
                     .lr = lr,
                     .beta1 = optimizer.betas[0],
                     .beta2 = optimizer.betas[1],
                     .eps = optimizer.eps,
                     .weight_decay = entry.decayed ? optimizer.weight_decay : 0,
                     .scale = scale,
                     .step = step});
  }
  return norm;
}

}  // namespace deltafox::train
