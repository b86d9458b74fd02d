#include "train/parameters.h"

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/float_convert.h"
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

Parameters::Parameters(Context& ctx, const std::string& config_json, const DecayRule& rule,
                       DType matrices)
    : ctx_(ctx),
      config_json_(config_json),
      model_(std::make_unique<CausalLM>(
          build_model(io::JsonObject::parse(config_json, "the model's config")))),
      gradients_(std::make_unique<Gradients>(*model_, ctx.device())),
      norm_(DType::kF32, {1}, ctx.device()) {
  const Device device = ctx.device();
  model_->visit_params([&](const std::string& name, Param& param) {
    Entry entry{.name = name, .param = &param, .weight = Tensor(DType::kF32, param.shape, device)};
    entry.trained = param.trainable;
    entry.decayed = decays(name, rule);
    if (param.read_on_host && device != Device::kCpu) entry.host = Tensor(DType::kF32, param.shape);
    if (param.trainable) {
      entry.m = Tensor(DType::kF32, param.shape, device);
      entry.v = Tensor(DType::kF32, param.shape, device);
      entry.gradient = gradients_->of(param);
    }
    entries_.push_back(std::move(entry));
  });
  if (matrices == DType::kBF16) place_copies();
  for (Entry& entry : entries_) {
    const bool is_copy = entry.rounded.data != nullptr;
    entry.param->value = is_copy ? entry.rounded : entry.weight.view();
    entry.param->in_one_piece = is_copy;
    if (entry.host.bytes() > 0) entry.param->host = entry.host.view();
  }
}

void Parameters::place_copies() {
  constexpr std::int64_t kAlignment = 128;  // elements
  const auto padded = [](const Param& param) {
    return (param.padded_shape().size() + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::int64_t total = 0;
  for (const Entry& entry : entries_) {
    if (entry.param->is_matrix) total += padded(*entry.param);
  }
  copies_ = Tensor(DType::kBF16, {total}, ctx_.device());
  auto* to = static_cast<std::byte*>(copies_.view().data);
  for (Entry& entry : entries_) {
    if (!entry.param->is_matrix) continue;
    entry.rounded = {to, DType::kBF16, entry.param->shape};
    to += static_cast<std::size_t>(padded(*entry.param)) * size_of(DType::kBF16);
  }
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

void Parameters::refresh_host(Entry& entry) const {
  if (entry.host.bytes() > 0) entry.weight.write_to(entry.host.f32());
}

void Parameters::set_weight(Entry& entry, const float* values) {
  entry.weight.read_from(values);
  refresh_host(entry);
  if (entry.rounded.data == nullptr) return;
  Tensor rounded(DType::kBF16, entry.param->shape);
  auto* const to = static_cast<std::byte*>(rounded.view().data);
  for_pieces(ctx_.threads(), entry.param->shape.size(), [&](std::int64_t begin, std::int64_t n) {
    convert({values + begin, DType::kF32, {n}},
            {to + static_cast<std::size_t>(begin) * size_of(DType::kBF16), DType::kBF16, {n}});
  });
  ctx_.copy(entry.rounded.data, to, rounded.bytes());
  ctx_.synchronize();  // `to` is gone behind this
}

void Parameters::initialise(std::uint64_t seed) {
  std::uint32_t index = 0;
  for (Entry& entry : entries_) {
    Tensor values(DType::kF32, entry.param->shape);
    for_pieces(ctx_.threads(), entry.param->shape.size(), [&](std::int64_t begin, std::int64_t n) {
      initial_values(*entry.param, seed, index, begin,
                     {values.f32() + begin, static_cast<std::size_t>(n)});
    });
    set_weight(entry, values.f32());
    ++index;
  }
}

void Parameters::load(const std::string& directory) {
  // A model of its own: checkpoints may spread weights otherwise than ours, and loading knows how.
  const io::Checkpoint checkpoint = io::Checkpoint::open(directory);
  CausalLM source = build_model(io::JsonObject::parse(config_json_, "the model's config"));
  const std::vector<Tensor> buffers = bind_params(source, checkpoint, DType::kF32, ctx_.threads());
  std::size_t i = 0;
  source.visit_params([&](const std::string& name, Param& param) {
    if (i >= entries_.size() || entries_[i].name != name) {
      fail("{}: tensor '{}' is not how the model to train keeps its weights", directory, name);
    }
    set_weight(entries_[i], param.value.f32());
    ++i;
  });
}

double Parameters::step(const OptimizerConfig& optimizer, double lr, double max_grad_norm,
                        std::int64_t step) {
  std::vector<AdamWParam> params;
  for (Entry& entry : entries_) {
    if (!entry.trained) continue;
    params.push_back({.grad = entry.gradient,
                      .w = entry.weight.view(),
                      .m = entry.m.view(),
                      .v = entry.v.view(),
                      .rounded = entry.rounded,
                      .weight_decay = entry.decayed ? optimizer.weight_decay : 0});
  }
  ops::adamw_step(ctx_, {.params = params,
                         .lr = lr,
                         .beta1 = optimizer.betas[0],
                         .beta2 = optimizer.betas[1],
                         .eps = optimizer.eps,
                         .max_norm = max_grad_norm,
                         .step = step,
                         .norm = norm_.view()});
  float norm = 0;
  ctx_.copy(&norm, norm_.view().data, sizeof(norm));
  ctx_.synchronize();
  for (Entry& entry : entries_) refresh_host(entry);
  return norm;
}

}  // namespace deltafox::train
