// adamw against its plain twin, and the sum of squares.
#include "ops/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "support/random.h"
#include "support/tensors.h"

namespace deltafox::test {
namespace {

struct Parameter {
  Tensor w, m, v;

  Parameter(Random& random, const Shape& shape)
      : w(random.normal_tensor(shape)),
        m(random.normal_tensor(shape)),
        v(random.normal_tensor(shape)) {
    for (std::int64_t i = 0; i < shape.size(); ++i) v.f32()[i] *= v.f32()[i];
  }
  AdamWArgs args(const Tensor& grad) {
    return {.grad = grad.view(),
            .w = w.view(),
            .m = m.view(),
            .v = v.view(),
            .lr = 0.01,
            .beta1 = 0.9,
            .beta2 = 0.95,
            .weight_decay = 0.1,
            .scale = 0.7,
            .step = 3};
  }
};

// Five roundings of terms of magnitude up to 4, and the quotient's few ulps: 1e-6 is 8 epsilons.
TEST(AdamW, EqualsThePlainVersion) {
  Random random(1);
  ThreadPool threads(2);
  Context ctx(threads);
  for (const std::int64_t size : {1, 7, 64, 1000, 40'000}) {
    const Tensor grad = random.normal_tensor({size});
    Parameter fast(random, {size});
    Parameter plain = fast;
    ops::adamw(ctx, fast.args(grad));
    reference::adamw(plain.args(grad));
    expect_near(fast.w, plain.w, 1e-6F * std::max(1.0F, largest(plain.w)));
    expect_near(fast.m, plain.m, 1e-6F * std::max(1.0F, largest(plain.m)));
    expect_near(fast.v, plain.v, 1e-6F * std::max(1.0F, largest(plain.v)));
  }
}

TEST(AdamW, SameBitsOnAnyNumberOfThreads) {
  Random random(2);
  const std::int64_t size = 100'001;
  const Tensor grad = random.normal_tensor({size});
  const Parameter begin(random, {size});
  ThreadPool one(1);
  ThreadPool three(3);
  Context alone(one);
  Context together(three);
  Parameter a = begin;
  Parameter b = begin;
  ops::adamw(alone, a.args(grad));
  ops::adamw(together, b.args(grad));
  EXPECT_EQ(to_vector(a.w), to_vector(b.w));
  EXPECT_EQ(ops::sum_of_squares(alone, grad.view()), ops::sum_of_squares(together, grad.view()));
}

TEST(AdamW, SumOfSquaresIsTheSum) {
  Random random(3);
  ThreadPool threads(2);
  Context ctx(threads);
  for (const std::int64_t size : {1, 13, 5000, 50'000}) {
    const Tensor x = random.normal_tensor({size});
    long double sum = 0;
    for (const float value : to_vector(x)) sum += static_cast<long double>(value) * value;
    const auto expected = static_cast<double>(sum);
    EXPECT_NEAR(ops::sum_of_squares(ctx, x.view()), expected, 1e-12 * expected);
  }
}

}  // namespace
}  // namespace deltafox::test
