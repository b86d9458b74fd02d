// adamw against its plain twin, and the sum of squares.
#include "ops/adamw.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "core/float_convert.h"
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

TEST(AdamW, AStepOfAllClipsByTheirCommonNorm) {
  Random random(4);
  ThreadPool threads(1);
  Context ctx(threads);
  const Tensor grads[] = {random.normal_tensor({30}), random.normal_tensor({7, 5})};
  Parameter together[] = {Parameter(random, {30}), Parameter(random, {7, 5})};
  Parameter alone[] = {together[0], together[1]};
  Tensor rounded(DType::kBF16, {30});
  Tensor norm(DType::kF32, {1});
  const auto step = [&](const Tensor& first, const Tensor& second) {
    const AdamWParam params[] = {{.grad = first.view(),
                                  .w = together[0].w.view(),
                                  .m = together[0].m.view(),
                                  .v = together[0].v.view(),
                                  .rounded = rounded.view(),
                                  .weight_decay = 0.1},
                                 {.grad = second.view(),
                                  .w = together[1].w.view(),
                                  .m = together[1].m.view(),
                                  .v = together[1].v.view()}};
    ops::adamw_step(ctx, {.params = params,
                          .lr = 0.01,
                          .beta2 = 0.95,
                          .max_norm = 2,
                          .step = 3,
                          .norm = norm.view()});
  };
  step(grads[0], grads[1]);
  const double expected = std::sqrt(ops::sum_of_squares(ctx, grads[0].view()) +
                                    ops::sum_of_squares(ctx, grads[1].view()));
  EXPECT_FLOAT_EQ(norm.f32()[0], static_cast<float>(expected));
  for (int i = 0; i < 2; ++i) {
    AdamWArgs args = alone[i].args(grads[i]);
    args.weight_decay = i == 0 ? 0.1 : 0;
    args.scale = 2 / (expected + 1e-6);
    ops::adamw(ctx, args);
    expect_near(together[i].w, alone[i].w, 0);
    expect_near(together[i].m, alone[i].m, 0);
    expect_near(together[i].v, alone[i].v, 0);
  }
  for (int i = 0; i < 30; ++i) {
    EXPECT_EQ(load_f32(std::as_const(rounded).view(), i),
              bf16_to_f32(f32_to_bf16(alone[0].w.f32()[i])));
  }
  Tensor infinite = grads[1];
  infinite.f32()[3] = INFINITY;
  step(grads[0], infinite);
  EXPECT_TRUE(std::isinf(norm.f32()[0]));
  for (int i = 0; i < 2; ++i) expect_near(together[i].w, alone[i].w, 0);
}

}  // namespace
}  // namespace deltafox::test
