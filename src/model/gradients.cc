#include "model/gradients.h"

#include <cstring>

#include "model/causal_lm.h"

namespace deltafox {

Gradients::Gradients(CausalLM& model, Device device) {
  model.visit_params([&](const std::string& name, Param& param) {
    if (!param.trainable) return;
    places_.emplace(&param, entries_.size());
    entries_.push_back(
        {.name = name, .param = &param, .value = Tensor(DType::kF32, param.shape, device)});
  });
}

void Gradients::zero(Context& ctx) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  for (Entry& entry : entries_) {
    const std::size_t bytes = entry.value.bytes();
    auto* data = static_cast<std::byte*>(entry.value.view().data);
    if (ctx.device() == Device::kCuda) {
      ctx.zero(data, bytes);
      continue;
    }
    ctx.threads().parallel_for(static_cast<std::int64_t>((bytes + kPiece - 1) / kPiece),
                               [&](std::int64_t task) {
                                 const std::size_t begin = static_cast<std::size_t>(task) * kPiece;
                                 std::memset(data + begin, 0, std::min(kPiece, bytes - begin));
                               });
  }
}

TensorView Gradients::of(const Param& param) {
  const auto found = places_.find(&param);
  return found == places_.end() ? TensorView{} : entries_[found->second].value.view();
}

}  // namespace deltafox
