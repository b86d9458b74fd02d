// The backward of delta_rule, gla, ssd, selective_scan and forgetting_attention.
#include <gtest/gtest.h>

#include <limits>

#include "ops/delta_rule.h"
#include "ops/forgetting_attention.h"
#include "ops/gla.h"
#include "ops/kv_append.h"
#include "ops/selective_scan.h"
#include "ops/ssd.h"
#include "support/gradients.h"

namespace deltafox {
namespace {

using test::dot;
using test::GradientCheck;
using test::Input;
using test::Random;

using Lengths = std::vector<std::int64_t>;

std::vector<Tensor> zero_states(const Lengths& cu, const Shape& shape) {
  return std::vector<Tensor>(cu.size() - 1, Tensor(DType::kF32, shape));
}

// Keys of length one and β in (0, 1), as the model has them: the recurrence is then stable.
void normalise_rows(Tensor& x) {
  const std::int64_t width = x.view().shape[2];
  for (std::int64_t r = 0; r < x.view().shape.size() / width; ++r) {
    float* row = x.f32() + r * width;
    float squares = 1e-6F;
    for (std::int64_t i = 0; i < width; ++i) squares += row[i] * row[i];
    for (std::int64_t i = 0; i < width; ++i) row[i] /= std::sqrt(squares);
  }
}

struct DeltaGradients {
  DeltaGradients(Random& random, Lengths lengths, std::int64_t heads, std::int64_t key_dim,
                 std::int64_t value_dim, bool has_beta)
      : cu(std::move(lengths)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(random.normal_tensor({cu.back(), heads, key_dim})),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        beta(DType::kF32, {cu.back(), heads}),
        dy(random.normal_tensor({cu.back(), heads, value_dim})),
        use_beta(has_beta) {
    normalise_rows(q);
    normalise_rows(k);
    for (std::int64_t i = 0; i < cu.back() * heads; ++i) beta.f32()[i] = random.uniform(0, 1);
  }

  std::vector<Input> inputs() {
    std::vector<Input> result{{"q", &q}, {"k", &k}, {"v", &v}};
    if (use_beta) result.push_back({"beta", &beta});
    return result;
  }
  DeltaRuleBackwardArgs backward(std::vector<Tensor>& d) {
    return {.q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .beta = use_beta ? ConstTensorView(beta.view()) : ConstTensorView(),
            .sequences = Sequences(cu),
            .d_o = dy.view(),
            .dq = d[0].view(),
            .dk = d[1].view(),
            .dv = d[2].view(),
            .dbeta = use_beta ? d[3].view() : TensorView{}};
  }
  double objective() {
    Tensor o = dy;
    std::vector<Tensor> states =
        zero_states(cu, {q.view().shape[1], q.view().shape[2], v.view().shape[2]});
    reference::delta_rule({.q = q.view(),
                           .k = k.view(),
                           .v = v.view(),
                           .beta = use_beta ? ConstTensorView(beta.view()) : ConstTensorView(),
                           .sequences = Sequences(cu),
                           .states = test::pointers(states),
                           .o = o.view()});
    return dot(dy, o);
  }

  Lengths cu;
  Tensor q, k, v, beta, dy;
  bool use_beta;
};

struct GlaGradients {
  GlaGradients(Random& random, Lengths lengths, std::int64_t heads, std::int64_t key_dim,
               std::int64_t value_dim)
      : cu(std::move(lengths)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(random.normal_tensor({cu.back(), heads, key_dim})),
        g(DType::kF32, {cu.back(), heads, key_dim}),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        dy(random.normal_tensor({cu.back(), heads, value_dim})) {
    // Gates from all but closed to all but open.
    for (std::int64_t i = 0; i < g.view().shape.size(); ++i) {
      g.f32()[i] = 1 / (1 + std::exp(-random.normal(4)));
    }
  }

  std::vector<Input> inputs() { return {{"q", &q}, {"k", &k}, {"g", &g}, {"v", &v}}; }
  GlaBackwardArgs backward(std::vector<Tensor>& d) {
    return {.q = q.view(),
            .k = k.view(),
            .g = g.view(),
            .v = v.view(),
            .sequences = Sequences(cu),
            .d_o = dy.view(),
            .dq = d[0].view(),
            .dk = d[1].view(),
            .dg = d[2].view(),
            .dv = d[3].view()};
  }
  double objective() {
    Tensor o = dy;
    std::vector<Tensor> states =
        zero_states(cu, {q.view().shape[1], q.view().shape[2], v.view().shape[2]});
    reference::gla({.q = q.view(),
                    .k = k.view(),
                    .g = g.view(),
                    .v = v.view(),
                    .sequences = Sequences(cu),
                    .states = test::pointers(states),
                    .o = o.view()});
    return dot(dy, o);
  }

  Lengths cu;
  Tensor q, k, g, v, dy;
};

struct SsdGradients {
  SsdGradients(Random& random, Lengths lengths, std::int64_t num_groups, std::int64_t group_heads,
               std::int64_t dim, std::int64_t state_size, bool clamps)
      : cu(std::move(lengths)),
        heads(num_groups * group_heads),
        groups(num_groups),
        xbc(random.normal_tensor({cu.back(), heads * dim + 2 * groups * state_size})),
        dt(random.normal_tensor({cu.back(), heads})),
        dt_bias(random.normal_tensor({heads})),
        a_log(random.normal_tensor({heads})),
        d(random.normal_tensor({heads})),
        dy(random.normal_tensor({cu.back(), heads, dim})),
        dt_min(clamps ? 0.4F : 0),
        dt_max(clamps ? 1.5F : std::numeric_limits<float>::infinity()) {}

  std::vector<Input> inputs() {
    return {{"xbc", &xbc},
            {"dt", &dt},
            {"dt_bias", &dt_bias, true},
            {"a_log", &a_log, true},
            {"d", &d, true}};
  }
  SsdBackwardArgs backward(std::vector<Tensor>& gradients) {
    return {.xbc = xbc.view(),
            .dt = dt.view(),
            .dt_bias = dt_bias.view(),
            .a_log = a_log.view(),
            .d = d.view(),
            .dt_min = dt_min,
            .dt_max = dt_max,
            .num_groups = groups,
            .sequences = Sequences(cu),
            .dy = dy.view(),
            .dxbc = gradients[0].view(),
            .ddt = gradients[1].view(),
            .d_dt_bias = gradients[2].view(),
            .d_a_log = gradients[3].view(),
            .dd = gradients[4].view()};
  }
  double objective() {
    Tensor y = dy;
    SsdArgs args{.xbc = xbc.view(),
                 .dt = dt.view(),
                 .dt_bias = dt_bias.view(),
                 .a_log = a_log.view(),
                 .d = d.view(),
                 .dt_min = dt_min,
                 .dt_max = dt_max,
                 .num_groups = groups,
                 .sequences = Sequences(cu),
                 .states = {},
                 .y = y.view()};
    std::vector<Tensor> states = zero_states(cu, {heads, args.state_size(), dy.view().shape[2]});
    const std::vector<float*> pointers = test::pointers(states);
    args.states = pointers;
    reference::ssd(args);
    return dot(dy, y);
  }

  Lengths cu;
  std::int64_t heads, groups;
  Tensor xbc, dt, dt_bias, a_log, d, dy;
  float dt_min, dt_max;
};

struct ScanGradients {
  ScanGradients(Random& random, Lengths lengths, std::int64_t channels, std::int64_t size,
                bool has_gate)
      : cu(std::move(lengths)),
        x(random.normal_tensor({cu.back(), channels})),
        dt(random.normal_tensor({cu.back(), channels})),
        dt_bias(random.normal_tensor({channels})),
        a_log(random.normal_tensor({channels, size})),
        b(random.normal_tensor({cu.back(), size})),
        c(random.normal_tensor({cu.back(), size})),
        d(random.normal_tensor({channels})),
        gate(random.normal_tensor({cu.back(), channels})),
        dy(random.normal_tensor({cu.back(), channels})),
        use_gate(has_gate) {}

  std::vector<Input> inputs() {
    std::vector<Input> result{{"x", &x},      {"dt", &dt}, {"dt_bias", &dt_bias, true},
                              {"b", &b},      {"c", &c},   {"a_log", &a_log, true},
                              {"d", &d, true}};
    if (use_gate) result.push_back({"gate", &gate});
    return result;
  }
  SelectiveScanBackwardArgs backward(std::vector<Tensor>& gradients) {
    return {.x = x.view(),
            .dt = dt.view(),
            .dt_bias = dt_bias.view(),
            .a_log = a_log.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.view(),
            .gate = use_gate ? ConstTensorView(gate.view()) : ConstTensorView(),
            .sequences = Sequences(cu),
            .dy = dy.view(),
            .dx = gradients[0].view(),
            .ddt = gradients[1].view(),
            .d_dt_bias = gradients[2].view(),
            .d_a_log = gradients[5].view(),
            .db = gradients[3].view(),
            .dc = gradients[4].view(),
            .dd = gradients[6].view(),
            .dgate = use_gate ? gradients[7].view() : TensorView{}};
  }
  double objective() {
    Tensor y = dy;
    std::vector<Tensor> states = zero_states(cu, {a_log.view().shape[1], x.view().shape[1]});
    reference::selective_scan({.x = x.view(),
                               .dt = dt.view(),
                               .dt_bias = dt_bias.view(),
                               .a_log = a_log.view(),
                               .b = b.view(),
                               .c = c.view(),
                               .d = d.view(),
                               .gate = use_gate ? ConstTensorView(gate.view()) : ConstTensorView(),
                               .sequences = Sequences(cu),
                               .states = test::pointers(states),
                               .y = y.view()});
    return dot(dy, y);
  }

  Lengths cu;
  Tensor x, dt, dt_bias, a_log, b, c, d, gate, dy;
  bool use_gate;
};

struct AttentionGradients {
  AttentionGradients(Random& random, Lengths lengths, std::int64_t kv_heads, std::int64_t group,
                     std::int64_t dim, bool has_gates)
      : cu(std::move(lengths)),
        q(random.normal_tensor({cu.back(), kv_heads * group, dim})),
        k(random.normal_tensor({cu.back(), kv_heads, dim})),
        v(random.normal_tensor({cu.back(), kv_heads, dim})),
        gates(random.normal_tensor({cu.back(), kv_heads * group})),
        dy(random.normal_tensor(q.view().shape)),
        use_gates(has_gates) {
    for (std::int64_t i = 0; i < gates.view().shape.size(); ++i) {
      gates.f32()[i] = -0.1F - std::abs(gates.f32()[i]);
    }
  }

  std::vector<Input> inputs() {
    std::vector<Input> result{{"q", &q}, {"k", &k}, {"v", &v}};
    if (use_gates) result.push_back({"log_gates", &gates});
    return result;
  }
  Tensor forward() {
    ThreadPool threads(1);
    Context ctx(threads);
    std::vector<KvCache> caches(cu.size() - 1,
                                KvCache({.kv_heads = k.view().shape[1],
                                         .head_dim = k.view().shape[2],
                                         .gate_heads = use_gates ? q.view().shape[1] : 0,
                                         .window = window}));
    std::vector<KvCache*> pointers;
    for (std::size_t b = 0; b < caches.size(); ++b) {
      caches[b].extend(cu[b + 1] - cu[b]);
      pointers.push_back(&caches[b]);
    }
    ops::kv_append(ctx, {.k = k.view(),
                         .v = v.view(),
                         .log_gates = use_gates ? ConstTensorView(gates.view()) : ConstTensorView(),
                         .sequences = Sequences(cu),
                         .caches = pointers});
    Tensor result = dy;
    lse = Tensor(DType::kF32, {q.view().shape[0], q.view().shape[1]});
    const std::vector<const KvCache*> read(pointers.begin(), pointers.end());
    reference::forgetting_attention({.q = q.view(),
                                     .sequences = Sequences(cu),
                                     .caches = read,
                                     .o = result.view(),
                                     .lse = lse.view()});
    return result;
  }
  ForgettingAttentionBackwardArgs backward(std::vector<Tensor>& d) {
    o = forward();
    return {.q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .log_gates = use_gates ? ConstTensorView(gates.view()) : ConstTensorView(),
            .sequences = Sequences(cu),
            .window = window,
            .log_pruning_tolerance = tolerance,
            .o = o.view(),
            .lse = use_lse ? ConstTensorView(lse.view()) : ConstTensorView(),
            .d_o = dy.view(),
            .dq = d[0].view(),
            .dk = d[1].view(),
            .dv = d[2].view(),
            .dlog_gates = use_gates ? d[3].view() : TensorView{}};
  }
  double objective() { return dot(dy, forward()); }

  Lengths cu;
  Tensor q, k, v, gates, dy, o, lse;
  bool use_gates;
  bool use_lse = false;
  std::optional<std::int64_t> window = {};
  std::optional<float> tolerance = {};
};

template <typename Case, typename Fast, typename Plain>
void check(Random& random, Case& c, Fast fast, Plain plain, bool slopes) {
  GradientCheck gradient_check(random, c.inputs());
  const GradientCheck::Backward plain_backward = [&](Context&, std::vector<Tensor>& d) {
    plain(c.backward(d));
  };
  if (slopes) return gradient_check.expect_slopes_of([&] { return c.objective(); }, plain_backward);
  gradient_check.expect_fast_equals_plain(
      [&](Context& ctx, std::vector<Tensor>& d) { fast(ctx, c.backward(d)); }, plain_backward,
      5e-5F);
}

TEST(DeltaRuleBackward, ChunkedEqualsRecurrent) {
  Random random(21);
  for (int round = 0; round < 10; ++round) {
    DeltaGradients c(random, random.lengths(2, 150), random.integer(1, 2), random.integer(1, 40),
                     random.integer(1, 40), round % 3 != 0);
    if (round % 5 == 0) c = DeltaGradients(random, {0, 64, 192}, 1, 16, 32, true);
    check(random, c, ops::delta_rule_backward, reference::delta_rule_backward, false);
  }
}

TEST(DeltaRuleBackward, EqualsFiniteDifferences) {
  Random random(22);
  for (const bool has_beta : {true, false}) {
    DeltaGradients c(random, {0, 9, 10}, 2, 5, 4, has_beta);
    check(random, c, ops::delta_rule_backward, reference::delta_rule_backward, true);
  }
}

TEST(GlaBackward, FastEqualsPlain) {
  Random random(23);
  for (int round = 0; round < 10; ++round) {
    GlaGradients c(random, random.lengths(2, 70), random.integer(1, 3), random.integer(1, 20),
                   random.integer(1, 40));
    check(random, c, ops::gla_backward, reference::gla_backward, false);
  }
}

TEST(GlaBackward, EqualsFiniteDifferences) {
  Random random(24);
  GlaGradients c(random, {0, 9, 10}, 2, 5, 4);
  check(random, c, ops::gla_backward, reference::gla_backward, true);
}

TEST(SsdBackward, FastEqualsPlain) {
  Random random(25);
  for (int round = 0; round < 10; ++round) {
    SsdGradients c(random, random.lengths(2, 70), random.integer(1, 2), random.integer(1, 3),
                   random.integer(1, 20), random.integer(1, 20), round % 2 == 0);
    check(random, c, ops::ssd_backward, reference::ssd_backward, false);
  }
}

TEST(SsdBackward, EqualsFiniteDifferences) {
  Random random(26);
  SsdGradients c(random, {0, 9, 10}, 2, 2, 5, 4, false);
  check(random, c, ops::ssd_backward, reference::ssd_backward, true);
}

TEST(SelectiveScanBackward, FastEqualsPlain) {
  Random random(27);
  for (int round = 0; round < 10; ++round) {
    ScanGradients c(random, random.lengths(2, 50), random.integer(1, 90), random.integer(1, 20),
                    round % 3 != 0);
    check(random, c, ops::selective_scan_backward, reference::selective_scan_backward, false);
  }
}

TEST(SelectiveScanBackward, EqualsFiniteDifferences) {
  Random random(28);
  for (const bool has_gate : {true, false}) {
    ScanGradients c(random, {0, 9, 10}, 5, 4, has_gate);
    check(random, c, ops::selective_scan_backward, reference::selective_scan_backward, true);
  }
}

TEST(ForgettingAttentionBackward, FastEqualsPlain) {
  Random random(29);
  for (int round = 0; round < 12; ++round) {
    AttentionGradients c(random, random.lengths(2, 200), random.integer(1, 2), random.integer(1, 2),
                         random.integer(1, 40), round % 3 != 0);
    if (round % 4 == 1) c.window = random.integer(1, 150);
    c.use_lse = round % 2 == 0;
    check(random, c, ops::forgetting_attention_backward, reference::forgetting_attention_backward,
          false);
  }
}

TEST(ForgettingAttentionBackward, EqualsFiniteDifferences) {
  Random random(30);
  for (const bool has_gates : {true, false}) {
    AttentionGradients c(random, {0, 9, 10}, 2, 2, 5, has_gates);
    if (has_gates) c.window = 4;
    check(random, c, ops::forgetting_attention_backward, reference::forgetting_attention_backward,
          true);
  }
}

// With gates of e^-1 and less a token, all but the last pages weigh less than e^-20.
TEST(ForgettingAttentionBackward, PruningChangesGradientsByNoMoreThanItsTolerance) {
  Random random(31);
  AttentionGradients c(random, {0, 400}, 1, 2, 8, true);
  for (std::int64_t i = 0; i < c.gates.view().shape.size(); ++i) c.gates.f32()[i] -= 1;
  for (std::int64_t i = 0; i < c.q.view().shape.size(); ++i) c.q.f32()[i] *= 0.1F;
  c.tolerance = -20.0F;
  check(random, c, ops::forgetting_attention_backward, reference::forgetting_attention_backward,
        false);
}

}  // namespace
}  // namespace deltafox
