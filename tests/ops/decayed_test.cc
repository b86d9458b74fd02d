// gla, ssd and selective_scan: fast against plain, ragged batches, threads, extreme gates.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "deltafox/error.h"
#include "ops/gla.h"
#include "ops/selective_scan.h"
#include "ops/ssd.h"
#include "support/random.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::expect_near;
using test::largest;
using test::pointers;
using test::Random;

// Rounding of float32 sums of some hundred terms none of which is much larger than the largest
// result: a few hundred half units in the last place at the worst.
float tolerance(const Tensor& expected) {
  return 2e-5F * std::max(1.0F, largest(expected));
}

struct GlaCase {
  GlaCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
          std::int64_t key_dim, std::int64_t value_dim)
      : cu(std::move(cu_seqlens)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(DType::kF32, {cu.back(), heads, key_dim}),
        g(DType::kF32, {cu.back(), heads, key_dim}),
        v(random.normal_tensor({cu.back(), heads, value_dim})) {
    // Gates from all but closed to all but open, as k = 1 − g has them.
    for (std::int64_t i = 0; i < g.view().shape.size(); ++i) {
      g.f32()[i] = 1 / (1 + std::exp(-random.normal(8)));
      k.f32()[i] = 1 - g.f32()[i];
    }
    for (std::size_t b = 0; b + 1 < cu.size(); ++b) {
      states.push_back(random.normal_tensor({heads, key_dim, value_dim}));
    }
  }

  template <typename Op>
  Tensor run(Op&& op, std::vector<Tensor>& state) {
    Tensor o(DType::kF32, v.view().shape);
    const std::vector<float*> pointer = pointers(state);
    op(GlaArgs{.q = q.view(),
               .k = k.view(),
               .g = g.view(),
               .v = v.view(),
               .sequences = Sequences(cu),
               .states = pointer,
               .o = o.view()});
    return o;
  }

  std::vector<std::int64_t> cu;
  Tensor q, k, g, v;
  std::vector<Tensor> states;
};

TEST(Gla, ChunkedEqualsRecurrent) {
  Random random(7);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    GlaCase c(random, random.lengths(3, 100), random.integer(1, 3), random.integer(1, 40),
              random.integer(1, 80));
    if (round % 4 == 0) c = GlaCase(random, random.lengths(2, 100), 2, 32, 64);
    std::vector<Tensor> plain_states = c.states;
    const Tensor o = c.run([&](const GlaArgs& args) { ops::gla(ctx, args); }, c.states);
    const Tensor expected = c.run([](const GlaArgs& args) { reference::gla(args); }, plain_states);
    expect_near(o, expected, tolerance(expected));
    for (std::size_t b = 0; b < c.states.size(); ++b) {
      expect_near(c.states[b], plain_states[b], tolerance(plain_states[b]));
    }
  }
}

TEST(Gla, GatesOfZeroForgetAllAndGatesOfOneNothing) {
  Random random(8);
  ThreadPool threads(1);
  Context ctx(threads);
  GlaCase c(random, {0, 50}, 1, 16, 16);
  for (std::int64_t t = 0; t < 50; ++t) {
    for (std::int64_t i = 0; i < 16; ++i) {
      c.g.f32()[t * 16 + i] = t == 20 ? 0.0F : 1.0F;
      if (t != 20) c.k.f32()[t * 16 + i] = t == 30 ? 1.0F : 0.0F;
    }
  }
  c.run([&](const GlaArgs& args) { ops::gla(ctx, args); }, c.states);
  for (std::int64_t i = 0; i < 16; ++i) {
    for (std::int64_t j = 0; j < 16; ++j) {
      const float expected =
          c.k.f32()[20 * 16 + i] * c.v.f32()[20 * 16 + j] + c.v.f32()[30 * 16 + j];
      ASSERT_NEAR(c.states[0].f32()[i * 16 + j], expected, 1e-6F);
    }
  }
}

struct SsdCase {
  SsdCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t num_heads,
          std::int64_t dim, std::int64_t num_groups, std::int64_t state_size)
      : cu(std::move(cu_seqlens)),
        heads(num_heads),
        head_dim(dim),
        groups(num_groups),
        xbc(random.normal_tensor({cu.back(), heads * head_dim + 2 * groups * state_size})),
        dt(random.normal_tensor({cu.back(), heads}, 4)),
        dt_bias(random.normal_tensor({heads})),
        a_log(random.normal_tensor({heads}, 2)),
        d(random.normal_tensor({heads})) {
    for (std::size_t b = 0; b + 1 < cu.size(); ++b) {
      states.push_back(random.normal_tensor({heads, state_size, head_dim}));
    }
  }

  template <typename Op>
  Tensor run(Op&& op, std::vector<Tensor>& state) {
    Tensor y(DType::kF32, {cu.back(), heads, head_dim});
    const std::vector<float*> pointer = pointers(state);
    op(SsdArgs{.xbc = xbc.view(),
               .dt = dt.view(),
               .dt_bias = dt_bias.view(),
               .a_log = a_log.view(),
               .d = d.view(),
               .dt_min = dt_min,
               .dt_max = dt_max,
               .num_groups = groups,
               .sequences = Sequences(cu),
               .states = pointer,
               .y = y.view()});
    return y;
  }

  std::vector<std::int64_t> cu;
  std::int64_t heads, head_dim, groups;
  Tensor xbc, dt, dt_bias, a_log, d;
  float dt_min = 0;
  float dt_max = std::numeric_limits<float>::infinity();
  std::vector<Tensor> states;
};

TEST(Ssd, ChunkedEqualsRecurrent) {
  Random random(9);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    const std::int64_t groups = random.integer(1, 3);
    SsdCase c(random, random.lengths(3, 120), groups * random.integer(1, 3), random.integer(1, 40),
              groups, random.integer(1, 40));
    if (round % 4 == 0) c = SsdCase(random, random.lengths(2, 120), 2, 64, 1, 32);
    if (round % 3 == 0) {
      c.dt_min = 0.3F;
      c.dt_max = 1.5F;
    }
    std::vector<Tensor> plain_states = c.states;
    const Tensor y = c.run([&](const SsdArgs& args) { ops::ssd(ctx, args); }, c.states);
    const Tensor expected = c.run([](const SsdArgs& args) { reference::ssd(args); }, plain_states);
    expect_near(y, expected, tolerance(expected));
    for (std::size_t b = 0; b < c.states.size(); ++b) {
      expect_near(c.states[b], plain_states[b], tolerance(plain_states[b]));
    }
  }
}

// Decays of e^-1000 beside decays of almost one, where a difference of sums over the chunk would
// leave three digits.
TEST(Ssd, StrongDecaysCostNoPrecision) {
  Random random(10);
  ThreadPool threads(1);
  Context ctx(threads);
  SsdCase c(random, {0, 64}, 1, 16, 1, 16);
  c.a_log.f32()[0] = 0;
  c.dt_bias.f32()[0] = 0;
  for (std::int64_t t = 0; t < 64; ++t) c.dt.f32()[t] = t % 32 < 16 ? 1000.0F : -6.0F;
  std::vector<Tensor> plain_states = c.states;
  const Tensor y = c.run([&](const SsdArgs& args) { ops::ssd(ctx, args); }, c.states);
  const Tensor expected = c.run([](const SsdArgs& args) { reference::ssd(args); }, plain_states);
  expect_near(y, expected, 1e-6F * largest(expected));
  expect_near(c.states[0], plain_states[0], 1e-6F * largest(plain_states[0]));
}

TEST(Ssd, RefusesHeadsThatDoNotFallIntoGroups) {
  Random random(11);
  ThreadPool threads(1);
  Context ctx(threads);
  SsdCase c(random, {0, 3}, 3, 4, 1, 5);
  c.groups = 2;
  EXPECT_THROW(c.run([&](const SsdArgs& args) { ops::ssd(ctx, args); }, c.states), Error);
}

struct ScanCase {
  ScanCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t channels,
           std::int64_t size)
      : cu(std::move(cu_seqlens)),
        x(random.normal_tensor({cu.back(), channels})),
        dt(random.normal_tensor({cu.back(), channels}, 4)),
        dt_bias(random.normal_tensor({channels})),
        a_log(random.normal_tensor({channels, size}, 2)),
        b(random.normal_tensor({cu.back(), size})),
        c(random.normal_tensor({cu.back(), size})),
        d(random.normal_tensor({channels})),
        gate(random.normal_tensor({cu.back(), channels})) {
    for (std::size_t s = 0; s + 1 < cu.size(); ++s) {
      states.push_back(random.normal_tensor({size, channels}));
    }
  }

  template <typename Op>
  Tensor run(Op&& op, std::vector<Tensor>& state) {
    Tensor y(DType::kF32, x.view().shape);
    const std::vector<float*> pointer = pointers(state);
    op(SelectiveScanArgs{.x = x.view(),
                         .dt = dt.view(),
                         .dt_bias = dt_bias.view(),
                         .a_log = a_log.view(),
                         .b = b.view(),
                         .c = c.view(),
                         .d = d.view(),
                         .gate = use_gate ? ConstTensorView(gate.view()) : ConstTensorView(),
                         .sequences = Sequences(cu),
                         .states = pointer,
                         .y = y.view()});
    return y;
  }

  std::vector<std::int64_t> cu;
  Tensor x, dt, dt_bias, a_log, b, c, d, gate;
  bool use_gate = true;
  std::vector<Tensor> states;
};

TEST(SelectiveScan, FastEqualsPlain) {
  Random random(12);
  ThreadPool threads(3);
  Context ctx(threads);
  for (int round = 0; round < 24; ++round) {
    ScanCase c(random, random.lengths(3, 60), random.integer(1, 70),
               round % 2 == 0 ? 16 : random.integer(1, 20));
    c.use_gate = round % 3 != 0;
    std::vector<Tensor> plain_states = c.states;
    const Tensor y =
        c.run([&](const SelectiveScanArgs& args) { ops::selective_scan(ctx, args); }, c.states);
    const Tensor expected =
        c.run([](const SelectiveScanArgs& args) { reference::selective_scan(args); }, plain_states);
    expect_near(y, expected, tolerance(expected));
    for (std::size_t b = 0; b < c.states.size(); ++b) {
      expect_near(c.states[b], plain_states[b], tolerance(plain_states[b]));
    }
  }
}

// Rows [begin, end) of the first dimension.
Tensor rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  const ConstTensorView view = tensor.view();
  const std::int64_t width = view.shape.size() / view.shape[0];
  const Shape shape = view.shape.rank() == 2 ? Shape{end - begin, view.shape[1]}
                                             : Shape{end - begin, view.shape[1], view.shape[2]};
  Tensor result(DType::kF32, shape);
  std::copy_n(view.f32() + begin * width, result.view().shape.size(), result.f32());
  return result;
}

// The second of three sequences alone on one thread, against the batch on four; then in two calls
// that meet at the end of a chunk.
template <typename Case, typename Op>
void expect_own_bits(Case batch, Op&& op, std::int64_t chunk,
                     std::initializer_list<Tensor Case::*> inputs) {
  ThreadPool many(4);
  Context many_ctx(many);
  ThreadPool one(1);
  Context one_ctx(one);
  const std::int64_t begin = batch.cu[1];
  const std::int64_t end = batch.cu[2];
  const auto part = [&](std::int64_t from, std::int64_t to, const Tensor& state) {
    Case alone = batch;
    alone.cu = {0, to - from};
    alone.states = {state};
    for (Tensor Case::*input : inputs) alone.*input = rows(batch.*input, from, to);
    return alone;
  };
  std::vector<Tensor> states = batch.states;
  const Tensor all = batch.run([&](const auto& args) { op(many_ctx, args); }, states);
  const auto run_alone = [&](Case& alone) {
    return alone.run([&](const auto& args) { op(one_ctx, args); }, alone.states);
  };
  Case whole = part(begin, end, batch.states[1]);
  expect_near(run_alone(whole), rows(all, begin, end), 0);
  expect_near(whole.states[0], states[1], 0);
  Case head = part(begin, begin + chunk, batch.states[1]);
  expect_near(run_alone(head), rows(all, begin, begin + chunk), 0);
  Case tail = part(begin + chunk, end, head.states[0]);
  expect_near(run_alone(tail), rows(all, begin + chunk, end), 0);
  expect_near(tail.states[0], states[1], 0);
}

TEST(Gla, ASequenceDoesNotDependOnItsBatchNorOnThreadsNorOnCallsThatEndWithAChunk) {
  Random random(13);
  expect_own_bits(GlaCase(random, {0, 70, 153, 154}, 2, 32, 48),
                  [](Context& ctx, const GlaArgs& args) { ops::gla(ctx, args); }, 2 * kGlaChunk,
                  {&GlaCase::q, &GlaCase::k, &GlaCase::g, &GlaCase::v});
}

TEST(Ssd, ASequenceDoesNotDependOnItsBatchNorOnThreadsNorOnCallsThatEndWithAChunk) {
  Random random(14);
  expect_own_bits(SsdCase(random, {0, 70, 153, 154}, 4, 20, 2, 24),
                  [](Context& ctx, const SsdArgs& args) { ops::ssd(ctx, args); }, 2 * kSsdChunk,
                  {&SsdCase::xbc, &SsdCase::dt});
}

TEST(SelectiveScan, ASequenceDoesNotDependOnItsBatchNorOnThreadsNorOnCalls) {
  Random random(15);
  expect_own_bits(
      ScanCase(random, {0, 70, 153, 154}, 90, 16),
      [](Context& ctx, const SelectiveScanArgs& args) { ops::selective_scan(ctx, args); }, 5,
      {&ScanCase::x, &ScanCase::dt, &ScanCase::b, &ScanCase::c, &ScanCase::gate});
}

}  // namespace
}  // namespace deltafox
