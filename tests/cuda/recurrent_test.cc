// The recurrent mixers on the GPU against their plain float32 versions on the CPU.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "cuda/gpu.h"
#include "ops/delta_rule.h"
#include "ops/gla.h"
#include "ops/rms_norm.h"
#include "ops/short_conv.h"
#include "ops/ssd.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::pointers;
using test::Random;

// Sums of a few hundred terms in another order are worth a few roundings.
const double kSums = 16 * test::epsilon(DType::kF32);

// Of ops that compute in float32 and round their outputs alone.
double output_tolerance(DType dtype) {
  return dtype == DType::kBF16 ? test::epsilon(dtype) + kSums : kSums;
}

// In chunks, BF16 rounds the state, what multiplies it, T, U and A once each on the way to an
// output, and the output itself; errors of independent signs: √6 epsilons of what they act on.
// Twice that leaves room for the growth in T.
double chunk_tolerance(DType dtype) {
  return dtype == DType::kBF16 ? 2 * std::sqrt(6.0) * test::epsilon(dtype) : kSums;
}

// There GLA rounds queries and keys once when they are decayed within a part of a chunk and queries
// again across parts; further what a chunk adds to the state, the state, scores and outputs: √7
// epsilons, and twice that as above.
double gla_chunk_tolerance() {
  return 2 * std::sqrt(7.0) * test::epsilon(DType::kBF16);
}

std::vector<Tensor> upload(Gpu& gpu, std::vector<Tensor>& host) {
  std::vector<Tensor> device;
  for (Tensor& tensor : host) device.push_back(gpu.upload(tensor));
  return device;
}

void expect_close(Gpu& gpu, const std::vector<Tensor>& got, const std::vector<Tensor>& expected,
                  double tolerance) {
  for (std::size_t b = 0; b < got.size(); ++b) {
    expect_close(gpu.download(got[b]), expected[b], tolerance);
  }
}

class CudaShortConv : public EachDType {};
class CudaDeltaRule : public EachDType {};
class CudaGla : public EachDType {};
class CudaSsd : public EachDType {};

TEST_P(CudaShortConv, EqualsPlainOnRaggedBatches) {
  Random random(1);
  Gpu gpu(GetParam());
  for (int round = 0; round < 12; ++round) {
    const bool usual = round % 2 == 0;
    const std::int64_t channels = usual ? 8 * random.integer(1, 100) : random.integer(1, 300);
    const std::int64_t width = usual ? 4 : random.integer(1, 6);
    const std::vector<std::int64_t> cu = random.lengths(3, 50);
    Tensor x = random.normal_tensor({cu.back(), channels});
    Tensor w = random.normal_tensor({channels, width});
    Tensor bias = random.normal_tensor({channels});
    std::vector<Tensor> states;
    for (int b = 0; b < 3; ++b) states.push_back(random.normal_tensor({channels, width}));
    std::vector<Tensor> device_states = upload(gpu, states);
    const Tensor device_x = gpu.upload(x, gpu.dtype());
    const Tensor device_w = gpu.upload(w);
    const Tensor device_bias = gpu.upload(bias);
    Tensor device_y(gpu.dtype(), x.view().shape, Device::kCuda);
    Tensor expected(DType::kF32, x.view().shape);
    const auto args = [&](const Tensor& input, const Tensor& weight, const Tensor& offset,
                          std::span<float* const> state, Tensor& y) {
      return ShortConvArgs{
          .x = input.view(),
          .w = weight.view(),
          .bias = round % 3 == 0 ? ConstTensorView() : offset.view(),
          .sequences = Sequences(cu),
          .states = state,
          .activation = round % 4 < 2 ? Activation::kSilu : Activation::kIdentity,
          .y = y.view(),
      };
    };
    ops::short_conv(gpu.ctx(),
                    args(device_x, device_w, device_bias, pointers(device_states), device_y));
    reference::short_conv(args(x, w, bias, pointers(states), expected));
    expect_close(gpu.download(device_y), expected, output_tolerance(gpu.dtype()));
    // The state is a copy of inputs.
    for (std::size_t b = 0; b < 3; ++b) {
      expect_equal(gpu.download(device_states[b]), states[b]);
    }
  }
}

struct DeltaCase {
  DeltaCase(Random& random, std::vector<std::int64_t> cu_seqlens, std::int64_t heads,
            std::int64_t key_dim, std::int64_t value_dim)
      : cu(std::move(cu_seqlens)),
        q(random.normal_tensor({cu.back(), heads, key_dim})),
        k(random.normal_tensor({cu.back(), heads, key_dim})),
        v(random.normal_tensor({cu.back(), heads, value_dim})),
        beta({DType::kF32, {cu.back(), heads}}),
        norm(random.normal_tensor({value_dim})) {
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
      states.push_back(random.normal_tensor({heads, key_dim, value_dim}, 0.3F));
    }
  }

  // On the GPU; inputs are rounded here to what the GPU reads. States are updated there only.
  struct Result {
    Tensor o;
    std::vector<Tensor> states;
  };
  Result run(Gpu& gpu, bool normed = false) {
    Result result{.o = Tensor(gpu.dtype(), v.view().shape, Device::kCuda),
                  .states = upload(gpu, states)};
    const Tensor device_q = gpu.upload(q, gpu.dtype());
    const Tensor device_k = gpu.upload(k, gpu.dtype());
    const Tensor device_v = gpu.upload(v, gpu.dtype());
    const Tensor device_beta = gpu.upload(beta);
    const Tensor device_norm = gpu.upload(norm);
    const std::vector<float*> state = pointers(result.states);
    ops::delta_rule(gpu.ctx(), {.q = device_q.view(),
                                .k = device_k.view(),
                                .v = device_v.view(),
                                .beta = device_beta.view(),
                                .sequences = Sequences(cu),
                                .states = state,
                                .o = result.o.view(),
                                .norm = normed ? device_norm.view() : ConstTensorView{},
                                .norm_eps = kNormEps});
    gpu.ctx().synchronize();
    return result;
  }
  Tensor run_plain(bool normed = false) {
    Tensor o(DType::kF32, v.view().shape);
    const std::vector<float*> state = pointers(states);
    reference::delta_rule({.q = std::as_const(q).view(),
                           .k = std::as_const(k).view(),
                           .v = std::as_const(v).view(),
                           .beta = std::as_const(beta).view(),
                           .sequences = Sequences(cu),
                           .states = state,
                           .o = o.view()});
    if (normed) {
      const Shape& shape = o.view().shape;
      const TensorView rows = o.view().reshaped({shape[0] * shape[1], shape[2]});
      reference::rms_norm({.x = rows, .w = std::as_const(norm).view(), .y = rows, .eps = kNormEps});
    }
    return o;
  }

  static constexpr float kNormEps = 1e-6F;
  std::vector<std::int64_t> cu;
  Tensor q, k, v, beta, norm;
  std::vector<Tensor> states;
};

TEST_P(CudaDeltaRule, EqualsPlainOnRaggedBatches) {
  Random random(2);
  Gpu gpu(GetParam());
  const std::int64_t sizes[][2] = {{128, 128}, {64, 64}, {96, 200}, {32, 40}, {30, 33}, {256, 64}};
  for (const auto& size : sizes) {
    DeltaCase c(random, {0, 130, 131, 195, 260, 280, 480}, 2, size[0], size[1]);
    const DeltaCase::Result result = c.run(gpu);
    const Tensor expected = c.run_plain();
    expect_close(gpu.download(result.o), expected, chunk_tolerance(gpu.dtype()));
    expect_close(gpu, result.states, c.states, chunk_tolerance(gpu.dtype()));
  }
}

TEST_P(CudaDeltaRule, LongSequenceInSegmentsEqualsPlain) {
  Random random(3);
  Gpu gpu(GetParam());
  DeltaCase c(random, {0, 5500}, 1, 128, 128);
  const DeltaCase::Result result = c.run(gpu);
  const Tensor expected = c.run_plain();
  expect_close(gpu.download(result.o), expected, chunk_tolerance(gpu.dtype()));
  expect_close(gpu, result.states, c.states, chunk_tolerance(gpu.dtype()));
}

// Outputs are rounded once more where they are written before they are normed.
TEST_P(CudaDeltaRule, NormedOutputsEqualPlain) {
  Random random(6);
  Gpu gpu(GetParam());
  for (const auto& [heads, key_dim, value_dim] :
       {std::array<std::int64_t, 3>{2, 128, 128}, {1, 64, 96}, {1, 32, 200}}) {
    // The recurrence, a scan where heads have the size, and one walk.
    DeltaCase c(random, {0, 20, 21, 330, 400, 415}, heads, key_dim, value_dim);
    const DeltaCase::Result result = c.run(gpu, true);
    const double rounded = gpu.dtype() == DType::kBF16 ? test::epsilon(gpu.dtype()) : 0;
    expect_close(gpu.download(result.o), c.run_plain(true), chunk_tolerance(gpu.dtype()) + rounded);
    expect_close(gpu, result.states, c.states, chunk_tolerance(gpu.dtype()));
  }
}

TEST_P(CudaDeltaRule, ScanOfManyChunksEqualsPlain) {
  Random random(7);
  Gpu gpu(GetParam());
  struct Sizes {
    std::vector<std::int64_t> cu;
    std::int64_t heads;
  };
  // The last has more chunks than an H100 has blocks of a kernel at once.
  for (const Sizes& sizes :
       {Sizes{{0, 512}, 3}, {{0, 1000}, 3}, {{0, 2048}, 3}, {{0, 600, 1200}, 16}}) {
    DeltaCase c(random, sizes.cu, sizes.heads, 128, 128);
    const DeltaCase::Result result = c.run(gpu);
    expect_equal(gpu.download(c.run(gpu).o), gpu.download(result.o));
    const Tensor expected = c.run_plain();
    expect_close(gpu.download(result.o), expected, chunk_tolerance(gpu.dtype()));
    expect_close(gpu, result.states, c.states, chunk_tolerance(gpu.dtype()));
  }
}

// The third of four sequences, long enough for segments or for a scan, in a bucket of its own.
TEST_P(CudaDeltaRule, SequenceGetsTheSameBitsAloneAndInABatch) {
  Random random(4);
  Gpu gpu(GetParam());
  for (const auto& cu :
       {std::vector<std::int64_t>{0, 90, 91, 5700, 5900}, {0, 90, 91, 1500, 1700}}) {
    const std::int64_t length = cu[3] - cu[2];
    DeltaCase batch(random, cu, 2, 128, 128);
    const Tensor all = gpu.download(batch.run(gpu).o);
    DeltaCase alone(random, {0, length}, 2, 128, 128);
    const auto take = [&](Tensor& to, const Tensor& from) {
      const std::int64_t size = to.view().shape.size();
      std::copy_n(from.f32() + cu[2] * (size / length), size, to.f32());
    };
    take(alone.q, batch.q);
    take(alone.k, batch.k);
    take(alone.v, batch.v);
    take(alone.beta, batch.beta);
    alone.states[0] = batch.states[2];
    Tensor expected(DType::kF32, alone.v.view().shape);
    take(expected, all);
    for (int repeat = 0; repeat < 2; ++repeat) {
      expect_equal(gpu.download(alone.run(gpu).o), expected);
    }
  }
}

TEST_P(CudaGla, EqualsPlainOnRaggedBatches) {
  Random random(5);
  Gpu gpu(GetParam());
  const std::int64_t sizes[][2] = {{128, 128}, {64, 40}, {30, 33}, {256, 64}};
  for (const auto& size : sizes) {
    // The second sequence is long enough for chunks.
    const std::int64_t first = random.integer(1, 60);
    const std::int64_t second = first + random.integer(64, 200);
    const std::vector<std::int64_t> cu{0, first, second, second + random.integer(1, 60)};
    const Shape keys{cu.back(), 2, size[0]};
    const Shape values{cu.back(), 2, size[1]};
    Tensor q = random.normal_tensor(keys);
    Tensor k = random.normal_tensor(keys);
    Tensor g(DType::kF32, keys);
    // Some forget everything, some next to nothing.
    for (std::int64_t i = 0; i < keys.size(); ++i) {
      g.f32()[i] = random.integer(0, 19) == 0 ? 0 : 1 - std::pow(random.uniform(0, 0.9F), 3.0F);
    }
    Tensor v = random.normal_tensor(values);
    std::vector<Tensor> states;
    for (int b = 0; b < 3; ++b) states.push_back(random.normal_tensor({2, size[0], size[1]}));
    std::vector<Tensor> device_states = upload(gpu, states);
    const Tensor device_q = gpu.upload(q, gpu.dtype());
    const Tensor device_k = gpu.upload(k);
    const Tensor device_g = gpu.upload(g);
    const Tensor device_v = gpu.upload(v, gpu.dtype());
    Tensor device_o(gpu.dtype(), values, Device::kCuda);
    Tensor expected(DType::kF32, values);
    const auto args = [&](const Tensor& queries, const Tensor& key, const Tensor& gate,
                          const Tensor& value, std::span<float* const> state, Tensor& o) {
      return GlaArgs{.q = queries.view(),
                     .k = key.view(),
                     .g = gate.view(),
                     .v = value.view(),
                     .sequences = Sequences(cu),
                     .states = state,
                     .o = o.view()};
    };
    ops::gla(gpu.ctx(),
             args(device_q, device_k, device_g, device_v, pointers(device_states), device_o));
    reference::gla(args(q, k, g, v, pointers(states), expected));
    const bool on_tensor_cores = gpu.dtype() == DType::kBF16 && size[0] == 128;
    expect_close(gpu.download(device_o), expected,
                 on_tensor_cores ? gla_chunk_tolerance() : output_tolerance(gpu.dtype()));
    expect_close(gpu, device_states, states, on_tensor_cores ? gla_chunk_tolerance() : kSums);
  }
}

TEST_P(CudaSsd, EqualsPlainOnRaggedBatches) {
  Random random(6);
  Gpu gpu(GetParam());
  struct Sizes {
    std::int64_t heads, head_dim, groups, state;
  };
  for (const Sizes& s :
       {Sizes{4, 64, 1, 128}, Sizes{4, 64, 2, 64}, Sizes{6, 33, 3, 20}, Sizes{2, 64, 1, 128}}) {
    std::vector<std::int64_t> cu = random.lengths(3, 200);
    // Long enough for segments, which two heads do not fill a card without.
    if (s.heads == 2) cu[2] += 1700, cu[3] += 1700;
    const Shape rows{cu.back(), s.heads * s.head_dim + 2 * s.groups * s.state};
    const Shape outputs{cu.back(), s.heads, s.head_dim};
    Tensor xbc = random.normal_tensor(rows);
    Tensor dt = random.normal_tensor({cu.back(), s.heads});
    Tensor dt_bias = random.normal_tensor({s.heads});
    Tensor a_log = random.normal_tensor({s.heads});
    Tensor d = random.normal_tensor({s.heads});
    std::vector<Tensor> states;
    for (int b = 0; b < 3; ++b) {
      states.push_back(random.normal_tensor({s.heads, s.state, s.head_dim}));
    }
    std::vector<Tensor> device_states = upload(gpu, states);
    const Tensor device_xbc = gpu.upload(xbc, gpu.dtype());
    const Tensor device_dt = gpu.upload(dt);
    const Tensor device_dt_bias = gpu.upload(dt_bias);
    const Tensor device_a_log = gpu.upload(a_log);
    const Tensor device_d = gpu.upload(d);
    Tensor device_y(gpu.dtype(), outputs, Device::kCuda);
    Tensor expected(DType::kF32, outputs);
    SsdArgs args{.xbc = std::as_const(xbc).view(),
                 .dt = std::as_const(dt).view(),
                 .dt_bias = std::as_const(dt_bias).view(),
                 .a_log = std::as_const(a_log).view(),
                 .d = std::as_const(d).view(),
                 .dt_min = 0.001F,
                 .dt_max = 4,
                 .num_groups = s.groups,
                 .sequences = Sequences(cu),
                 .states = {},
                 .y = expected.view()};
    const std::vector<float*> plain = pointers(states);
    args.states = plain;
    reference::ssd(args);
    const std::vector<float*> device = pointers(device_states);
    args.xbc = device_xbc.view();
    args.dt = device_dt.view();
    args.dt_bias = device_dt_bias.view();
    args.a_log = device_a_log.view();
    args.d = device_d.view();
    args.states = device;
    args.y = device_y.view();
    ops::ssd(gpu.ctx(), args);
    // The decays go through a few exponentials.
    expect_close(gpu.download(device_y), expected, chunk_tolerance(gpu.dtype()) + kSums);
    expect_close(gpu, device_states, states, chunk_tolerance(gpu.dtype()) + kSums);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaShortConv, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaDeltaRule, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaGla, test::kDTypes, test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaSsd, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
