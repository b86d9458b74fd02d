// Reproducible random tensors for tests.
#pragma once

#include <random>
#include <vector>

#include "core/tensor.h"

namespace deltafox::test {

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}

  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  float normal(float std = 1) { return std::normal_distribution<float>(0, std)(engine_); }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }

  Tensor normal_tensor(const Shape& shape, float std = 1) {
    Tensor tensor(DType::kF32, shape);
    for (std::int64_t i = 0; i < shape.size(); ++i) tensor.f32()[i] = normal(std);
    return tensor;
  }

  // cu_seqlens of `count` sequences of 1 to max_length tokens.
  std::vector<std::int64_t> lengths(std::int64_t count, std::int64_t max_length) {
    std::vector<std::int64_t> cu{0};
    for (std::int64_t b = 0; b < count; ++b) cu.push_back(cu.back() + integer(1, max_length));
    return cu;
  }

 private:
  std::mt19937 engine_;
};

inline std::vector<float> to_vector(const Tensor& tensor) {
  return {tensor.f32(), tensor.f32() + tensor.view().shape.size()};
}

}  // namespace deltafox::test
