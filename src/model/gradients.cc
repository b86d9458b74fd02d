#include "model/gradients.h"

#include <cstring>

#include "model/causal_lm.h"

namespace deltafox {

Gradients::Gradients(CausalLM& model, Device device) {
  constexpr std::int64_t kAlignment = 64;  // elements
  const auto padded = [](const Param& param) {
    return (param.shape.size() + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::int64_t total = 0;
  model.visit_params([&](const std::string&, const Param& param) {
    if (param.trainable) total += padded(param);
  });
  memory_ = Tensor(DType::kF32, {total}, device);
  float* to = memory_.f32();
  model.visit_params([&](const std::string& name, Param& param) {
    if (!param.trainable) return;
    places_.emplace(&param, entries_.size());
    entries_.push_back({.name = name, .param = &param, .value = {to, DType::kF32, param.shape}});
    to += padded(param);
  });
}

void Gradients::zero(Context& ctx) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  auto* const data = static_cast<std::byte*>(memory_.view().data);
  const std::size_t bytes = memory_.bytes();
  if (ctx.device() == Device::kCuda) return ctx.zero(data, bytes);
  ctx.threads().parallel_for(static_cast<std::int64_t>((bytes + kPiece - 1) / kPiece),
                             [&](std::int64_t task) {
                               const std::size_t begin = static_cast<std::size_t>(task) * kPiece;
                               std::memset(data + begin, 0, std::min(kPiece, bytes - begin));
                             });
}

TensorView Gradients::of(const Param& param) {
  const auto found = places_.find(&param);
  return found == places_.end() ? TensorView{} : entries_[found->second].value;
}

}  // namespace deltafox
