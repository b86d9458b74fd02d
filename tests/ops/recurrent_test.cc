// short_conv and delta_rule: fast against plain, ragged batches, any split, threads.
#include <gtest/gtest.h>

#include <cmath>

#include "cpu/isa.h"
#include "ops/activation.h"
#include "ops/delta_rule.h"
#include "ops/rms_norm.h"
#include "ops/short_conv.h"
#include "support/random.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::expect_near;
using test::pointers;
using test::Random;

struct ConvCase {
  ConvCase(Random& random, std::int64_t longest, std::int64_t channels, std::int64_t width)
      : cu(random.lengths(3, longest)),
        x(random.normal_tensor({cu.back(), channels})),
        w(random.normal_tensor({channels, width})),
        bias(random.normal_tensor({channels})) {
    for (int b = 0; b < 3; ++b) states.push_back(random.normal_tensor({channels, width}));
  }
  std::vector<std::int64_t> cu;
  Tensor x, w, bias;
  std::vector<Tensor> states;
};

TEST(ShortConv, FastEqualsPlain) {
  Random random(4);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 30; ++round) {
    const std::int64_t head = random.integer(1, 70);
    const std::int64_t channels = head * random.integer(1, 600 / head);
    // A few tokens, or enough for tasks with whole rows.
    ConvCase c(random, round % 5 == 4 ? 300 : 20, channels, random.integer(1, 6));
    std::vector<Tensor> plain_states = c.states;
    Tensor y(DType::kF32, c.x.view().shape);
    Tensor expected = y;
    const auto run = [&](auto&& op, std::vector<Tensor>& states, Tensor& out) {
      const std::vector<float*> pointer = pointers(states);
      op(ShortConvArgs{.x = std::as_const(c.x).view(),
                       .w = std::as_const(c.w).view(),
                       .bias = round % 2 == 0 ? ConstTensorView(c.bias.view()) : ConstTensorView(),
                       .sequences = Sequences(c.cu),
                       .states = pointer,
                       .activation = round % 3 == 0 ? Activation::kSilu : Activation::kIdentity,
                       .norm_width = round % 4 == 0 ? head : 0,
                       .y = out.view()});
    };
    run([&](const ShortConvArgs& args) { ops::short_conv(ctx, args); }, c.states, y);
    run([](const ShortConvArgs& args) { reference::short_conv(args); }, plain_states, expected);
    expect_near(y, expected, 1e-5F);
    // The state is a copy of inputs: equal to the bit.
    for (std::size_t b = 0; b < 3; ++b) expect_near(c.states[b], plain_states[b], 0);
  }
}

// What a model computes is the same whether heads are normed with the convolution or behind it, and
// however its tokens fall into tasks.
TEST(ShortConv, NormAndTasksChangeNothing) {
  Random random(5);
  ThreadPool threads(3);
  Context ctx(threads);
  ThreadPool one_thread(1);
  Context alone(one_thread);
  for (const std::int64_t head : {1, 13, 64, 128, 300}) {
    ConvCase c(random, 250, 3 * head, 4);
    std::vector<Tensor> states = c.states;
    std::vector<Tensor> states_token = c.states;
    Tensor y(DType::kF32, c.x.view().shape);
    Tensor expected = y;
    Tensor by_token = y;
    const auto args = [&](std::span<float* const> of, std::int64_t norm_width, Tensor& out) {
      return ShortConvArgs{.x = std::as_const(c.x).view(),
                           .w = std::as_const(c.w).view(),
                           .sequences = Sequences(c.cu),
                           .states = of,
                           .activation = Activation::kSilu,
                           .norm_width = norm_width,
                           .y = out.view()};
    };
    ops::short_conv(ctx, args(pointers(c.states), head, y));
    ops::short_conv(alone, args(pointers(states), 0, expected));
    ops::feature_map(
        ctx, {.norm = FeatureNorm::kL2, .x = expected.view().reshaped({c.cu.back(), 3, head})});
    expect_near(y, expected, 0);
    // One token of the first sequence at a time.
    const std::vector<float*> first{states_token[0].f32()};
    const std::vector<std::int64_t> cu{0, 1};
    for (std::int64_t t = 0; t < c.cu[1]; ++t) {
      const auto row = [&](Tensor& tensor) {
        return TensorView{tensor.f32() + t * 3 * head, DType::kF32, {1, 3 * head}};
      };
      ops::short_conv(ctx, {.x = row(c.x),
                            .w = std::as_const(c.w).view(),
                            .sequences = Sequences(cu),
                            .states = first,
                            .activation = Activation::kSilu,
                            .norm_width = head,
                            .y = row(by_token)});
    }
    for (std::int64_t i = 0; i < c.cu[1] * 3 * head; ++i) {
      ASSERT_EQ(by_token.f32()[i], expected.f32()[i]);
    }
    expect_near(states_token[0], states[0], 0);
  }
}

struct DeltaCase {
  DeltaCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
            std::int64_t key_dim, std::int64_t value_dim)
      : cu(std::move(cu_seqlens)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(random.normal_tensor({cu.back(), heads, key_dim})),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        beta({DType::kF32, {cu.back(), heads}}) {
    // Keys of length one and β in (0, 1), as the model has them: the recurrence is then stable.
    for (Tensor* tensor : {&q, &k}) {
      for (std::int64_t r = 0; r < cu.back() * heads; ++r) {
        float* row = tensor->f32() + r * key_dim;
        float squares = 1e-6F;
        for (std::int64_t i = 0; i < key_dim; ++i) squares += row[i] * row[i];
        for (std::int64_t i = 0; i < key_dim; ++i) row[i] /= std::sqrt(squares);
      }
    }
    for (std::int64_t i = 0; i < cu.back() * heads; ++i) beta.f32()[i] = random.uniform(0, 1);
    for (std::size_t b = 0; b + 1 < cu.size(); ++b) {
      states.push_back(random.normal_tensor({heads, key_dim, value_dim}));
    }
  }

  // Runs `op` on tokens [begin, end) of every sequence, into `o` and `states`.
  template <typename Op>
  void run(Op&& op, std::vector<Tensor>& state, Tensor& o) {
    const std::vector<float*> pointer = pointers(state);
    op(DeltaRuleArgs{.q = std::as_const(q).view(),
                     .k = std::as_const(k).view(),
                     .v = std::as_const(v).view(),
                     .beta = use_beta ? ConstTensorView(beta.view()) : ConstTensorView(),
                     .sequences = Sequences(cu),
                     .states = pointer,
                     .bf16_products = bf16_products,
                     .o = o.view()});
  }

  std::vector<std::int64_t> cu;
  Tensor q, k, v, beta;
  std::vector<Tensor> states;
  bool use_beta = true;
  bool bf16_products = false;
};

// ‖got − expected‖ / ‖expected‖
double relative_error(const Tensor& got, const Tensor& expected) {
  double error = 0;
  double norm = 0;
  for (std::int64_t i = 0; i < got.view().shape.size(); ++i) {
    error += std::pow(static_cast<double>(got.f32()[i]) - expected.f32()[i], 2);
    norm += std::pow(static_cast<double>(expected.f32()[i]), 2);
  }
  return std::sqrt(error / norm);
}

// Normed by the rule or behind it, outputs are the same to the bit: chunks, whole and short, and
// what is left to the recurrence, with tiles and without.
TEST(DeltaRule, NormChangesNothingElse) {
  Random random(9);
  ThreadPool threads(3);
  Context ctx(threads);
  for (const bool bf16_products : {false, true}) {
    for (const std::int64_t dim : {5, 32, 128}) {
      DeltaCase c(random, {0, 1, 70, 231}, 3, dim, dim);
      c.bf16_products = bf16_products;
      const Tensor w = random.normal_tensor({dim});
      std::vector<Tensor> states = c.states;
      std::vector<Tensor> plain_states = c.states;
      Tensor o(DType::kF32, {c.cu.back(), 3, dim});
      Tensor expected = o;
      Tensor plain = o;
      const auto with_norm = [&](DeltaRuleArgs args) {
        args.norm = w.view();
        args.norm_eps = 1e-5F;
        return args;
      };
      c.run([&](const DeltaRuleArgs& args) { ops::delta_rule(ctx, with_norm(args)); }, c.states, o);
      c.run([&](const DeltaRuleArgs& args) { ops::delta_rule(ctx, args); }, states, expected);
      const TensorView rows = expected.view().reshaped({c.cu.back() * 3, dim});
      ops::rms_norm(ctx, {.x = rows, .w = w.view(), .y = rows, .eps = 1e-5F});
      expect_near(o, expected, 0);
      for (std::size_t b = 0; b < 3; ++b) expect_near(c.states[b], states[b], 0);
      if (bf16_products) continue;
      c.run([&](const DeltaRuleArgs& args) { reference::delta_rule(with_norm(args)); },
            plain_states, plain);
      EXPECT_LT(relative_error(o, plain), 1e-4);
    }
  }
}

TEST(DeltaRule, ChunkedEqualsRecurrent) {
  Random random(5);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    DeltaCase c(random, random.lengths(3, 200), random.integer(1, 3), random.integer(1, 40),
                random.integer(1, 40));
    if (round % 4 == 0) c = DeltaCase(random, random.lengths(2, 200), 2, 32, 64);
    c.use_beta = round % 5 != 0;
    std::vector<Tensor> plain_states = c.states;
    Tensor o(DType::kF32, c.v.view().shape);
    Tensor expected = o;
    c.run([&](const DeltaRuleArgs& args) { ops::delta_rule(ctx, args); }, c.states, o);
    c.run([](const DeltaRuleArgs& args) { reference::delta_rule(args); }, plain_states, expected);
    // Values are of order one; a hundred roundings of them add up to some 1e-5 at the worst.
    expect_near(o, expected, 2e-5F);
    for (std::size_t b = 0; b < c.states.size(); ++b)
      expect_near(c.states[b], plain_states[b], 4e-5F);
  }
}

// Two operands rounded by 2^-9 at most put a product off by 2^-8 of itself; an output is such a
// product with the state or with U, which comes of another one. Errors of either sign leave less.
// By the tiles of AMX, where the machine has them, and without.
TEST(DeltaRule, ChunkedByProductsOfBf16EqualsRecurrent) {
  Random random(7);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    const cpu::IsaForTesting only(
        {.avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx_bf16 = round % 8 < 4});
    DeltaCase c(random, random.lengths(3, 200), random.integer(1, 3), random.integer(8, 70),
                random.integer(8, 70));
    if (round % 4 == 0) c = DeltaCase(random, random.lengths(2, 300), 2, 32, 64);
    if (round % 4 == 1) c = DeltaCase(random, random.lengths(2, 300), 1, 128, 128);
    c.bf16_products = true;
    c.use_beta = round % 5 != 0;
    std::vector<Tensor> plain_states = c.states;
    Tensor o(DType::kF32, c.v.view().shape);
    Tensor expected = o;
    c.run([&](const DeltaRuleArgs& args) { ops::delta_rule(ctx, args); }, c.states, o);
    c.run([](const DeltaRuleArgs& args) { reference::delta_rule(args); }, plain_states, expected);
    EXPECT_LE(relative_error(o, expected), 1.0 / 128);
    for (std::size_t b = 0; b < c.states.size(); ++b) {
      EXPECT_LE(relative_error(c.states[b], plain_states[b]), 1.0 / 128);
    }
  }
}

TEST(DeltaRule, ASequenceDoesNotDependOnItsBatchNorOnThreads) {
  Random random(6);
  for (const bool bf16_products : {false, true}) {
    DeltaCase batch(random, {0, 70, 200, 201}, 2, 32, 48);
    batch.bf16_products = bf16_products;
    Tensor together(DType::kF32, batch.v.view().shape);
    std::vector<Tensor> states = batch.states;
    ThreadPool many(4);
    Context many_ctx(many);
    batch.run([&](const DeltaRuleArgs& args) { ops::delta_rule(many_ctx, args); }, states,
              together);

    ThreadPool one(1);
    Context one_ctx(one);
    const std::int64_t row = 70 * 2;
    Tensor alone(DType::kF32, {130, 2, 48});
    Tensor state = batch.states[1];
    float* const pointer = state.f32();
    const std::int64_t cu[] = {0, 130};
    ops::delta_rule(one_ctx, {.q = {batch.q.f32() + row * 32, DType::kF32, {130, 2, 32}},
                              .k = {batch.k.f32() + row * 32, DType::kF32, {130, 2, 32}},
                              .v = {batch.v.f32() + row * 48, DType::kF32, {130, 2, 48}},
                              .beta = {batch.beta.f32() + row, DType::kF32, {130, 2}},
                              .sequences = Sequences(cu),
                              .states = {&pointer, 1},
                              .bf16_products = bf16_products,
                              .o = alone.view()});
    for (std::int64_t i = 0; i < 130 * 2 * 48; ++i) {
      ASSERT_EQ(alone.f32()[i], together.f32()[row * 48 + i]) << i;
    }
    expect_near(state, states[1], 0);
  }
}

}  // namespace
}  // namespace deltafox
