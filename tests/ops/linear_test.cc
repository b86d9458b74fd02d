#include "ops/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "core/float_convert.h"
#include "cpu/isa.h"
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

// What the kernels are chosen by, from the plain ones up; a machine runs those it has.
struct NamedIsa {
  const char* name;
  cpu::Isa isa;
};
constexpr cpu::Isa kAvx2{.avx2 = true};
constexpr cpu::Isa kAvx512{.avx2 = true, .avx512 = true, .avx512_vnni = true, .avx512_bf16 = true};
constexpr cpu::Isa kAmx{.avx2 = true,
                        .avx512 = true,
                        .avx512_vnni = true,
                        .avx512_bf16 = true,
                        .amx_int8 = true,
                        .amx_bf16 = true};
constexpr NamedIsa kIsas[] = {{"plain", {}}, {"avx2", kAvx2}, {"avx512", kAvx512}, {"amx", kAmx}};

Tensor weights(Context& ctx, const Tensor& wide, DType dtype) {
  Tensor w(dtype, wide.view().shape);
  if (is_packed(dtype)) {
    ops::quantize(ctx, {.w = wide.view(), .packed = w.view()});
  } else {
    convert(wide.view(), w.view());
  }
  return w;
}

class LinearParity : public testing::TestWithParam<std::tuple<DType, NamedIsa>> {};

TEST_P(LinearParity, FastEqualsPlain) {
  const auto& [dtype, isa] = GetParam();
  const cpu::IsaForTesting only(isa.isa);
  Random random(1);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    const std::int64_t rows = random.integer(1, 40);
    const std::int64_t depth = random.integer(1, round % 8 == 0 ? 1200 : 200);
    const std::int64_t columns = random.integer(1, 220);
    const Tensor x = random.normal_tensor({rows, depth});
    const Tensor wide = random.normal_tensor({columns, depth});
    const Tensor w = weights(ctx, wide, dtype);
    Tensor y = random.normal_tensor({rows, columns});
    Tensor expected = y;
    const bool accumulate = round % 2 == 0;
    const Tensor bias = random.normal_tensor({columns});
    const ConstTensorView bias_or_none = round % 3 == 0 ? bias.view() : ConstTensorView();
    const LinearArgs args{.x = x.view(),
                          .w = w.view(),
                          .y = y.view(),
                          .accumulate = accumulate,
                          .bias = bias_or_none};
    ops::linear(ctx, args);
    reference::linear({x.view(), w.view(), expected.view(), accumulate, bias_or_none});
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t n = 0; n < columns; ++n) {
        ASSERT_NEAR(y.f32()[t * columns + n], expected.f32()[t * columns + n],
                    error_bound(args, t, n))
            << "T " << rows << " K " << depth << " N " << columns << " at " << t << ", " << n;
      }
    }
  }
}

constexpr DType kKinds[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kQ8, DType::kQ4};

INSTANTIATE_TEST_SUITE_P(Weights, LinearParity,
                         testing::Combine(testing::ValuesIn(kKinds), testing::ValuesIn(kIsas)),
                         [](const auto& param) {
                           return std::string(name_of(std::get<0>(param.param))) + "_" +
                                  std::get<1>(param.param).name;
                         });

class LinearRows : public testing::TestWithParam<std::tuple<DType, NamedIsa>> {};

TEST_P(LinearRows, DoNotDependOnTheRowsBesideThemNorOnThreads) {
  const auto& [dtype, isa] = GetParam();
  const cpu::IsaForTesting only(isa.isa);
  Random random(2);
  constexpr std::int64_t kRows = 57;
  constexpr std::int64_t kDepth = 1100;
  constexpr std::int64_t kColumns = 93;
  const Tensor x = random.normal_tensor({kRows, kDepth});
  Tensor all(DType::kF32, {kRows, kColumns});
  ThreadPool many(4);
  Context many_ctx(many);
  const Tensor w = weights(many_ctx, random.normal_tensor({kColumns, kDepth}), dtype);
  ops::linear(many_ctx, {x.view(), w.view(), all.view()});
  ThreadPool one(1);
  Context one_ctx(one);
  for (const std::int64_t count : {1, 2, 3, 4, 5}) {
    Tensor some(DType::kF32, {count, kColumns});
    for (std::int64_t t = 0; t + count <= kRows; t += 2 * count) {
      ops::linear(one_ctx,
                  {{x.f32() + t * kDepth, DType::kF32, {count, kDepth}}, w.view(), some.view()});
      for (std::int64_t i = 0; i < count * kColumns; ++i) {
        ASSERT_EQ(some.f32()[i], all.f32()[t * kColumns + i]) << t << " of " << count;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, LinearRows,
                         testing::Combine(testing::ValuesIn(kKinds), testing::ValuesIn(kIsas)),
                         [](const auto& param) {
                           return std::string(name_of(std::get<0>(param.param))) + "_" +
                                  std::get<1>(param.param).name;
                         });

// In one pass or, for a few tokens or parts that do not begin with panels of their own, in two.
class LinearGlu : public testing::TestWithParam<std::tuple<DType, NamedIsa>> {};

TEST_P(LinearGlu, IsTheProductGated) {
  const auto& [dtype, isa] = GetParam();
  const cpu::IsaForTesting only(isa.isa);
  Random random(4);
  ThreadPool threads(2);
  Context ctx(threads);
  for (const std::int64_t rows : {1, 3, 70, 140}) {
    for (const std::int64_t outputs : {16, 80, 88}) {
      const std::int64_t depth = random.integer(1, rows == 140 ? 2500 : 700);
      const Tensor x = random.normal_tensor({rows, depth});
      const Tensor w = weights(ctx, random.normal_tensor({2 * outputs, depth}), dtype);
      Tensor gate_up(DType::kF32, {rows, 2 * outputs});
      Tensor expected(DType::kF32, {rows, outputs});
      ops::linear(ctx, {.x = x.view(), .w = w.view(), .y = gate_up.view()});
      ops::glu(ctx, {.activation = Activation::kSilu,
                     .gate_up = std::as_const(gate_up).view(),
                     .y = expected.view()});
      Tensor y(DType::kF32, {rows, outputs});
      ops::linear_glu(ctx, {.x = x.view(), .w = w.view(), .y = y.view()});
      for (std::int64_t i = 0; i < rows * outputs; ++i) {
        ASSERT_EQ(y.f32()[i], expected.f32()[i]) << "T " << rows << " N " << outputs;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, LinearGlu,
                         testing::Combine(testing::ValuesIn(kKinds), testing::ValuesIn(kIsas)),
                         [](const auto& param) {
                           return std::string(name_of(std::get<0>(param.param))) + "_" +
                                  std::get<1>(param.param).name;
                         });

TEST(Linear, PackedWeightsGiveTheSameBitsOnEveryInstructionSet) {
  Random random(3);
  ThreadPool threads(2);
  Context ctx(threads);
  for (const DType dtype : {DType::kQ8, DType::kQ4}) {
    for (const std::int64_t rows : {1, 2, 3, 4, 7, 16, 33, 70, 530}) {
      const std::int64_t depth = random.integer(1, 700);
      const std::int64_t columns = random.integer(1, 150);
      const Tensor x = random.normal_tensor({rows, depth});
      const Tensor w = weights(ctx, random.normal_tensor({columns, depth}), dtype);
      Tensor expected(DType::kF32, {rows, columns});
      for (const NamedIsa& isa : kIsas) {
        const cpu::IsaForTesting only(isa.isa);
        Tensor y(DType::kF32, {rows, columns});
        ops::linear(ctx, {x.view(), w.view(), y.view()});
        if (isa.name == kIsas[0].name) expected = y;
        for (std::int64_t i = 0; i < rows * columns; ++i) {
          ASSERT_EQ(y.f32()[i], expected.f32()[i]) << isa.name << " T " << rows << " K " << depth;
        }
      }
    }
  }
}

// Beyond the ends of rows of weights lie bytes of anything: none may reach a result.
TEST(Linear, ReadsNothingBeyondTheWeights) {
  Random random(4);
  ThreadPool threads(1);
  Context ctx(threads);
  constexpr std::int64_t kDepth = 37;
  constexpr std::int64_t kColumns = 19;
  const Tensor x = random.normal_tensor({9, kDepth});
  const Tensor wide = random.normal_tensor({kColumns, kDepth});
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const NamedIsa& isa : kIsas) {
      const cpu::IsaForTesting only(isa.isa);
      Tensor guarded(dtype, {kColumns + 40, kDepth});
      std::memset(guarded.view().data, 0xff, guarded.bytes());  // NaN
      const ConstTensorView w{guarded.view().data, dtype, {kColumns, kDepth}};
      convert(wide.view(), {guarded.view().data, dtype, {kColumns, kDepth}});
      Tensor y(DType::kF32, {9, kColumns});
      ops::linear(ctx, {x.view(), w, y.view()});
      for (std::int64_t i = 0; i < 9 * kColumns; ++i) ASSERT_TRUE(std::isfinite(y.f32()[i]));
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
