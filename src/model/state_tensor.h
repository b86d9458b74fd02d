// A tensor of a mixer's state, as memory is counted and files are written by it.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace deltafox {

// One tensor in memory, or several equal ones that a file holds as one: along a new first
// dimension, in order.
class StateTensor {
 public:
  // NOLINTNEXTLINE(google-explicit-constructor): most states hold plain tensors.
  StateTensor(Tensor& tensor) : shape_(tensor.view().shape) {
    if (tensor.bytes() > 0) parts_.push_back(tensor.view());
  }
  // The parts share one shape of up to three dimensions.
  explicit StateTensor(std::vector<TensorView> parts) : parts_(std::move(parts)) {
    if (parts_.empty()) return;
    std::vector<std::int64_t> dims{static_cast<std::int64_t>(parts_.size())};
    for (int i = 0; i < parts_[0].shape.rank(); ++i) dims.push_back(parts_[0].shape[i]);
    shape_ = Shape(dims);
  }

  const std::vector<TensorView>& parts() const { return parts_; }
  DType dtype() const { return parts_.empty() ? DType::kF32 : parts_[0].dtype; }
  const Shape& shape() const { return shape_; }
  std::size_t bytes() const {
    if (parts_.empty()) return 0;
    return static_cast<std::size_t>(shape_.size()) * size_of(dtype());
  }

 private:
  Shape shape_;
  std::vector<TensorView> parts_;
};

}  // namespace deltafox
