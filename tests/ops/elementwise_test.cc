// activation, glu, feature_map, rms_norm, cross_entropy, embedding: the fast versions against the
// plain.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float_convert.h"
#include "ops/activation.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/rms_norm.h"
#include "support/activations.h"
#include "support/random.h"

namespace deltafox {
namespace {

using test::Random;

class Elementwise : public testing::Test {
 protected:
  // The vector exponential is good to a few units in the last place.
  static void expect_close(const Tensor& got, const Tensor& expected, float relative = 2e-6F) {
    for (std::int64_t i = 0; i < got.view().shape.size(); ++i) {
      const float want = expected.f32()[i];
      ASSERT_NEAR(got.f32()[i], want, relative * std::abs(want) + 1e-30F) << "element " << i;
    }
  }

  Random random_{3};
  ThreadPool threads_{2};
  Context ctx_{threads_};
};

TEST_F(Elementwise, ActivationEqualsPlain) {
  for (const Activation activation : test::kActivations) {
    Tensor x = random_.normal_tensor({random_.integer(1, 50), random_.integer(1, 99)}, 10);
    Tensor expected = x;
    ops::activation(ctx_, {activation, x.view()});
    reference::activation({activation, expected.view()});
    expect_close(x, expected);
  }
}

TEST_F(Elementwise, ActivationsOfExtremesAreFinite) {
  Tensor x(DType::kF32, {4});
  const float extremes[] = {-1e4F, 1e4F, -3.4e38F, 3.4e38F};
  std::copy(std::begin(extremes), std::end(extremes), x.f32());
  Tensor sigmoid = x;
  ops::activation(ctx_, {Activation::kSigmoid, sigmoid.view()});
  ops::activation(ctx_, {Activation::kSilu, x.view()});
  const float expected_sigmoid[] = {0, 1, 0, 1};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(sigmoid.f32()[i], expected_sigmoid[i]);
  EXPECT_EQ(x.f32()[0], 0);
  EXPECT_EQ(x.f32()[1], 1e4F);
}

TEST_F(Elementwise, ActivationsOfNanAreNan) {
  for (const Activation activation : {Activation::kSigmoid, Activation::kSilu}) {
    Tensor x(DType::kF32, {17});
    std::fill_n(x.f32(), 17, std::numeric_limits<float>::quiet_NaN());
    ops::activation(ctx_, {activation, x.view()});
    for (int i = 0; i < 17; ++i) EXPECT_TRUE(std::isnan(x.f32()[i]));
  }
}

// Through the whole range of e^-x, which is of a kernel's own making.
TEST_F(Elementwise, SigmoidIsExactToAFewRoundings) {
  constexpr int kCount = 200'000;
  Tensor x(DType::kF32, {kCount});
  for (int i = 0; i < kCount; ++i) x.f32()[i] = 0.001F * static_cast<float>(i - kCount / 2);
  Tensor y = x;
  ops::activation(ctx_, {Activation::kSigmoid, y.view()});
  for (int i = 0; i < kCount; ++i) {
    const double expected = 1 / (1 + std::exp(-static_cast<double>(x.f32()[i])));
    ASSERT_NEAR(y.f32()[i], expected, 2.5e-7 * expected + 1.2e-38) << x.f32()[i];
  }
}

TEST_F(Elementwise, GluEqualsPlain) {
  for (const Activation activation : {Activation::kSilu, Activation::kSigmoid}) {
    const std::int64_t rows = random_.integer(1, 20);
    const std::int64_t width = random_.integer(1, 99);
    const Tensor gate_up = random_.normal_tensor({rows, 2 * width}, 3);
    Tensor y(DType::kF32, {rows, width});
    Tensor expected = y;
    ops::glu(ctx_, {activation, gate_up.view(), y.view()});
    reference::glu({activation, gate_up.view(), expected.view()});
    expect_close(y, expected);
  }
}

TEST_F(Elementwise, ForgetGateEqualsPlainAndKeepsTheGatesPrecision) {
  Tensor x = random_.normal_tensor({random_.integer(1, 50), random_.integer(1, 99)}, 10);
  x.f32()[0] = 20;
  Tensor k(DType::kF32, x.view().shape);
  Tensor expected = x;
  Tensor expected_k = k;
  ops::forget_gate(ctx_, {x.view(), k.view()});
  reference::forget_gate({expected.view(), expected_k.view()});
  expect_close(x, expected);
  expect_close(k, expected_k);
  EXPECT_EQ(x.f32()[0], 1);
  EXPECT_NEAR(k.f32()[0], 2.0611537e-9F, 1e-14F);
}

TEST_F(Elementwise, FeatureMapEqualsPlain) {
  for (const Activation activation : test::kActivations) {
    for (const FeatureNorm norm : {FeatureNorm::kNone, FeatureNorm::kL2, FeatureNorm::kSum}) {
      Tensor x = random_.normal_tensor({random_.integer(1, 9), 3, random_.integer(1, 70)});
      if (norm == FeatureNorm::kSum) {  // a sum near zero would magnify rounding without bound
        for (std::int64_t i = 0; i < x.view().shape.size(); ++i)
          x.f32()[i] = std::abs(x.f32()[i]) + 0.1F;
      }
      Tensor expected = x;
      ops::feature_map(ctx_, {activation, norm, x.view()});
      reference::feature_map({activation, norm, expected.view()});
      expect_close(x, expected, 1e-5F);
    }
  }
}

TEST_F(Elementwise, RmsNormEqualsPlain) {
  for (int round = 0; round < 20; ++round) {
    const std::int64_t groups = random_.integer(1, 3);
    const std::int64_t rows = groups * random_.integer(1, 10);
    const std::int64_t width = random_.integer(1, 300);
    const Tensor x = random_.normal_tensor({rows, width});
    const Tensor w = random_.normal_tensor({groups * width});
    const Tensor gate = random_.normal_tensor({rows, width});
    Tensor y(DType::kF32, {rows, width});
    Tensor expected = y;
    RmsNormArgs args{.x = x.view(), .w = w.view(), .gate = {}, .y = y.view(), .eps = 1e-5F};
    if (round % 2 == 0) args.gate = gate.view();
    if (round % 5 == 0) args.w = {};
    args.gate_first = round % 4 == 0;
    ops::rms_norm(ctx_, args);
    args.y = expected.view();
    reference::rms_norm(args);
    expect_close(y, expected, 1e-5F);
  }
}

TEST_F(Elementwise, CrossEntropyEqualsPlainAndSkipsNegativeLabels) {
  for (const std::int64_t vocab : {2, 37, 3000, 50257}) {
    const Tensor logits = random_.normal_tensor({3, vocab}, 5);
    const std::int32_t labels[] = {0, -100, static_cast<std::int32_t>(vocab - 1)};
    float loss[3];
    float expected[3];
    ops::cross_entropy(ctx_, {logits.view(), labels, loss});
    reference::cross_entropy({logits.view(), labels, expected});
    EXPECT_EQ(loss[1], 0);
    for (int i = 0; i < 3; ++i) EXPECT_NEAR(loss[i], expected[i], 2e-6F * (1 + expected[i]));
  }
}

TEST_F(Elementwise, EmbeddingCopiesRowsOfAnyDtype) {
  const Tensor wide = random_.normal_tensor({11, 19});
  const std::int32_t ids[] = {10, 0, 3, 3};
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    Tensor table(dtype, {11, 19});
    convert(wide.view(), table.view());
    const Tensor& stored = table;
    Tensor y(DType::kF32, {4, 19});
    ops::embedding(ctx_, {ids, stored.view(), y.view()});
    for (std::int64_t t = 0; t < 4; ++t) {
      for (std::int64_t i = 0; i < 19; ++i) {
        EXPECT_EQ(y.f32()[t * 19 + i], load_f32(stored.view(), ids[t] * 19 + i));
      }
    }
  }
}

}  // namespace
}  // namespace deltafox
