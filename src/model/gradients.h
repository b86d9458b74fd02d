// Gradients of a model's parameters.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/context.h"
#include "core/tensor.h"
#include "model/param.h"
#include "ops/linear.h"

namespace deltafox {

class CausalLM;

// One float32 tensor for each trainable parameter, in the model's order. In memory all vectors lie
// before all matrices, both in that order, each tensor aligned to 256 bytes and matrices with
// padded rows. Parameters are found
// by where they are: the model must outlive this and not be moved.
//
// On a GPU zero() leaves matrices as they are: the product that is first to add to one, or the
// first at all, writes it instead. forward_backward leaves none that nothing was added to.
class Gradients {
 public:
  struct Entry {
    std::string name;  // of the parameter, as in the checkpoint
    const Param* param = nullptr;
    TensorView value{};  // of the parameter's shape
    bool begun = true;   // else what is there is no part of the sum
  };

  explicit Gradients(CausalLM& model, Device device = Device::kCpu);  // zeros

  void zero(Context& ctx);

  std::vector<Entry>& entries() { return entries_; }
  const std::vector<Entry>& entries() const { return entries_; }

  // What backward adds to; no data for a parameter that is not trained or not there. Of a vector:
  TensorView of(const Param& param);
  TensorView of(const std::optional<Param>& param) { return param ? of(*param) : TensorView{}; }
  // Of a matrix, for a product that adds to all of it.
  SumView sum_of(const Param& param) { return sum_of({&param}); }
  SumView sum_of(const std::optional<Param>& param) { return param ? sum_of(*param) : SumView{}; }
  // Of matrices one below the other as one, padding included; they must follow each other in the
  // model.
  SumView sum_of(std::initializer_list<const Param*> matrices);
  // Of a matrix, for anything else.
  TensorView zeroed(Context& ctx, const Param& param);
  // Zeroes the matrices that nothing was added to.
  void settle(Context& ctx);

 private:
  Entry* find(const Param& param);

  Tensor memory_;
  std::int64_t vectors_ = 0;  // elements before the matrices
  std::vector<Entry> entries_;
  std::unordered_map<const Param*, std::size_t> places_;
};

}  // namespace deltafox
