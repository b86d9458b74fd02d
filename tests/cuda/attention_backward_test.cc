// Attention's gradients on the GPU against the plain float32 version on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cuda/gpu.h"
#include "ops/forgetting_attention.h"
#include "ops/kv_append.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::epsilon;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

class CudaAttentionBackward : public EachDType {};

struct Case {
  std::vector<std::int64_t> cu;
  std::int64_t heads;
  std::int64_t kv_heads;
  std::int64_t dim;
  bool gated = true;
  std::optional<std::int64_t> window = {};
  std::optional<float> tolerance = {};
  std::vector<float> bounds = {};
  double gates_sum = 0;  // of log-gates, where it is large: weights are off by its rounding
};

struct Inputs {
  Tensor q, k, v, d_o, gates;

  Inputs(Random& random, const Case& c, float score_size = 1)
      : q(random.normal_tensor({c.cu.back(), c.heads, c.dim}, score_size)),
        k(random.normal_tensor({c.cu.back(), c.kv_heads, c.dim})),
        v(random.normal_tensor({c.cu.back(), c.kv_heads, c.dim})),
        d_o(random.normal_tensor({c.cu.back(), c.heads, c.dim})),
        gates(DType::kF32, {c.cu.back(), c.heads}) {
    for (std::int64_t i = 0; i < c.cu.back() * c.heads; ++i) {
      gates.f32()[i] = -0.1F * std::abs(random.normal());
    }
  }
};

// What the forward and the backward give: o, lse, dq, dk, dv and, with gates, d log f.
struct Results {
  Tensor o, lse, dq, dk, dv, dgates;

  Results(const Case& c, DType dtype, Device device)
      : o(dtype, {c.cu.back(), c.heads, c.dim}, device),
        lse(DType::kF32, {c.cu.back(), c.heads}, device),
        dq(dtype, {c.cu.back(), c.heads, c.dim}, device),
        dk(dtype, {c.cu.back(), c.kv_heads, c.dim}, device),
        dv(dtype, {c.cu.back(), c.kv_heads, c.dim}, device),
        dgates(DType::kF32, {c.cu.back(), c.heads}, device) {}
};

constexpr const char* kNames[] = {"o", "lse", "dq", "dk", "dv", "dgates"};
constexpr Tensor Results::*kMembers[] = {&Results::o,  &Results::lse, &Results::dq,
                                         &Results::dk, &Results::dv,  &Results::dgates};
std::size_t member_count(const Case& c) {
  return c.gated ? 6 : 5;
}

void run(Context& ctx, const Case& c, const Inputs& inputs, DType dtype, Results& results,
         bool plain) {
  const Sequences sequences(c.cu);
  std::vector<KvCache> caches(static_cast<std::size_t>(sequences.count()),
                              KvCache({.kv_heads = c.kv_heads,
                                       .head_dim = c.dim,
                                       .gate_heads = c.gated ? c.heads : 0,
                                       .key_norms = c.tolerance.has_value(),
                                       .window = c.window,
                                       .device = ctx.device(),
                                       .dtype = dtype}));
  std::vector<KvCache*> writable;
  for (KvCache& cache : caches) {
    cache.extend(sequences.length(static_cast<std::int64_t>(writable.size())));
    writable.push_back(&cache);
  }
  const ConstTensorView gates = c.gated ? ConstTensorView(inputs.gates.view()) : ConstTensorView();
  ops::kv_append(ctx, {.k = inputs.k.view(),
                       .v = inputs.v.view(),
                       .log_gates = gates,
                       .sequences = sequences,
                       .caches = writable});
  const std::vector<const KvCache*> readable(writable.begin(), writable.end());
  const ForgettingAttentionArgs forward{.q = inputs.q.view(),
                                        .sequences = sequences,
                                        .caches = readable,
                                        .log_pruning_tolerance = c.tolerance,
                                        .score_bounds = c.bounds,
                                        .o = results.o.view(),
                                        .lse = results.lse.view()};
  const auto backward = [&] {
    return ForgettingAttentionBackwardArgs{
        .q = inputs.q.view(),
        .k = inputs.k.view(),
        .v = inputs.v.view(),
        .log_gates = gates,
        .sequences = sequences,
        .window = c.window,
        .log_pruning_tolerance = c.tolerance,
        .score_bounds = c.bounds,
        .o = results.o.view(),
        .lse = results.lse.view(),
        .d_o = inputs.d_o.view(),
        .dq = results.dq.view(),
        .dk = results.dk.view(),
        .dv = results.dv.view(),
        .dlog_gates = c.gated ? results.dgates.view() : TensorView()};
  };
  if (plain) {
    reference::forgetting_attention(forward);
    reference::forgetting_attention_backward(backward());
  } else {
    ops::forgetting_attention(ctx, forward);
    ops::forgetting_attention_backward(ctx, backward());
  }
}

// As float32; inputs are rounded here to what the GPU reads.
Results run_on_gpu(Gpu& gpu, const Case& c, Inputs& inputs) {
  Inputs device = inputs;
  for (const auto member : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::d_o}) {
    device.*member = gpu.upload(inputs.*member, gpu.dtype());
  }
  device.gates = gpu.upload(inputs.gates);
  Results results(c, gpu.dtype(), Device::kCuda);
  run(gpu.ctx(), c, device, gpu.dtype(), results, false);
  for (std::size_t i = 0; i < member_count(c); ++i) {
    results.*kMembers[i] = gpu.download(results.*kMembers[i]);
  }
  return results;
}

// Float32: scores, weights, dS and their sums are each off by sums of a few hundred terms, 16
// roundings, and dS is a difference of two such; the gates' gradients add up differences of sums of
// dS once more. BF16: o, the weights and dS are rounded before they are multiplied, and results
// after; the gates' gradients feel the rounding of o alone.
double tolerance(DType dtype) {
  return dtype == DType::kBF16 ? 3 * epsilon(dtype) : 8 * 16 * epsilon(DType::kF32);
}

void expect_plain_results(Gpu& gpu, const Case& c, Inputs& inputs) {
  const Results got = run_on_gpu(gpu, c, inputs);
  Results expected(c, DType::kF32, Device::kCpu);
  run(gpu.cpu(), c, inputs, DType::kF32, expected, true);
  for (std::size_t i = 0; i < member_count(c); ++i) {
    SCOPED_TRACE(kNames[i]);
    expect_close(got.*kMembers[i], expected.*kMembers[i],
                 tolerance(gpu.dtype()) + 2 * c.gates_sum * epsilon(DType::kF32));
  }
}

TEST_P(CudaAttentionBackward, EqualsPlainForAnyHeadSize) {
  Random random(1);
  Gpu gpu(GetParam());
  for (const std::int64_t dim : {32, 64, 128, 33, 100}) {
    SCOPED_TRACE(dim);
    const Case c{.cu = {0, 1, 65, 65, 129, 400},
                 .heads = 2,
                 .kv_heads = dim == 100 ? 1 : 2,
                 .dim = dim,
                 .gated = dim != 32};
    Inputs inputs(random, c);
    expect_plain_results(gpu, c, inputs);
  }
}

TEST_P(CudaAttentionBackward, EqualsPlainWithAWindow) {
  Random random(2);
  Gpu gpu(GetParam());
  for (const std::int64_t window : {2, 50, 64, 200}) {
    SCOPED_TRACE(window);
    const Case c{.cu = {0, 300, 600},
                 .heads = 4,
                 .kv_heads = 2,
                 .dim = window == 50 ? 128 : 64,
                 .window = window};
    Inputs inputs(random, c);
    expect_plain_results(gpu, c, inputs);
  }
}

// With gates of e^-1 and less a token, all but the last pages weigh less than e^-20.
TEST_P(CudaAttentionBackward, PruningChangesNoMoreThanItsTolerance) {
  Random random(3);
  Gpu gpu(GetParam());
  for (const bool bounded : {false, true}) {
    Case c{.cu = {0, 400, 700}, .heads = 2, .kv_heads = 1, .dim = 64, .tolerance = -20.0F};
    if (bounded) c.bounds = {4, 2};
    Inputs inputs(random, c, 0.1F);
    for (std::int64_t i = 0; i < inputs.gates.view().shape.size(); ++i) inputs.gates.f32()[i] -= 1;
    expect_plain_results(gpu, c, inputs);
    // A value that is no number reaches the queries that read its page, however little it weighs.
    inputs.v.f32()[0] = std::numeric_limits<float>::quiet_NaN();
    Case all = c;
    all.tolerance = {};
    const Results pruned = run_on_gpu(gpu, c, inputs);
    const Results kept = run_on_gpu(gpu, all, inputs);
    const std::int64_t later = 200 * c.heads * c.dim;
    EXPECT_FALSE(std::isnan(pruned.dq.f32()[later]));
    EXPECT_TRUE(std::isnan(kept.dq.f32()[later]));
  }
}

// A gate that closes between the two blocks of a thread block on sm_90: the queries behind it read
// the younger block alone, more of them than fit its shared memory.
TEST_P(CudaAttentionBackward, BlocksOfOneThreadBlockAreReadApart) {
  Random random(5);
  Gpu gpu(GetParam());
  for (const std::int64_t dim : {64, 128}) {
    const Case c{.cu = {0, 1000},
                 .heads = 1,
                 .kv_heads = 1,
                 .dim = dim,
                 .tolerance = -20.0F,
                 .gates_sum = 100};
    Inputs inputs(random, c);
    for (std::int64_t t = 0; t < c.cu.back(); ++t) {
      inputs.gates.f32()[t] = t == 192 ? -100.0F : 0.01F * inputs.gates.f32()[t];
    }
    expect_plain_results(gpu, c, inputs);
  }
}

Tensor cut(const Tensor& from, std::int64_t begin, std::int64_t end) {
  const Shape& shape = from.view().shape;
  const std::int64_t width = shape.size() / shape[0];
  Tensor part(DType::kF32, shape.rank() == 3 ? Shape{end - begin, shape[1], shape[2]}
                                             : Shape{end - begin, shape[1]});
  std::copy_n(from.f32() + begin * width, (end - begin) * width, part.f32());
  return part;
}

TEST_P(CudaAttentionBackward, NeighboursAndRunsChangeNothing) {
  Random random(4);
  Gpu gpu(GetParam());
  for (const std::int64_t dim : {64, 128}) {
    const Case c{.cu = {0, 700, 701, 900, 1100}, .heads = 4, .kv_heads = 2, .dim = dim};
    Inputs inputs(random, c);
    const Results together = run_on_gpu(gpu, c, inputs);
    const Results again = run_on_gpu(gpu, c, inputs);
    for (const auto member : kMembers) expect_equal(again.*member, together.*member);
    for (std::size_t b = 0; b + 1 < c.cu.size(); ++b) {
      Case alone = c;
      alone.cu = {0, c.cu[b + 1] - c.cu[b]};
      Inputs own = inputs;
      for (const auto member : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::d_o, &Inputs::gates}) {
        own.*member = cut(inputs.*member, c.cu[b], c.cu[b + 1]);
      }
      const Results got = run_on_gpu(gpu, alone, own);
      for (const auto member : kMembers) {
        expect_equal(got.*member, cut(together.*member, c.cu[b], c.cu[b + 1]));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaAttentionBackward, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
