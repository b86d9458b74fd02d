// rope, token_shift, log_sigmoid, gate, KvCache and forgetting_attention: fast against plain,
// ragged batches, any split, threads, long sequences, pruning.
#include <gtest/gtest.h>

#include <cmath>

#include "core/float_convert.h"
#include "cpu/isa.h"
#include "ops/forgetting_attention.h"
#include "ops/gate.h"
#include "ops/kv_append.h"
#include "ops/log_sigmoid.h"
#include "ops/rope.h"
#include "ops/token_shift.h"
#include "support/random.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::expect_near;
using test::Random;

// Of an average of values of order one with weights good to some roundings of scores below 50.
constexpr float kPlainTolerance = 2e-5F;

class AttentionOps : public testing::Test {
 protected:
  Random random_{7};
  ThreadPool threads_{3};
  Context ctx_{threads_};
};

TEST_F(AttentionOps, RopeEqualsPlainAtAnyPosition) {
  for (int round = 0; round < 20; ++round) {
    const std::vector<std::int64_t> cu = random_.lengths(3, 20);
    const std::int64_t dim = 2 * random_.integer(1, 40);
    const std::int64_t positions[] = {0, random_.integer(1, 1000), random_.integer(1, 1000000)};
    Tensor q = random_.normal_tensor({cu.back(), 3, dim});
    Tensor k = random_.normal_tensor({cu.back(), 1, dim});
    Tensor expected_q = q;
    Tensor expected_k = k;
    ops::rope(ctx_, {q.view(), k.view(), Sequences(cu), positions, 5e5F});
    reference::rope({expected_q.view(), expected_k.view(), Sequences(cu), positions, 5e5F});
    expect_near(q, expected_q, 2e-6F);
    expect_near(k, expected_k, 2e-6F);
  }
}

TEST_F(AttentionOps, RopeMakesProductsDependOnTheDistanceAlone) {
  const Tensor vectors = random_.normal_tensor({2, 1, 64});
  const std::int64_t cu[] = {0, 1, 2};
  const auto product = [&](std::int64_t first, std::int64_t second) {
    Tensor x = vectors;
    Tensor unused(DType::kF32, {2, 1, 64});
    const std::int64_t positions[] = {first, second};
    ops::rope(ctx_, {x.view(), unused.view(), Sequences(cu), positions, 1e4F});
    double sum = 0;
    for (std::int64_t i = 0; i < 64; ++i) sum += x.f32()[i] * x.f32()[64 + i];
    return sum;
  };
  EXPECT_NEAR(product(0, 5), product(100, 105), 1e-3);
  EXPECT_GT(std::abs(product(0, 5) - product(0, 9)), 1e-2);
}

TEST_F(AttentionOps, TokenShiftEqualsPlain) {
  for (int round = 0; round < 20; ++round) {
    const std::vector<std::int64_t> cu = random_.lengths(3, 40);
    const std::int64_t heads = random_.integer(1, 3);
    const std::int64_t dim = random_.integer(1, 40);
    const Tensor x = random_.normal_tensor({cu.back(), heads, dim});
    Tensor alpha(DType::kF32, {cu.back(), heads});
    for (std::int64_t i = 0; i < alpha.view().shape.size(); ++i) {
      alpha.f32()[i] = random_.uniform(0, 1);
    }
    Tensor state = random_.normal_tensor({3, heads, dim});
    Tensor expected_state = state;
    Tensor y(DType::kF32, x.view().shape);
    Tensor expected = y;
    const auto states_of = [&](Tensor& tensor) {
      std::vector<float*> states;
      for (std::int64_t b = 0; b < 3; ++b) states.push_back(tensor.f32() + b * heads * dim);
      return states;
    };
    const std::vector<float*> states = states_of(state);
    const std::vector<float*> expected_states = states_of(expected_state);
    const Tensor& gates = alpha;
    ops::token_shift(ctx_, {x.view(), gates.view(), Sequences(cu), states, y.view()});
    reference::token_shift(
        {x.view(), gates.view(), Sequences(cu), expected_states, expected.view()});
    expect_near(y, expected, 1e-6F);
    expect_near(state, expected_state, 0);  // a copy of inputs
  }
}

TEST_F(AttentionOps, LogSigmoidEqualsPlain) {
  for (int round = 0; round < 8; ++round) {
    const Shape shape{random_.integer(1, 50), random_.integer(1, 40)};
    const Tensor x = random_.normal_tensor(shape, 20);
    const Tensor bias = random_.normal_tensor({shape[1]});
    Tensor y(DType::kF32, shape);
    Tensor expected = y;
    LogSigmoidArgs args{.y = y.view()};
    if (round % 4 != 1) args.x = x.view();
    if (round % 4 != 2) args.bias = bias.view();
    ops::log_sigmoid(ctx_, args);
    args.y = expected.view();
    reference::log_sigmoid(args);
    for (std::int64_t i = 0; i < shape.size(); ++i) {
      const float want = expected.f32()[i];
      ASSERT_NEAR(y.f32()[i], want, 2e-6F * std::abs(want) + 1e-30F) << i;
      ASSERT_LE(y.f32()[i], 0);
    }
  }
}

TEST_F(AttentionOps, LogSigmoidOfExtremesIsFinite) {
  Tensor x(DType::kF32, {1, 4});
  const float extremes[] = {-1e4F, 1e4F, -3e38F, 3e38F};
  std::copy(std::begin(extremes), std::end(extremes), x.f32());
  ops::log_sigmoid(ctx_, {.x = x.view(), .y = x.view()});
  const float expected[] = {-1e4F, 0, -3e38F, 0};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(x.f32()[i], expected[i]);
}

TEST_F(AttentionOps, GateEqualsPlain) {
  for (const Activation activation : {Activation::kSigmoid, Activation::kSilu}) {
    Tensor x = random_.normal_tensor({random_.integer(1, 30), random_.integer(1, 99)});
    const Tensor gate = random_.normal_tensor(x.view().shape);
    Tensor expected = x;
    ops::gate(ctx_, {activation, gate.view(), x.view()});
    reference::gate({activation, gate.view(), expected.view()});
    expect_near(x, expected, 2e-6F);
  }
}

// Sequences that one call or several read, with caches of their own.
struct AttentionCase {
  AttentionCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
                const KvLayout& layout, float gate_scale = 0.1F)
      : cu(std::move(cu_seqlens)),
        q(random.normal_tensor({cu.back(), heads, layout.head_dim})),
        k(random.normal_tensor({cu.back(), layout.kv_heads, layout.head_dim})),
        v(random.normal_tensor({cu.back(), layout.kv_heads, layout.head_dim})),
        log_gates(DType::kF32, {cu.back(), std::max<std::int64_t>(1, layout.gate_heads)}),
        o(DType::kF32, q.view().shape) {
    for (std::int64_t i = 0; i < log_gates.view().shape.size(); ++i) {
      log_gates.f32()[i] = -gate_scale * std::abs(random.normal());
    }
    for (std::size_t b = 0; b + 1 < cu.size(); ++b) caches.emplace_back(layout);
  }

  // Rows [begin, end) of a tensor, [rows, heads, D].
  static ConstTensorView rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
    const Shape& shape = tensor.view().shape;
    const std::int64_t width = shape.size() / shape[0];
    const Shape part =
        shape.rank() == 3 ? Shape{end - begin, shape[1], shape[2]} : Shape{end - begin, shape[1]};
    return {tensor.f32() + begin * width, DType::kF32, part};
  }

  // Appends and attends for the packed rows [begin, end), which are those of `sequences`.
  template <typename Op>
  void run(Context& ctx, Op&& op, std::int64_t begin, std::int64_t end,
           std::span<const std::int64_t> sequences, std::span<KvCache* const> of_sequences) {
    for (std::size_t b = 0; b < of_sequences.size(); ++b) {
      of_sequences[b]->extend(sequences[b + 1] - sequences[b]);
    }
    ops::kv_append(ctx, {.k = rows(k, begin, end),
                         .v = rows(v, begin, end),
                         .log_gates = rows(log_gates, begin, end),
                         .sequences = Sequences(sequences),
                         .caches = of_sequences});
    const ConstTensorView out = rows(o, begin, end);
    op(ForgettingAttentionArgs{.q = rows(q, begin, end),
                               .sequences = Sequences(sequences),
                               .caches = of_sequences,
                               .log_pruning_tolerance = tolerance,
                               .bf16_products = bf16_products,
                               .o = {const_cast<void*>(out.data), DType::kF32, out.shape}});
    for (KvCache* cache : of_sequences) cache->drop_unseen();
  }
  template <typename Op>
  void run_all(Context& ctx, Op&& op) {
    std::vector<KvCache*> pointers;
    for (KvCache& cache : caches) pointers.push_back(&cache);
    run(ctx, op, 0, cu.back(), cu, pointers);
  }

  std::vector<std::int64_t> cu;
  Tensor q, k, v, log_gates, o;
  std::vector<KvCache> caches;
  std::optional<float> tolerance;
  bool bf16_products = false;
};

TEST_F(AttentionOps, AttentionEqualsPlain) {
  for (int round = 0; round < 24; ++round) {
    const std::int64_t kv_heads = random_.integer(1, 2);
    const std::int64_t heads = kv_heads * random_.integer(1, 3);
    KvLayout layout{.kv_heads = kv_heads, .head_dim = random_.integer(1, 70)};
    if (round % 3 != 0) layout.gate_heads = heads;
    if (round % 2 != 0) layout.window = random_.integer(1, 100);
    AttentionCase c(random_, random_.lengths(3, 200), heads, layout);
    AttentionCase plain = c;
    c.run_all(ctx_,
              [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
    plain.run_all(
        ctx_, [](const ForgettingAttentionArgs& args) { reference::forgetting_attention(args); });
    expect_near(c.o, plain.o, kPlainTolerance);
  }
}

// q, k and v become numbers of bfloat16. Where they still are when scaled by 1 / √D, what products
// of bfloat16 round is the weights, by 2^-9 at most: outputs then are off by 2^-9 max|v|. Returns
// the greatest element.
float round_to_bf16(AttentionCase& c) {
  float greatest = 0;
  for (Tensor* tensor : {&c.q, &c.k, &c.v}) {
    for (std::int64_t i = 0; i < tensor->view().shape.size(); ++i) {
      tensor->f32()[i] = bf16_to_f32(f32_to_bf16(tensor->f32()[i]));
      greatest = std::max(greatest, std::abs(tensor->f32()[i]));
    }
  }
  return greatest;
}

// By the tiles of AMX, where the machine has them, and without.
TEST_F(AttentionOps, AttentionByProductsOfBf16EqualsPlain) {
  for (int round = 0; round < 24; ++round) {
    const cpu::IsaForTesting only(
        {.avx2 = true, .avx512 = true, .avx512_bf16 = true, .amx_bf16 = round % 8 < 4});
    const std::int64_t kv_heads = random_.integer(1, 2);
    const std::int64_t heads = kv_heads * random_.integer(1, 3);
    KvLayout layout{.kv_heads = kv_heads, .head_dim = round % 2 == 0 ? 16 : 64};
    if (round % 3 != 0) layout.gate_heads = heads;
    if (round % 4 == 1) layout.window = random_.integer(1, 100);
    AttentionCase c(random_, random_.lengths(3, 400), heads, layout);
    const float greatest = round_to_bf16(c);
    AttentionCase plain = c;
    c.bf16_products = true;
    c.run_all(ctx_,
              [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
    plain.run_all(
        ctx_, [](const ForgettingAttentionArgs& args) { reference::forgetting_attention(args); });
    expect_near(c.o, plain.o, greatest / 512 + kPlainTolerance);
  }
}

// Stretches of 1,024 keys, blocks that begin within one, windows; an odd number of tiles of values.
TEST_F(AttentionOps, LongAttentionByProductsOfBf16EqualsPlain) {
  for (const std::int64_t dim : {16, 64, 256}) {
    KvLayout layout{.kv_heads = 2, .head_dim = dim};
    if (dim != 64) layout.gate_heads = 2;
    if (dim != 16) layout.window = random_.integer(100, 1300);
    AttentionCase c(random_, {0, random_.integer(1100, 1500)}, 2, layout, 0.01F);
    const float greatest = round_to_bf16(c);
    AttentionCase plain = c;
    c.bf16_products = true;
    c.run_all(ctx_,
              [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
    plain.run_all(
        ctx_, [](const ForgettingAttentionArgs& args) { reference::forgetting_attention(args); });
    expect_near(c.o, plain.o, greatest / 512 + kPlainTolerance);
  }
}

// With products of bfloat16, splits at multiples of 64; elsewhere what is left at an end may be too
// short for them.
TEST_F(AttentionOps, AnySplitGivesTheSameBits) {
  for (int kind = 0; kind < 4; ++kind) {
    KvLayout layout{.kv_heads = 1, .head_dim = kind < 2 ? 24 : 16, .gate_heads = 2};
    if (kind % 2 == 1) layout.window = 70;
    AttentionCase fresh(random_, {0, 300}, 2, layout);
    fresh.bf16_products = kind >= 2;
    const float by_rounding =
        fresh.bf16_products ? round_to_bf16(fresh) / 512 + 2 * kPlainTolerance : 0;
    AttentionCase whole = fresh;
    const auto attention = [&](const ForgettingAttentionArgs& args) {
      ops::forgetting_attention(ctx_, args);
    };
    whole.run_all(ctx_, attention);
    for (const std::int64_t piece : {1, 7, 63, 64, 65, 128, 200}) {
      AttentionCase split = fresh;
      for (std::int64_t begin = 0; begin < 300; begin += piece) {
        const std::int64_t end = std::min<std::int64_t>(300, begin + piece);
        const std::int64_t sequence[] = {0, end - begin};
        KvCache* const cache = &split.caches[0];
        split.run(ctx_, attention, begin, end, sequence, {&cache, 1});
      }
      expect_near(split.o, whole.o, piece % 64 == 0 ? 0 : by_rounding);
    }
  }
}

TEST_F(AttentionOps, AFewQueriesHaveProductsOfFloat32) {
  constexpr std::int64_t kMany = 64;
  constexpr std::int64_t kFew = 11;
  const KvLayout layout{.kv_heads = 1, .head_dim = 24, .gate_heads = 2};
  AttentionCase c(random_, {0, kMany + kFew}, 2, layout);
  AttentionCase narrow = c;
  narrow.bf16_products = true;
  for (AttentionCase* of : {&c, &narrow}) {
    of->run_all(
        ctx_, [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
  }
  const std::int64_t row = c.o.view().shape.size() / (kMany + kFew);
  for (std::int64_t i = kMany * row; i < (kMany + kFew) * row; ++i) {
    ASSERT_EQ(narrow.o.f32()[i], c.o.f32()[i]);
  }
}

// A single query of few heads is cut into tasks of stretches of keys, the queries of a prompt are
// not: the sums are the same.
TEST_F(AttentionOps, StretchesOfALongSequenceGiveTheSameBitsTogetherAndApart) {
  constexpr std::int64_t kLength = 2300;
  constexpr std::int64_t kHead = 2240;
  for (int kind = 0; kind < 4; ++kind) {
    KvLayout layout{.kv_heads = 1, .head_dim = 20, .gate_heads = 1};
    if (kind % 2 == 1) layout.window = 1500;
    AttentionCase whole(random_, {0, kLength}, 1, layout, 0.001F);
    whole.bf16_products = kind >= 2;
    AttentionCase split = whole;
    const auto attention = [&](const ForgettingAttentionArgs& args) {
      ops::forgetting_attention(ctx_, args);
    };
    whole.run_all(ctx_, attention);
    KvCache* const cache = &split.caches[0];
    const std::int64_t head[] = {0, kHead};
    split.run(ctx_, attention, 0, kHead, head, {&cache, 1});
    const std::int64_t step = whole.bf16_products ? kLength - kHead : 1;
    for (std::int64_t t = kHead; t < kLength; t += step) {
      const std::int64_t rest[] = {0, step};
      split.run(ctx_, attention, t, t + step, rest, {&cache, 1});
    }
    expect_near(split.o, whole.o, 0);
    AttentionCase plain = split;
    plain.caches.assign(1, KvCache(layout));
    plain.run_all(
        ctx_, [](const ForgettingAttentionArgs& args) { reference::forgetting_attention(args); });
    if (!whole.bf16_products) expect_near(split.o, plain.o, kPlainTolerance);
  }
}

TEST_F(AttentionOps, ASequenceDoesNotDependOnItsBatchNorOnThreads) {
  const KvLayout layout{.kv_heads = 2, .head_dim = 32, .gate_heads = 2};
  for (const bool bf16_products : {false, true}) {
    AttentionCase batch(random_, {0, 70, 600, 601}, 2, layout);  // ends of 6, 18 and 1 tokens
    batch.bf16_products = bf16_products;
    AttentionCase alone = batch;
    batch.run_all(
        ctx_, [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
    ThreadPool one(1);
    Context one_ctx(one);
    const std::int64_t sequence[] = {0, 530};
    KvCache* const cache = &alone.caches[1];
    const auto attention = [&](const ForgettingAttentionArgs& args) {
      ops::forgetting_attention(one_ctx, args);
    };
    alone.run(one_ctx, attention, 70, 600, sequence, {&cache, 1});
    for (std::int64_t i = 70 * 64; i < 600 * 64; ++i) {
      ASSERT_EQ(alone.o.f32()[i], batch.o.f32()[i]);
    }
  }
}

// Sums of a hundred thousand log gates: a float32 sum would be wrong by some hundredths there.
TEST_F(AttentionOps, GatesKeepTheirPrecisionInLongSequences) {
  const std::int64_t length = 100'000;
  const std::int64_t last = 300;
  const KvLayout layout{.kv_heads = 1, .head_dim = 1, .gate_heads = 1, .window = last};
  KvCache cache(layout);
  KvCache* const pointer = &cache;
  Tensor gates(DType::kF32, {length, 1});
  for (std::int64_t t = 0; t < length; ++t) gates.f32()[t] = random_.uniform(-8, 0);
  for (std::int64_t t = length - last; t < length; ++t) gates.f32()[t] = random_.uniform(-0.02F, 0);
  const Tensor zeros(DType::kF32, {length, 1, 1});
  const Tensor v = random_.normal_tensor({length, 1, 1});
  Tensor o(DType::kF32, {last, 1, 1});
  const auto append = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t sequence[] = {0, end - begin};
    cache.extend(end - begin);
    ops::kv_append(ctx_, {.k = AttentionCase::rows(zeros, begin, end),
                          .v = AttentionCase::rows(v, begin, end),
                          .log_gates = AttentionCase::rows(gates, begin, end),
                          .sequences = Sequences(sequence),
                          .caches = {&pointer, 1}});
  };
  append(0, length - last);
  append(length - last, length);
  const std::int64_t sequence[] = {0, last};
  ops::forgetting_attention(ctx_, {.q = AttentionCase::rows(zeros, 0, last),
                                   .sequences = Sequences(sequence),
                                   .caches = {&pointer, 1},
                                   .o = o.view()});
  double decay = 0;
  double total = 0;
  double expected = 0;
  for (std::int64_t t = length - 1; t >= length - last; --t) {
    total += std::exp(decay);
    expected += std::exp(decay) * v.f32()[t];
    decay += gates.f32()[t];
  }
  EXPECT_NEAR(o.f32()[last - 1], expected / total, 2e-6);
}

// With the value of a key telling its page, the output is what the weights of each page total.
TEST_F(AttentionOps, PrunedWeightsTotalAtMostTheTolerance) {
  constexpr std::int64_t kPages = 24;
  constexpr std::int64_t kLength = kPages * kKvPage;
  const KvLayout layout{.kv_heads = 1, .head_dim = kPages, .gate_heads = 1, .key_norms = true};
  for (const float tolerance : {-10.0F, -4.0F, -1.0F}) {
    AttentionCase full(random_, {0, kLength}, 1, layout, 0.3F);
    for (std::int64_t j = 0; j < kLength; ++j) {
      std::fill_n(full.v.f32() + j * kPages, kPages, 0.0F);
      full.v.f32()[j * kPages + j / kKvPage] = 1;
    }
    AttentionCase pruned = full;
    pruned.tolerance = tolerance;
    full.run_all(
        ctx_, [](const ForgettingAttentionArgs& args) { reference::forgetting_attention(args); });
    ctx_.statistics() = {};
    pruned.run_all(
        ctx_, [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
    const Statistics& statistics = ctx_.statistics();
    EXPECT_EQ(statistics.attention_blocks, kPages * (kPages + 1));  // two of queries in a page
    EXPECT_GT(statistics.attention_blocks_skipped, statistics.attention_blocks / 4);
    for (std::int64_t i = 0; i < kLength; ++i) {
      double lost = 0;
      for (std::int64_t p = 0; p < kPages; ++p) {
        if (pruned.o.f32()[i * kPages + p] == 0) lost += full.o.f32()[i * kPages + p];
      }
      ASSERT_LE(lost, std::exp(tolerance)) << "query " << i;
    }
  }
}

TEST_F(AttentionOps, ACopyOfACacheSharesFullPagesAndIsIndependent) {
  const KvLayout layout{.kv_heads = 1, .head_dim = 16, .gate_heads = 1};
  AttentionCase c(random_, {0, 100}, 1, layout);
  const auto attention = [&](const ForgettingAttentionArgs& args) {
    ops::forgetting_attention(ctx_, args);
  };
  c.run_all(ctx_, attention);
  KvCache fork = c.caches[0];
  EXPECT_EQ(&fork.page(0), &c.caches[0].page(0));
  EXPECT_NE(&fork.page(1), &c.caches[0].page(1));

  // The original goes on with other tokens than the copy, which must not see them.
  AttentionCase other(random_, {0, 50}, 1, layout);
  AttentionCase same = other;
  const std::int64_t sequence[] = {0, 50};
  AttentionCase stray(random_, {0, 50}, 1, layout);
  KvCache untouched = fork;
  KvCache* pointer = &c.caches[0];
  stray.run(ctx_, attention, 0, 50, sequence, {&pointer, 1});
  pointer = &fork;
  other.run(ctx_, attention, 0, 50, sequence, {&pointer, 1});
  pointer = &untouched;
  same.run(ctx_, attention, 0, 50, sequence, {&pointer, 1});
  expect_near(other.o, same.o, 0);
}

TEST_F(AttentionOps, AWindowBoundsTheCache) {
  const KvLayout layout{.kv_heads = 1, .head_dim = 4, .gate_heads = 1, .window = 100};
  AttentionCase c(random_, {0, 1000}, 1, layout);
  c.run_all(ctx_,
            [&](const ForgettingAttentionArgs& args) { ops::forgetting_attention(ctx_, args); });
  const KvCache& cache = c.caches[0];
  EXPECT_EQ(cache.length(), 1000);
  EXPECT_EQ(cache.first_page(), (1000 - 99) / kKvPage);
  EXPECT_EQ(cache.end_page(), 16);
  KvCache grown(layout);
  grown.grow_to(1000);
  EXPECT_EQ(grown.first_page(), cache.first_page());
  EXPECT_EQ(grown.end_page(), cache.end_page());
}

}  // namespace
}  // namespace deltafox
