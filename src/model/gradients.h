// Gradients of a model's parameters.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/context.h"
#include "core/tensor.h"
#include "model/param.h"

namespace deltafox {

class CausalLM;

// One float32 tensor for each trainable parameter, in the model's order. Parameters are found by
// where they are: the model must outlive this and not be moved.
class Gradients {
 public:
  struct Entry {
    std::string name;  // of the parameter, as in the checkpoint
    const Param* param = nullptr;
    Tensor value{};  // of the parameter's shape
  };

  explicit Gradients(CausalLM& model, Device device = Device::kCpu);  // zeros

  void zero(Context& ctx);

  std::vector<Entry>& entries() { return entries_; }
  const std::vector<Entry>& entries() const { return entries_; }

  // What backward adds to; no data for a parameter that is not trained or not there.
  TensorView of(const Param& param);
  TensorView of(const std::optional<Param>& param) { return param ? of(*param) : TensorView{}; }

 private:
  std::vector<Entry> entries_;
  std::unordered_map<const Param*, std::size_t> places_;
};

}  // namespace deltafox
