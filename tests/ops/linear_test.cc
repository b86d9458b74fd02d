#include "ops/linear.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/float_convert.h"
#include "deltafox/error.h"
#include "ops/quantize.h"
#include "support/random.h"

namespace deltafox {
namespace {

using test::Random;

constexpr float kEps = 1.1920929e-7F;

// A dot product of K terms summed in float32 in any order is off by at most K·ε/2 · Σ|x·w|; over at
// least four lanes the longest chain is K/4 plus the few steps of the final sum.
float error_bound(const LinearArgs& args, std::int64_t t, std::int64_t n) {
  const std::int64_t depth = args.w.shape[1];
  std::vector<float> w(static_cast<std::size_t>(depth));
  if (is_packed(args.w.dtype)) {
    cpu::dequantize_row(args.w, n, w.data());
  } else {
    to_f32(args.w, n * depth, w);
  }
  float magnitude = 0;
  for (std::int64_t k = 0; k < depth; ++k) {
    magnitude += std::abs(args.x.f32()[t * depth + k] * w[static_cast<std::size_t>(k)]);
  }
  return kEps * (static_cast<float>(depth) / 4 + 8) * (magnitude + 1);
}

class LinearParity : public testing::TestWithParam<DType> {};

TEST_P(LinearParity, FastEqualsPlain) {
  Random random(1);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 40; ++round) {
    const std::int64_t rows = random.integer(1, 40);
    const std::int64_t depth = random.integer(1, round % 8 == 0 ? 1200 : 200);
    const std::int64_t columns = random.integer(1, 220);
    const Tensor x = random.normal_tensor({rows, depth});
    const Tensor wide = random.normal_tensor({columns, depth});
    Tensor w(GetParam(), {columns, depth});
    if (is_packed(GetParam())) {
      ops::quantize(ctx, {.w = wide.view(), .packed = w.view()});
    } else {
      convert(wide.view(), w.view());
    }
    Tensor y = random.normal_tensor({rows, columns});
    Tensor expected = y;
    const bool accumulate = round % 2 == 0;
    const Tensor& stored = w;
    const Tensor bias = random.normal_tensor({columns});
    const ConstTensorView bias_or_none = round % 3 == 0 ? bias.view() : ConstTensorView();
    const LinearArgs args{x.view(), stored.view(), y.view(), accumulate, bias_or_none};
    ops::linear(ctx, args);
    reference::linear({x.view(), stored.view(), expected.view(), accumulate, bias_or_none});
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t n = 0; n < columns; ++n) {
        ASSERT_NEAR(y.f32()[t * columns + n], expected.f32()[t * columns + n],
                    error_bound(args, t, n))
            << "T " << rows << " K " << depth << " N " << columns << " at " << t << ", " << n;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, LinearParity,
                         testing::Values(DType::kF32, DType::kBF16, DType::kF16, DType::kQ8,
                                         DType::kQ4),
                         [](const auto& param) { return std::string(name_of(param.param)); });

TEST(Linear, ARowDoesNotDependOnTheRowsBesideItNorOnThreads) {
  Random random(2);
  constexpr std::int64_t kRows = 150;
  constexpr std::int64_t kDepth = 1100;
  constexpr std::int64_t kColumns = 333;
  const Tensor x = random.normal_tensor({kRows, kDepth});
  const Tensor w = random.normal_tensor({kColumns, kDepth});
  Tensor all(DType::kF32, {kRows, kColumns});
  ThreadPool many(4);
  Context many_ctx(many);
  ops::linear(many_ctx, {x.view(), w.view(), all.view()});
  ThreadPool one(1);
  Context one_ctx(one);
  Tensor alone(DType::kF32, {1, kColumns});
  for (std::int64_t t = 0; t < kRows; ++t) {
    ops::linear(one_ctx,
                {{x.f32() + t * kDepth, DType::kF32, {1, kDepth}}, w.view(), alone.view()});
    for (std::int64_t n = 0; n < kColumns; ++n) {
      ASSERT_EQ(alone.f32()[n], all.f32()[t * kColumns + n]) << t << ", " << n;
    }
  }
}

TEST(Linear, RefusesShapesThatDoNotFit) {
  ThreadPool threads(1);
  Context ctx(threads);
  Tensor x(DType::kF32, {2, 3});
  Tensor w(DType::kF32, {5, 4});
  Tensor y(DType::kF32, {2, 5});
  EXPECT_THROW(ops::linear(ctx, {x.view(), w.view(), y.view()}), Error);
}

}  // namespace
}  // namespace deltafox
