// Lists of state tensors and comparisons for the tests of ops.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/tensor.h"

namespace deltafox::test {

inline std::vector<float*> pointers(std::vector<Tensor>& states) {
  std::vector<float*> result;
  for (Tensor& state : states) result.push_back(state.f32());
  return result;
}

inline void expect_near(const Tensor& got, const Tensor& expected, float tolerance) {
  for (std::int64_t i = 0; i < got.view().shape.size(); ++i) {
    ASSERT_NEAR(got.f32()[i], expected.f32()[i], tolerance) << "element " << i;
  }
}

inline float largest(const Tensor& tensor) {
  float result = 0;
  for (std::int64_t i = 0; i < tensor.view().shape.size(); ++i) {
    result = std::max(result, std::abs(tensor.f32()[i]));
  }
  return result;
}

}  // namespace deltafox::test
