#include "model/gradients.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "model/causal_lm.h"

namespace deltafox {

Gradients::Gradients(CausalLM& model, Device device) {
  constexpr std::int64_t kAlignment = 64;  // elements
  const auto padded = [](const Param& param) {
    return (param.padded_shape().size() + kAlignment - 1) / kAlignment * kAlignment;
  };
  std::int64_t total = 0;
  model.visit_params([&](const std::string&, const Param& param) {
    if (!param.trainable) return;
    total += padded(param);
    if (!param.is_matrix) vectors_ += padded(param);
  });
  memory_ = Tensor(DType::kF32, {total}, device);
  float* vectors = memory_.f32();
  float* matrices = vectors + vectors_;
  model.visit_params([&](const std::string& name, Param& param) {
    if (!param.trainable) return;
    float*& to = param.is_matrix ? matrices : vectors;
    places_.emplace(&param, entries_.size());
    entries_.push_back({.name = name,
                        .param = &param,
                        .value = {to, DType::kF32, param.shape},
                        .begun = device == Device::kCpu || !param.is_matrix});
    to += padded(param);
  });
}

void Gradients::zero(Context& ctx) {
  auto* const data = static_cast<std::byte*>(memory_.view().data);
  if (ctx.device() == Device::kCuda) {
    for (Entry& entry : entries_) entry.begun = !entry.param->is_matrix;
    return ctx.zero(data, static_cast<std::size_t>(vectors_) * size_of(DType::kF32));
  }
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const std::size_t bytes = memory_.bytes();
  ctx.threads().parallel_for(static_cast<std::int64_t>((bytes + kPiece - 1) / kPiece),
                             [&](std::int64_t task) {
                               const std::size_t begin = static_cast<std::size_t>(task) * kPiece;
                               std::memset(data + begin, 0, std::min(kPiece, bytes - begin));
                             });
}

Gradients::Entry* Gradients::find(const Param& param) {
  const auto found = places_.find(&param);
  return found == places_.end() ? nullptr : &entries_[found->second];
}

TensorView Gradients::of(const Param& param) {
  const Entry* entry = find(param);
  if (entry == nullptr) return {};
  assert(entry->begun);
  return entry->value;
}

SumView Gradients::sum_of(std::initializer_list<const Param*> matrices) {
  Entry* const first = find(**matrices.begin());
  if (first == nullptr) return {};
  SumView sum(first->value, !first->begun);
  std::int64_t rows = 0;
  for (const Param* param : matrices) {
    Entry& entry = *find(*param);
    assert(entry.begun != sum.begins &&
           entry.value.data == first->value.f32() + rows * sum.shape[1]);
    rows += matrices.size() > 1 ? param->padded_rows() : param->shape[0];
    entry.begun = true;
  }
  sum.shape = {rows, sum.shape[1]};
  return sum;
}

TensorView Gradients::zeroed(Context& ctx, const Param& param) {
  Entry* const entry = find(param);
  if (entry == nullptr) return {};
  if (!entry->begun) ctx.zero(entry->value.data, bytes_of(DType::kF32, entry->value.shape));
  entry->begun = true;
  return entry->value;
}

void Gradients::settle(Context& ctx) {
  for (const Entry& entry : entries_) zeroed(ctx, *entry.param);
}

}  // namespace deltafox
