// What the backward of every op has to show: fast equals plain, plain equals finite differences of
// the plain forward, any number of threads gives the same bits, and `=` or `+=` as said.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "core/context.h"
#include "support/random.h"
#include "support/tensors.h"

namespace deltafox::test {

// A tensor that an op is differentiated by.
struct Input {
  const char* name;
  Tensor* tensor;
  bool accumulates = false;  // += rather than =
};

inline double dot(const Tensor& a, const Tensor& b) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.view().shape.size(); ++i) {
    sum += static_cast<double>(a.f32()[i]) * b.f32()[i];
  }
  return sum;
}

class GradientCheck {
 public:
  // Gradients of the inputs, in order, are written or added to.
  using Backward = std::function<void(Context& ctx, std::vector<Tensor>& gradients)>;

  GradientCheck(Random& random, std::vector<Input> inputs)
      : random_(random), inputs_(std::move(inputs)) {
    for (const Input& input : inputs_) {
      noise_.push_back(random_.normal_tensor(input.tensor->view().shape));
    }
  }

  // Sums of some hundred rounded terms, none much larger than the largest gradient.
  void expect_fast_equals_plain(const Backward& fast, const Backward& plain,
                                float relative = 2e-5F) {
    const std::vector<Tensor> expected = run(plain, 1);
    const std::vector<Tensor> got = run(fast, 1);
    const std::vector<Tensor> threaded = run(fast, 3);
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      SCOPED_TRACE(inputs_[i].name);
      expect_near(got[i], expected[i], relative * std::max(1.0F, largest(expected[i])));
      expect_near(threaded[i], got[i], 0);
    }
  }

  // The slope of `objective`, a function of the inputs as they are, along a random direction of
  // each input. Differences of fourth order over steps of h = 0.01: they are off by h⁴ times the
  // fifth derivative, and by the outputs' rounding, ε / h = 10⁻⁵ of their size.
  void expect_slopes_of(const std::function<double()>& objective, const Backward& plain) {
    constexpr double kStep = 0.01;
    std::vector<Tensor> gradients = run(plain, 1);
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      SCOPED_TRACE(inputs_[i].name);
      Tensor& input = *inputs_[i].tensor;
      const Tensor at = input;
      const Tensor direction = random_.normal_tensor(input.view().shape);
      const auto along = [&](double distance) {
        for (std::int64_t e = 0; e < input.view().shape.size(); ++e) {
          input.f32()[e] = at.f32()[e] + static_cast<float>(distance * direction.f32()[e]);
        }
        return objective();
      };
      const double slope =
          (8 * (along(kStep) - along(-kStep)) - (along(2 * kStep) - along(-2 * kStep))) /
          (12 * kStep);
      std::copy_n(at.f32(), at.view().shape.size(), input.f32());  // where views look
      Tensor& gradient = gradients[i];
      if (inputs_[i].accumulates) {
        for (std::int64_t e = 0; e < gradient.view().shape.size(); ++e) {
          gradient.f32()[e] -= noise_[i].f32()[e];
        }
      }
      EXPECT_NEAR(dot(gradient, direction), slope,
                  1e-3 * std::sqrt(dot(gradient, gradient)) + 1e-4);
    }
  }

 private:
  std::vector<Tensor> run(const Backward& backward, int num_threads) {
    ThreadPool threads(num_threads);
    Context ctx(threads);
    std::vector<Tensor> gradients = noise_;
    backward(ctx, gradients);
    return gradients;
  }

  Random& random_;
  std::vector<Input> inputs_;
  std::vector<Tensor> noise_;  // what gradients hold before
};

}  // namespace deltafox::test
