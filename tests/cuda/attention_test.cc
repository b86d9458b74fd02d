// Attention and what goes with it on the GPU, against their plain float32 versions on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <optional>

#include "cuda/gpu.h"
#include "ops/cross_entropy.h"
#include "ops/forgetting_attention.h"
#include "ops/kv_append.h"
#include "ops/rope.h"
#include "ops/selective_scan.h"
#include "ops/token_shift.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

// Sums of a few hundred terms in another order are worth a few roundings.
const double kSums = 16 * test::epsilon(DType::kF32);

// Of ops that compute in float32 and round their outputs alone.
double output_tolerance(DType dtype) {
  return dtype == DType::kBF16 ? test::epsilon(dtype) + kSums : kSums;
}

class CudaAttention : public EachDType {};
class CudaRope : public EachDType {};
class CudaTokenShift : public EachDType {};
class CudaSelectiveScan : public EachDType {};

// Sequences with some tokens in their caches, and what the next call brings.
struct Problem {
  std::int64_t heads;
  KvLayout layout;
  std::vector<std::int64_t> before;  // [B+1] cu_seqlens of tokens that lie in the caches
  std::vector<std::int64_t> cu;      // [B+1] of this call's
  std::optional<float> tolerance = {};

  std::int64_t count() const { return static_cast<std::int64_t>(cu.size()) - 1; }
};

struct Inputs {
  Tensor old_k, old_v, old_gates, k, v, gates, q;

  Inputs(Random& random, const Problem& problem) {
    const auto rows = [&](std::int64_t tokens, std::int64_t heads) {
      return random.normal_tensor({tokens, heads, problem.layout.head_dim});
    };
    old_k = rows(problem.before.back(), problem.layout.kv_heads);
    old_v = rows(problem.before.back(), problem.layout.kv_heads);
    k = rows(problem.cu.back(), problem.layout.kv_heads);
    v = rows(problem.cu.back(), problem.layout.kv_heads);
    q = rows(problem.cu.back(), problem.heads);
    const auto log_gates = [&](std::int64_t tokens) {
      Tensor result = random.normal_tensor({tokens, problem.layout.gate_heads});
      for (std::int64_t i = 0; i < result.view().shape.size(); ++i) {
        result.f32()[i] = -0.1F * std::abs(result.f32()[i]);
      }
      return result;
    };
    old_gates = log_gates(problem.before.back());
    gates = log_gates(problem.cu.back());
  }
};

template <typename Run>
Tensor attend(const Problem& problem, const KvLayout& layout, const Inputs& inputs, Context& ctx,
              DType dtype, const Run& run) {
  std::vector<KvCache> caches(static_cast<std::size_t>(problem.count()), KvCache(layout));
  std::vector<KvCache*> writable;
  for (KvCache& cache : caches) writable.push_back(&cache);
  const auto append = [&](const Tensor& k, const Tensor& v, const Tensor& gates,
                          std::span<const std::int64_t> cu) {
    const Sequences sequences(cu);
    for (std::int64_t b = 0; b < problem.count(); ++b) {
      writable[static_cast<std::size_t>(b)]->extend(sequences.length(b));
    }
    if (sequences.tokens() == 0) return;
    ops::kv_append(ctx, {.k = k.view(),
                         .v = v.view(),
                         .log_gates = layout.gate_heads > 0 ? gates.view() : ConstTensorView(),
                         .sequences = sequences,
                         .caches = writable});
  };
  append(inputs.old_k, inputs.old_v, inputs.old_gates, problem.before);
  for (KvCache& cache : caches) cache.drop_unseen();
  append(inputs.k, inputs.v, inputs.gates, problem.cu);
  const std::vector<const KvCache*> readable(writable.begin(), writable.end());
  Tensor o(dtype, inputs.q.view().shape, layout.device);
  run(ForgettingAttentionArgs{.q = inputs.q.view(),
                              .sequences = Sequences(problem.cu),
                              .caches = readable,
                              .log_pruning_tolerance = problem.tolerance,
                              .o = o.view()});
  return o;
}

Tensor attend_on_gpu(Gpu& gpu, const Problem& problem, Inputs& inputs) {
  Inputs device = inputs;
  for (const auto member : {&Inputs::old_k, &Inputs::old_v, &Inputs::k, &Inputs::v, &Inputs::q}) {
    device.*member = gpu.upload(inputs.*member, gpu.dtype());
  }
  device.old_gates = gpu.upload(inputs.old_gates);
  device.gates = gpu.upload(inputs.gates);
  KvLayout layout = problem.layout;
  layout.device = Device::kCuda;
  layout.dtype = gpu.dtype();
  return gpu.download(
      attend(problem, layout, device, gpu.ctx(), gpu.dtype(),
             [&](const auto& args) { ops::forgetting_attention(gpu.ctx(), args); }));
}

Problem random_problem(Random& random) {
  const std::int64_t group = random.integer(1, 2);
  const std::int64_t kv_heads = random.integer(1, 3);
  const std::int64_t dims[] = {16, 24, 32, 64, 100, 128};
  Problem problem{.heads = kv_heads * group,
                  .layout = {.kv_heads = kv_heads, .head_dim = dims[random.integer(0, 5)]},
                  .before = {0},
                  .cu = {0}};
  if (random.integer(0, 3) > 0) problem.layout.gate_heads = problem.heads;
  if (random.integer(0, 2) == 0) problem.layout.window = random.integer(1, 200);
  if (problem.layout.gate_heads > 0 && random.integer(0, 1) == 0) {
    problem.layout.key_norms = true;
    problem.tolerance = -20.0F;
  }
  for (int b = 0; b < 3; ++b) {
    problem.before.push_back(problem.before.back() + random.integer(0, 1) * random.integer(0, 400));
    problem.cu.push_back(problem.cu.back() +
                         (random.integer(0, 2) == 0 ? 1 : random.integer(1, 300)));
  }
  return problem;
}

// Scores and weights are rounded to bfloat16 inputs' products, exact in float32; the weights are
// rounded once, so a weighted mean of values is off by epsilon of their root mean square, which an
// average over many keys makes smaller while its own size shrinks alike.
TEST_P(CudaAttention, EqualsPlainOnRaggedBatchesContinuedFromCaches) {
  Random random(1);
  Gpu gpu(GetParam());
  for (int round = 0; round < 16; ++round) {
    const Problem problem = random_problem(random);
    Inputs inputs(random, problem);
    const Tensor got = attend_on_gpu(gpu, problem, inputs);
    const Tensor expected = attend(problem, problem.layout, inputs, gpu.cpu(), DType::kF32,
                                   [](const auto& args) { reference::forgetting_attention(args); });
    expect_close(got, expected,
                 GetParam() == DType::kBF16 ? 2 * test::epsilon(DType::kBF16) : 4 * kSums);
  }
}

TEST_P(CudaAttention, NeighboursChangeNothing) {
  Random random(2);
  Gpu gpu(GetParam());
  for (int round = 0; round < 6; ++round) {
    const Problem problem = random_problem(random);
    Inputs inputs(random, problem);
    const Tensor together = attend_on_gpu(gpu, problem, inputs);
    expect_equal(attend_on_gpu(gpu, problem, inputs), together);
    for (std::size_t b = 0; b + 1 < problem.cu.size(); ++b) {
      Problem alone = problem;
      alone.before = {0, problem.before[b + 1] - problem.before[b]};
      alone.cu = {0, problem.cu[b + 1] - problem.cu[b]};
      Inputs own = inputs;
      const auto cut = [](const Tensor& from, std::int64_t begin, std::int64_t end) {
        const Shape& shape = from.view().shape;
        const std::int64_t width = shape[0] > 0 ? shape.size() / shape[0] : 0;
        Tensor part(DType::kF32, shape.rank() == 3 ? Shape{end - begin, shape[1], shape[2]}
                                                   : Shape{end - begin, shape[1]});
        std::copy_n(from.f32() + begin * width, (end - begin) * width, part.f32());
        return part;
      };
      for (const auto member : {&Inputs::old_k, &Inputs::old_v, &Inputs::old_gates}) {
        own.*member = cut(inputs.*member, problem.before[b], problem.before[b + 1]);
      }
      for (const auto member : {&Inputs::k, &Inputs::v, &Inputs::gates, &Inputs::q}) {
        own.*member = cut(inputs.*member, problem.cu[b], problem.cu[b + 1]);
      }
      expect_equal(attend_on_gpu(gpu, alone, own), cut(together, problem.cu[b], problem.cu[b + 1]));
    }
  }
}

TEST_P(CudaRope, EqualsPlainAtAnyPosition) {
  Random random(3);
  Gpu gpu(GetParam());
  for (int round = 0; round < 8; ++round) {
    const std::vector<std::int64_t> cu = random.lengths(3, 20);
    const std::int64_t dim = 2 * random.integer(1, 64);
    const std::int64_t positions[] = {0, random.integer(1, 1000), random.integer(1, 1000000)};
    Tensor q = random.normal_tensor({cu.back(), 3, dim});
    Tensor k = random.normal_tensor({cu.back(), 1, dim});
    Tensor device_q = gpu.upload(q, gpu.dtype());
    Tensor device_k = gpu.upload(k, gpu.dtype());
    ops::rope(gpu.ctx(), {device_q.view(), device_k.view(), Sequences(cu), positions, 5e5F});
    reference::rope({q.view(), k.view(), Sequences(cu), positions, 5e5F});
    expect_close(gpu.download(device_q), q, output_tolerance(GetParam()));
    expect_close(gpu.download(device_k), k, output_tolerance(GetParam()));
  }
}

TEST_P(CudaTokenShift, EqualsPlainAndKeepsTheLastRow) {
  Random random(4);
  Gpu gpu(GetParam());
  for (int round = 0; round < 8; ++round) {
    const std::vector<std::int64_t> cu = random.lengths(3, 60);
    const std::int64_t heads = random.integer(1, 4);
    const std::int64_t dim = random.integer(1, 70);
    Tensor x = random.normal_tensor({cu.back(), heads, dim});
    Tensor alpha(DType::kF32, {cu.back(), heads});
    for (std::int64_t i = 0; i < cu.back() * heads; ++i) alpha.f32()[i] = random.uniform(0, 1);
    std::vector<Tensor> states;
    std::vector<Tensor> device_states;
    for (int b = 0; b < 3; ++b) {
      states.push_back(random.normal_tensor({heads, dim}));
      device_states.push_back(gpu.upload(states.back()));
    }
    const Tensor device_x = gpu.upload(x, gpu.dtype());
    const Tensor device_alpha = gpu.upload(alpha);
    Tensor device_y(gpu.dtype(), x.view().shape, Device::kCuda);
    Tensor y(DType::kF32, x.view().shape);
    std::vector<float*> device_pointers;
    for (Tensor& state : device_states) {
      device_pointers.push_back(static_cast<float*>(state.view().data));
    }
    const std::vector<float*> pointers = test::pointers(states);
    ops::token_shift(gpu.ctx(), {.x = device_x.view(),
                                 .alpha = device_alpha.view(),
                                 .sequences = Sequences(cu),
                                 .states = device_pointers,
                                 .y = device_y.view()});
    reference::token_shift({.x = x.view(),
                            .alpha = alpha.view(),
                            .sequences = Sequences(cu),
                            .states = pointers,
                            .y = y.view()});
    expect_close(gpu.download(device_y), y, output_tolerance(GetParam()));
    for (std::size_t b = 0; b < 3; ++b) expect_equal(gpu.download(device_states[b]), states[b]);
  }
}

TEST_P(CudaSelectiveScan, EqualsPlainOnRaggedBatches) {
  Random random(5);
  Gpu gpu(GetParam());
  for (int round = 0; round < 8; ++round) {
    // The last half are long enough for chunks.
    const std::vector<std::int64_t> cu = random.lengths(3, round < 4 ? 80 : 700);
    const std::int64_t channels = random.integer(1, 150);
    const std::int64_t size = round % 2 == 0 ? 16 : random.integer(1, 64);
    Tensor x = random.normal_tensor({cu.back(), channels});
    Tensor b = random.normal_tensor({cu.back(), size});
    Tensor c = random.normal_tensor({cu.back(), size});
    Tensor gate = random.normal_tensor({cu.back(), channels});
    Tensor dt = random.normal_tensor({cu.back(), channels});
    Tensor dt_bias = random.normal_tensor({channels});
    Tensor a_log = random.normal_tensor({channels, size});
    Tensor d = random.normal_tensor({channels});
    std::vector<Tensor> states;
    std::vector<Tensor> device_states;
    std::vector<float*> device_pointers;
    for (int s = 0; s < 3; ++s) {
      states.push_back(random.normal_tensor({size, channels}));
      device_states.push_back(gpu.upload(states.back()));
      device_pointers.push_back(static_cast<float*>(device_states.back().view().data));
    }
    const Tensor on_device[] = {gpu.upload(x, gpu.dtype()),
                                gpu.upload(dt),
                                gpu.upload(dt_bias),
                                gpu.upload(a_log),
                                gpu.upload(b, gpu.dtype()),
                                gpu.upload(c, gpu.dtype()),
                                gpu.upload(d),
                                gpu.upload(gate, gpu.dtype())};
    Tensor device_y(gpu.dtype(), x.view().shape, Device::kCuda);
    Tensor y(DType::kF32, x.view().shape);
    const bool gated = round % 3 > 0;
    const std::vector<float*> pointers = test::pointers(states);
    ops::selective_scan(gpu.ctx(), {.x = on_device[0].view(),
                                    .dt = on_device[1].view(),
                                    .dt_bias = on_device[2].view(),
                                    .a_log = on_device[3].view(),
                                    .b = on_device[4].view(),
                                    .c = on_device[5].view(),
                                    .d = on_device[6].view(),
                                    .gate = gated ? on_device[7].view() : ConstTensorView(),
                                    .sequences = Sequences(cu),
                                    .states = device_pointers,
                                    .y = device_y.view()});
    reference::selective_scan({.x = x.view(),
                               .dt = dt.view(),
                               .dt_bias = dt_bias.view(),
                               .a_log = a_log.view(),
                               .b = b.view(),
                               .c = c.view(),
                               .d = d.view(),
                               .gate = gated ? gate.view() : ConstTensorView(),
                               .sequences = Sequences(cu),
                               .states = pointers,
                               .y = y.view()});
    expect_close(gpu.download(device_y), y, output_tolerance(GetParam()));
    for (std::size_t s = 0; s < 3; ++s) {
      expect_close(gpu.download(device_states[s]), states[s], kSums);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaAttention, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaRope, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaTokenShift, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaSelectiveScan, test::kDTypes, test::dtype_name);

TEST(CudaCrossEntropy, EqualsPlain) {
  Random random(6);
  Gpu gpu(DType::kF32);
  for (const std::int64_t vocab : {1, 7, 300, 5000}) {
    const std::int64_t tokens = random.integer(1, 20);
    Tensor logits = random.normal_tensor({tokens, vocab}, 5);
    std::vector<std::int32_t> labels;
    for (std::int64_t t = 0; t < tokens; ++t) {
      labels.push_back(static_cast<std::int32_t>(random.integer(-1, vocab - 1)));
    }
    Tensor got(DType::kF32, {tokens});
    Tensor expected(DType::kF32, {tokens});
    const Tensor device_logits = gpu.upload(logits);
    const auto size = static_cast<std::size_t>(tokens);
    ops::cross_entropy(
        gpu.ctx(),
        {.logits = device_logits.view(), .labels = labels, .loss = std::span(got.f32(), size)});
    reference::cross_entropy(
        {.logits = logits.view(), .labels = labels, .loss = std::span(expected.f32(), size)});
    // A loss is a difference of numbers of the logits' size.
    for (std::int64_t t = 0; t < tokens; ++t) {
      EXPECT_NEAR(got.f32()[t], expected.f32()[t], 32 * kSums) << "row " << t;
    }
  }
}

}  // namespace
}  // namespace deltafox
