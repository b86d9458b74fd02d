// The backward of every op but the recurrences and attention.
#include <gtest/gtest.h>

#include "core/float_convert.h"
#include "cpu/isa.h"
#include "ops/activation.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/linear.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/short_conv.h"
#include "ops/token_shift.h"
#include "support/activations.h"
#include "support/gradients.h"

namespace deltafox {
namespace {

using test::dot;
using test::GradientCheck;
using test::Random;

// Away from the kink of ReLU, which finite differences must not cross.
Tensor away_from_zero(Tensor x) {
  for (std::int64_t i = 0; i < x.view().shape.size(); ++i) {
    x.f32()[i] += x.f32()[i] < 0 ? -0.2F : 0.2F;
  }
  return x;
}

// Checks fast against plain, and plain against the slopes of `objective`. `call(op, gradients)`
// hands the op its arguments.
template <typename Fast, typename Plain, typename Call>
void check(Random& random, std::vector<test::Input> inputs, Fast fast, Plain plain, Call call,
           const std::function<double()>& objective) {
  GradientCheck gradient_check(random, std::move(inputs));
  const GradientCheck::Backward run_fast = [&](Context& ctx, std::vector<Tensor>& gradients) {
    call([&](const auto& args) { fast(ctx, args); }, gradients);
  };
  const GradientCheck::Backward run_plain = [&](Context&, std::vector<Tensor>& gradients) {
    call(plain, gradients);
  };
  gradient_check.expect_fast_equals_plain(run_fast, run_plain);
  gradient_check.expect_slopes_of(objective, run_plain);
}

TEST(Backward, Activation) {
  Random random(1);
  for (const Activation activation : test::kActivations) {
    Tensor x = away_from_zero(random.normal_tensor({random.integer(1, 50), random.integer(1, 99)}));
    const Tensor dy = random.normal_tensor(x.view().shape);
    check(
        random, {{"x", &x}}, ops::activation_backward, reference::activation_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(ActivationBackwardArgs{activation, x.view(), dy.view(), d[0].view()});
        },
        [&] {
          Tensor y = x;
          reference::activation({activation, y.view()});
          return dot(dy, y);
        });
  }
}

TEST(Backward, SlopesOfExtremesAreFinite) {
  Random random(2);
  ThreadPool threads(1);
  Context ctx(threads);
  Tensor x(DType::kF32, {4});
  const float extremes[] = {-1e4F, 1e4F, -3.4e38F, 3.4e38F};
  std::copy(std::begin(extremes), std::end(extremes), x.f32());
  const Tensor ones = [] {
    Tensor tensor(DType::kF32, {4});
    std::fill(tensor.f32(), tensor.f32() + 4, 1.0F);
    return tensor;
  }();
  Tensor dx = x;
  ops::activation_backward(ctx, {Activation::kSilu, x.view(), ones.view(), dx.view()});
  const float silu[] = {0, 1, 0, 1};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(dx.f32()[i], silu[i]);
  ops::activation_backward(ctx, {Activation::kSigmoid, x.view(), ones.view(), dx.view()});
  for (int i = 0; i < 4; ++i) EXPECT_EQ(dx.f32()[i], 0);
}

TEST(Backward, Glu) {
  Random random(3);
  for (const Activation activation : {Activation::kSilu, Activation::kSigmoid}) {
    const std::int64_t rows = random.integer(1, 20);
    const std::int64_t width = random.integer(1, 99);
    Tensor gate_up = random.normal_tensor({rows, 2 * width});
    const Tensor dy = random.normal_tensor({rows, width});
    check(
        random, {{"gate_up", &gate_up}}, ops::glu_backward, reference::glu_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(GluBackwardArgs{activation, gate_up.view(), dy.view(), d[0].view()});
        },
        [&] {
          Tensor y = dy;
          reference::glu({activation, gate_up.view(), y.view()});
          return dot(dy, y);
        });
  }
}

TEST(Backward, Gate) {
  Random random(4);
  for (const Activation activation : {Activation::kSilu, Activation::kSigmoid}) {
    Tensor x = random.normal_tensor({random.integer(1, 20), random.integer(1, 99)});
    Tensor gate = random.normal_tensor(x.view().shape);
    const Tensor dy = random.normal_tensor(x.view().shape);
    check(
        random, {{"gate", &gate}, {"x", &x}}, ops::gate_backward, reference::gate_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(GateBackwardArgs{activation, gate.view(), x.view(), dy.view(), d[1].view(),
                              d[0].view()});
        },
        [&] {
          Tensor y = x;
          reference::gate({activation, gate.view(), y.view()});
          return dot(dy, y);
        });
  }
}

TEST(Backward, ForgetGate) {
  Random random(5);
  Tensor x = random.normal_tensor({random.integer(1, 20), random.integer(1, 99)}, 3);
  const Tensor dg = random.normal_tensor(x.view().shape);
  const Tensor dk = random.normal_tensor(x.view().shape);
  check(
      random, {{"x", &x}}, ops::forget_gate_backward, reference::forget_gate_backward,
      [&](auto&& op, std::vector<Tensor>& d) {
        Tensor g = x;
        Tensor k = x;
        reference::forget_gate({g.view(), k.view()});
        op(ForgetGateBackwardArgs{std::as_const(g).view(), std::as_const(k).view(), dg.view(),
                                  dk.view(), d[0].view()});
      },
      [&] {
        Tensor g = x;
        Tensor k = x;
        reference::forget_gate({g.view(), k.view()});
        return dot(dg, g) + dot(dk, k);
      });
}

TEST(Backward, FeatureMap) {
  Random random(6);
  for (const Activation activation : test::kActivations) {
    for (const FeatureNorm norm : {FeatureNorm::kNone, FeatureNorm::kL2, FeatureNorm::kSum}) {
      Tensor x =
          away_from_zero(random.normal_tensor({random.integer(1, 9), 3, random.integer(1, 70)}));
      if (norm == FeatureNorm::kSum) {  // a sum near zero would magnify rounding without bound
        for (std::int64_t i = 0; i < x.view().shape.size(); ++i)
          x.f32()[i] = std::abs(x.f32()[i]) + 0.1F;
      }
      const Tensor dy = random.normal_tensor(x.view().shape);
      check(
          random, {{"x", &x}}, ops::feature_map_backward, reference::feature_map_backward,
          [&](auto&& op, std::vector<Tensor>& d) {
            op(FeatureMapBackwardArgs{activation, norm, x.view(), dy.view(), d[0].view()});
          },
          [&] {
            Tensor y = x;
            reference::feature_map({activation, norm, y.view()});
            return dot(dy, y);
          });
    }
  }
}

TEST(Backward, RmsNorm) {
  Random random(7);
  for (int round = 0; round < 12; ++round) {
    const std::int64_t groups = random.integer(1, 3);
    const std::int64_t width = random.integer(2, 70);
    const bool has_gate = round % 3 != 0;
    const bool has_weight = round % 4 != 0;
    const bool gate_first = round % 2 == 0;
    Tensor x = random.normal_tensor({groups * random.integer(1, 40), width});
    Tensor w = random.normal_tensor({groups * width});
    Tensor gate = random.normal_tensor(x.view().shape);
    const Tensor dy = random.normal_tensor(x.view().shape);
    std::vector<test::Input> inputs{{"x", &x, round % 5 == 0}};
    if (has_weight) inputs.push_back({"w", &w, true});
    if (has_gate) inputs.push_back({"gate", &gate});
    const auto gate_view = has_gate ? ConstTensorView(gate.view()) : ConstTensorView();
    const auto w_view = has_weight ? ConstTensorView(w.view()) : ConstTensorView();
    check(
        random, inputs, ops::rms_norm_backward, reference::rms_norm_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(RmsNormBackwardArgs{.x = x.view(),
                                 .w = w_view,
                                 .gate = gate_view,
                                 .gate_first = gate_first,
                                 .eps = 1e-3F,
                                 .dy = dy.view(),
                                 .dx = d[0].view(),
                                 .accumulate_dx = round % 5 == 0,
                                 .dw = has_weight ? d[1].view() : TensorView{},
                                 .dgate = has_gate ? d.back().view() : TensorView{}});
        },
        [&] {
          Tensor y = x;
          reference::rms_norm({.x = x.view(),
                               .w = w_view,
                               .gate = gate_view,
                               .gate_first = gate_first,
                               .y = y.view(),
                               .eps = 1e-3F});
          return dot(dy, y);
        });
  }
}

TEST(Backward, RmsNormFromWhatForwardGave) {
  Random random(70);
  for (int round = 0; round < 8; ++round) {
    const std::int64_t groups = random.integer(1, 3);
    const std::int64_t width = random.integer(2, 70);
    const bool has_weight = round % 4 != 0;
    Tensor x = random.normal_tensor({groups * random.integer(1, 40), width});
    Tensor w = random.normal_tensor({groups * width});
    w.f32()[0] = 0;
    const Tensor dy = random.normal_tensor(x.view().shape);
    const auto w_view = has_weight ? ConstTensorView(w.view()) : ConstTensorView();
    Tensor y(DType::kF32, x.view().shape);
    Tensor scales(DType::kF32, {x.view().shape[0]});
    ThreadPool threads(1);
    Context ctx(threads);
    const RmsNormArgs forward{
        .x = x.view(), .w = w_view, .y = y.view(), .scales = scales.view(), .eps = 1e-3F};
    ops::rms_norm(ctx, forward);
    Tensor plain_y = y;
    Tensor plain_scales = scales;
    RmsNormArgs plain = forward;
    plain.y = plain_y.view();
    plain.scales = plain_scales.view();
    reference::rms_norm(plain);
    test::expect_near(y, plain_y, 1e-6F * test::largest(plain_y));
    test::expect_near(scales, plain_scales, 1e-6F * test::largest(plain_scales));
    std::vector<test::Input> inputs{{"x", &x, round % 3 == 0}};
    if (has_weight) inputs.push_back({"w", &w, true});
    check(
        random, inputs, ops::rms_norm_backward, reference::rms_norm_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(RmsNormBackwardArgs{.y = y.view(),
                                 .scales = scales.view(),
                                 .w = w_view,
                                 .dy = dy.view(),
                                 .dx = d[0].view(),
                                 .accumulate_dx = round % 3 == 0,
                                 .dw = has_weight ? d[1].view() : TensorView{}});
        },
        [&] {
          Tensor again = x;
          reference::rms_norm({.x = x.view(), .w = w_view, .y = again.view(), .eps = 1e-3F});
          return dot(dy, again);
        });
  }
}

TEST(Backward, LogSigmoid) {
  Random random(8);
  for (const bool has_x : {true, false}) {
    Tensor x = random.normal_tensor({random.integer(1, 90), random.integer(1, 20)}, 3);
    Tensor bias = random.normal_tensor({x.view().shape[1]});
    const Tensor dy = random.normal_tensor(x.view().shape);
    const auto forward = [&] {
      Tensor y = x;
      reference::log_sigmoid({.x = has_x ? ConstTensorView(x.view()) : ConstTensorView(),
                              .bias = bias.view(),
                              .y = y.view()});
      return y;
    };
    std::vector<test::Input> inputs{{"bias", &bias, true}};
    if (has_x) inputs.push_back({"x", &x});
    check(
        random, inputs, ops::log_sigmoid_backward, reference::log_sigmoid_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          const Tensor y = forward();
          op(LogSigmoidBackwardArgs{.y = y.view(),
                                    .dy = dy.view(),
                                    .dx = has_x ? d[1].view() : TensorView{},
                                    .dbias = d[0].view()});
        },
        [&] { return dot(dy, forward()); });
  }
}

TEST(Backward, Linear) {
  Random random(9);
  for (int round = 0; round < 8; ++round) {
    const std::int64_t rows = random.integer(1, 40);
    const std::int64_t depth = round == 0 ? 530 : random.integer(1, 70);
    const std::int64_t columns = round == 1 ? 530 : random.integer(1, 40);
    Tensor x = random.normal_tensor({rows, depth});
    Tensor w = random.normal_tensor({columns, depth});
    Tensor bias = random.normal_tensor({columns});
    const Tensor dy = random.normal_tensor({rows, columns});
    check(
        random, {{"x", &x, round % 2 == 0}, {"w", &w, round % 3 != 0}, {"bias", &bias, true}},
        ops::linear_backward, reference::linear_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(LinearBackwardArgs{.dy = dy.view(),
                                .x = x.view(),
                                .w = w.view(),
                                .dx = d[0].view(),
                                .accumulate_dx = round % 2 == 0,
                                .dw = {d[1].view(), round % 3 == 0},
                                .dbias = d[2].view()});
        },
        [&] {
          Tensor y = dy;
          reference::linear({.x = x.view(), .w = w.view(), .y = y.view(), .bias = bias.view()});
          return dot(dy, y);
        });
  }
}

TEST(Backward, LinearOfMoreThanIsPackedAtOnce) {
  Random random(10);
  const Tensor x = random.normal_tensor({2, 3});
  const Tensor w = random.normal_tensor({2100, 3});
  const Tensor dy = random.normal_tensor({2, 2100});
  Tensor got(DType::kF32, {2100, 3});
  Tensor expected = got;
  ThreadPool threads(2);
  Context ctx(threads);
  ops::linear_backward(ctx, {.dy = dy.view(), .x = x.view(), .w = w.view(), .dw = got.view()});
  reference::linear_backward(
      {.dy = dy.view(), .x = x.view(), .w = w.view(), .dw = expected.view()});
  test::expect_near(got, expected, 2e-6F);
}

Tensor rounded(const Tensor& x, DType dtype) {
  Tensor narrow(DType::kBF16, x.view().shape);
  convert(x.view(), narrow.view());
  Tensor y(dtype, x.view().shape);
  convert(std::as_const(narrow).view(), y.view());
  return y;
}

Tensor magnitudes(Tensor x) {
  for (std::int64_t i = 0; i < x.view().shape.size(); ++i) x.f32()[i] = std::abs(x.f32()[i]);
  return x;
}

// Products of bfloat16 are exact; n of them summed in float32 one after the other are off by at
// most n · ε/2 of the sum of their magnitudes, and are added to what was there with one rounding
// more.
void expect_near_sums(const Tensor& got, const Tensor& expected, const Tensor& sums,
                      std::int64_t n) {
  for (std::int64_t i = 0; i < got.view().shape.size(); ++i) {
    const float bound = 1.2e-7F * (static_cast<float>(n) / 2 + 1) * sums.f32()[i];
    ASSERT_NEAR(got.f32()[i], expected.f32()[i], bound) << "at " << i;
  }
}

// With the tiles of AMX, where the machine has them, and without.
TEST(Backward, LinearOfBFloat16EqualsThatOfRoundedValues) {
  Random random(13);
  ThreadPool threads(3);
  Context ctx(threads);
  for (const bool amx : {false, true}) {
    const cpu::IsaForTesting only(
        {.avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx_bf16 = amx});
    for (int round = 0; round < 12; ++round) {
      const std::int64_t rows = random.integer(1, 90);
      const std::int64_t depth = random.integer(1, 100);
      const std::int64_t columns = round == 0 ? 4500 : random.integer(1, 150);
      const Tensor x = random.normal_tensor({rows, depth});
      const Tensor w = random.normal_tensor({columns, depth});
      const Tensor dy = random.normal_tensor({rows, columns});
      const Tensor narrow_w = rounded(w, DType::kBF16);
      Tensor dx = random.normal_tensor({rows, depth});
      Tensor dw = random.normal_tensor({columns, depth});
      Tensor dbias(DType::kF32, {columns});
      Tensor plain_dx = dx;
      Tensor plain_dw = dw;
      Tensor plain_dbias = dbias;
      Tensor sums_dx = magnitudes(dx);
      Tensor sums_dw = magnitudes(dw);
      const bool accumulate = round % 2 == 0;
      ops::linear_backward(ctx, {.dy = dy.view(),
                                 .x = x.view(),
                                 .w = narrow_w.view(),
                                 .dx = dx.view(),
                                 .accumulate_dx = accumulate,
                                 .dw = dw.view(),
                                 .dbias = dbias.view()});
      const Tensor wide_dy = rounded(dy, DType::kF32);
      const Tensor wide_x = rounded(x, DType::kF32);
      const Tensor wide_w = rounded(w, DType::kF32);
      const auto plain = [&](const Tensor& of_dy, const Tensor& of_x, const Tensor& of_w,
                             Tensor& to_dx, Tensor& to_dw) {
        reference::linear_backward({.dy = of_dy.view(),
                                    .x = of_x.view(),
                                    .w = of_w.view(),
                                    .dx = to_dx.view(),
                                    .accumulate_dx = accumulate,
                                    .dw = to_dw.view()});
      };
      plain(wide_dy, wide_x, wide_w, plain_dx, plain_dw);
      plain(magnitudes(wide_dy), magnitudes(wide_x), magnitudes(wide_w), sums_dx, sums_dw);
      expect_near_sums(dx, plain_dx, sums_dx, columns);
      expect_near_sums(dw, plain_dw, sums_dw, rows);
      reference::linear_backward(
          {.dy = dy.view(), .x = x.view(), .w = wide_w.view(), .dbias = plain_dbias.view()});
      test::expect_near(dbias, plain_dbias, 1e-5F);
    }
  }
}

TEST(Backward, CrossEntropy) {
  Random random(11);
  Tensor logits = random.normal_tensor({5, 70}, 2);
  const std::vector<std::int32_t> labels{3, 69, -1, 0, 33};
  std::vector<float> losses(5);
  GradientCheck gradient_check(random, {{"logits", &logits}});
  const auto backward = [&](bool plain) -> GradientCheck::Backward {
    return [&, plain](Context& ctx, std::vector<Tensor>& d) {
      d[0] = logits;
      const CrossEntropyBackwardArgs args{
          .logits = d[0].view(), .labels = labels, .scale = 0.5F, .loss = losses};
      plain ? reference::cross_entropy_backward(args) : ops::cross_entropy_backward(ctx, args);
    };
  };
  gradient_check.expect_fast_equals_plain(backward(false), backward(true), 1e-6F);
  std::vector<float> expected(5);
  reference::cross_entropy({.logits = logits.view(), .labels = labels, .loss = expected});
  for (std::size_t t = 0; t < 5; ++t) EXPECT_NEAR(losses[t], expected[t], 1e-6F);
  gradient_check.expect_slopes_of(
      [&] {
        reference::cross_entropy({.logits = logits.view(), .labels = labels, .loss = losses});
        double sum = 0;
        for (const float loss : losses) sum += 0.5 * static_cast<double>(loss);
        return sum;
      },
      backward(true));
}

TEST(Backward, EmbeddingAddsRowsOfTheSameId) {
  Random random(12);
  Tensor table = random.normal_tensor({7, 70});
  const std::vector<std::int32_t> ids{6, 0, 6, 3, 6};
  const Tensor dy = random.normal_tensor({5, 70});
  check(
      random, {{"table", &table, true}}, ops::embedding_backward, reference::embedding_backward,
      [&](auto&& op, std::vector<Tensor>& d) {
        op(EmbeddingBackwardArgs{.ids = ids, .dy = dy.view(), .dtable = d[0].view()});
      },
      [&] {
        ThreadPool threads(1);
        Context ctx(threads);
        Tensor y = dy;
        ops::embedding(ctx, {.ids = ids, .table = table.view(), .y = y.view()});
        return dot(dy, y);
      });
}

TEST(Backward, Rope) {
  Random random(13);
  const std::vector<std::int64_t> cu = random.lengths(3, 20);
  const std::vector<std::int64_t> positions{0, 5, 0};
  Tensor q = random.normal_tensor({cu.back(), 3, 22});
  Tensor k = random.normal_tensor({cu.back(), 1, 22});
  const Tensor dq = random.normal_tensor(q.view().shape);
  const Tensor dk = random.normal_tensor(k.view().shape);
  check(
      random, {{"q", &q}, {"k", &k}}, ops::rope_backward, reference::rope_backward,
      [&](auto&& op, std::vector<Tensor>& d) {
        d = {dq, dk};
        op(RopeBackwardArgs{d[0].view(), d[1].view(), Sequences(cu), positions});
      },
      [&] {
        Tensor turned_q = q;
        Tensor turned_k = k;
        reference::rope({turned_q.view(), turned_k.view(), Sequences(cu), positions});
        return dot(dq, turned_q) + dot(dk, turned_k);
      });
}

TEST(Backward, TokenShift) {
  Random random(14);
  const std::vector<std::int64_t> cu = random.lengths(3, 40);
  Tensor x = random.normal_tensor({cu.back(), 2, 19});
  Tensor alpha = random.normal_tensor({cu.back(), 2});
  const Tensor dy = random.normal_tensor(x.view().shape);
  check(
      random, {{"x", &x}, {"alpha", &alpha}}, ops::token_shift_backward,
      reference::token_shift_backward,
      [&](auto&& op, std::vector<Tensor>& d) {
        op(TokenShiftBackwardArgs{.x = x.view(),
                                  .alpha = alpha.view(),
                                  .sequences = Sequences(cu),
                                  .dy = dy.view(),
                                  .dx = d[0].view(),
                                  .dalpha = d[1].view()});
      },
      [&] {
        Tensor y = dy;
        std::vector<Tensor> states(3, Tensor(DType::kF32, {2, 19}));
        reference::token_shift(
            {x.view(), alpha.view(), Sequences(cu), test::pointers(states), y.view()});
        return dot(dy, y);
      });
}

TEST(Backward, ShortConv) {
  Random random(15);
  for (int round = 0; round < 8; ++round) {
    const std::vector<std::int64_t> cu = random.lengths(3, 12);
    const std::int64_t channels = random.integer(1, 150);
    const std::int64_t width = random.integer(1, 6);
    const Activation activation = round % 3 == 0 ? Activation::kIdentity : Activation::kSilu;
    Tensor x = random.normal_tensor({cu.back(), channels});
    Tensor w = random.normal_tensor({channels, width});
    Tensor bias = random.normal_tensor({channels});
    const Tensor dy = random.normal_tensor(x.view().shape);
    std::vector<test::Input> inputs{{"x", &x}, {"w", &w, true}};
    if (round % 2 == 0) inputs.push_back({"bias", &bias, true});
    const auto bias_view = round % 2 == 0 ? ConstTensorView(bias.view()) : ConstTensorView();
    check(
        random, inputs, ops::short_conv_backward, reference::short_conv_backward,
        [&](auto&& op, std::vector<Tensor>& d) {
          op(ShortConvBackwardArgs{.x = x.view(),
                                   .w = w.view(),
                                   .bias = bias_view,
                                   .sequences = Sequences(cu),
                                   .activation = activation,
                                   .dy = dy.view(),
                                   .dx = d[0].view(),
                                   .dw = d[1].view(),
                                   .dbias = d.size() > 2 ? d[2].view() : TensorView{}});
        },
        [&] {
          Tensor y = dy;
          std::vector<Tensor> states(3, Tensor(DType::kF32, {channels, width}));
          reference::short_conv({.x = x.view(),
                                 .w = w.view(),
                                 .bias = bias_view,
                                 .sequences = Sequences(cu),
                                 .states = test::pointers(states),
                                 .activation = activation,
                                 .y = y.view()});
          return dot(dy, y);
        });
  }
}

TEST(Backward, ShortConvBehindANorm) {
  Random random(16);
  const std::int64_t head_dim = 5;
  const std::vector<std::int64_t> cu = random.lengths(3, 12);
  Tensor x = random.normal_tensor({cu.back(), 3 * head_dim});
  Tensor w = random.normal_tensor({3 * head_dim, 4});
  const Tensor dy = random.normal_tensor(x.view().shape);
  GradientCheck gradient_check(random, {{"x", &x}, {"w", &w, true}});
  const auto backward = [&](Context& ctx, std::vector<Tensor>& d) {
    ops::short_conv_backward(ctx, {.x = x.view(),
                                   .w = w.view(),
                                   .sequences = Sequences(cu),
                                   .activation = Activation::kSilu,
                                   .norm_width = head_dim,
                                   .dy = dy.view(),
                                   .dx = d[0].view(),
                                   .dw = d[1].view()});
  };
  gradient_check.expect_slopes_of(
      [&] {
        Tensor y = dy;
        std::vector<Tensor> states(3, Tensor(DType::kF32, w.view().shape));
        reference::short_conv({.x = x.view(),
                               .w = w.view(),
                               .sequences = Sequences(cu),
                               .states = test::pointers(states),
                               .activation = Activation::kSilu,
                               .y = y.view()});
        reference::feature_map(
            {.norm = FeatureNorm::kL2, .x = y.view().reshaped({cu.back(), 3, head_dim})});
        return dot(dy, y);
      },
      backward);
}

}  // namespace
}  // namespace deltafox
