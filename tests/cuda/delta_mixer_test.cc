// The fused passes of the DeltaNet mixer on the GPU against the plain ops that they stand for.
#include "ops/delta_mixer.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "cuda/gpu.h"
#include "ops/activation.h"
#include "ops/delta_rule.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/short_conv.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::pointers;
using test::Random;

// Sums of a few hundred terms in another order are worth a few roundings; exponentials to 20 bits
// a few more where the result is rounded to bfloat16 anyway.
double tolerance(DType dtype) {
  return dtype == DType::kBF16 ? test::epsilon(dtype) + 0x1p-17 : 16 * test::epsilon(dtype);
}

constexpr std::int64_t kWidth = 328;  // not a whole number of any thread's columns

// q, k, v of a mixer with their convolutions, on one side.
struct Side {
  Tensor projected;                           // [T, 3·H·K]
  std::array<Tensor, 3> conv;                 // [H·K, 4]
  std::array<std::vector<Tensor>, 3> states;  // of the convolutions
  std::vector<Tensor> recurrent;              // [H, K, K]
  Tensor x;                                   // [T, kWidth]
  Tensor b_proj;                              // [H, kWidth]
  Tensor beta;                                // [T, H]
  Tensor norm;                                // [K]
  std::array<std::vector<float*>, 3> pointers_to_states;

  DeltaConvolutions convolutions() {
    for (std::size_t i = 0; i < 3; ++i) pointers_to_states[i] = pointers(states[i]);
    const Side& self = *this;
    return {.q = self.conv[0].view(),
            .k = self.conv[1].view(),
            .v = self.conv[2].view(),
            .q_states = pointers_to_states[0],
            .k_states = pointers_to_states[1],
            .v_states = pointers_to_states[2]};
  }
};

Side random_side(Random& random, std::int64_t tokens, std::int64_t sequences, std::int64_t heads,
                 std::int64_t keys) {
  const std::int64_t channels = heads * keys;
  Side side;
  side.projected = random.normal_tensor({tokens, 3 * channels});
  for (std::size_t i = 0; i < 3; ++i) {
    side.conv[i] = random.normal_tensor({channels, 4}, 0.5F);
    for (std::int64_t b = 0; b < sequences; ++b) {
      side.states[i].push_back(random.normal_tensor({channels, 4}));
    }
  }
  for (std::int64_t b = 0; b < sequences; ++b) {
    side.recurrent.push_back(random.normal_tensor({heads, keys, keys}));
  }
  side.x = random.normal_tensor({tokens, kWidth});
  side.b_proj = random.normal_tensor({heads, kWidth}, 0.05F);
  side.beta = random.normal_tensor({tokens, heads});
  side.norm = random.normal_tensor({keys});
  return side;
}

std::vector<Tensor> upload(Gpu& gpu, std::vector<Tensor>& host) {
  std::vector<Tensor> device;
  for (Tensor& tensor : host) device.push_back(gpu.upload(tensor));
  return device;
}

Side upload(Gpu& gpu, Side& host) {
  Side device;
  device.projected = gpu.upload(host.projected, gpu.dtype());
  for (std::size_t i = 0; i < 3; ++i) {
    device.conv[i] = gpu.upload(host.conv[i]);
    device.states[i] = upload(gpu, host.states[i]);
  }
  device.recurrent = upload(gpu, host.recurrent);
  device.x = gpu.upload(host.x, gpu.dtype());
  device.b_proj = gpu.upload(host.b_proj, gpu.dtype());
  device.beta = gpu.upload(host.beta);
  device.norm = gpu.upload(host.norm);
  return device;
}

struct Inputs {
  Tensor q, k, v;  // [T, H, K]
};

// By the plain ops; beta in place.
Inputs plain_inputs(Side& side, const std::vector<std::int64_t>& cu, std::int64_t heads,
                    std::int64_t keys) {
  const std::int64_t tokens = cu.back();
  const std::int64_t channels = heads * keys;
  Inputs inputs;
  std::size_t part = 0;
  for (Tensor* out : {&inputs.q, &inputs.k, &inputs.v}) {
    Tensor x(DType::kF32, {tokens, channels});
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::copy_n(side.projected.f32() + (3 * t + static_cast<std::int64_t>(part)) * channels,
                  channels, x.f32() + t * channels);
    }
    *out = Tensor(DType::kF32, {tokens, channels});
    reference::short_conv({.x = x.view(),
                           .w = side.conv[part].view(),
                           .sequences = Sequences(cu),
                           .states = pointers(side.states[part]),
                           .activation = Activation::kSilu,
                           .y = out->view()});
    if (part < 2) {
      reference::feature_map(
          {.norm = FeatureNorm::kL2, .x = out->view().reshaped({tokens, heads, keys})});
    }
    ++part;
  }
  reference::activation({.activation = Activation::kSigmoid, .x = side.beta.view()});
  return inputs;
}

// Beta from its logits, or with `from_x` from x.
Inputs gpu_inputs(Gpu& gpu, Side& side, const std::vector<std::int64_t>& cu, std::int64_t heads,
                  std::int64_t keys, bool from_x = false) {
  const Shape shape{cu.back(), heads, keys};
  Inputs inputs{Tensor(gpu.dtype(), shape, Device::kCuda),
                Tensor(gpu.dtype(), shape, Device::kCuda),
                Tensor(gpu.dtype(), shape, Device::kCuda)};
  ops::delta_inputs(gpu.ctx(), {.projected = side.projected.view(),
                                .convolutions = side.convolutions(),
                                .sequences = Sequences(cu),
                                .x = from_x ? side.x.view() : TensorView{},
                                .b_proj = side.b_proj.view(),
                                .beta = side.beta.view(),
                                .q = inputs.q.view(),
                                .k = inputs.k.view(),
                                .v = inputs.v.view()});
  return inputs;
}

class CudaDeltaMixer : public EachDType {};

// The convolutions as the CPU has them, one by one.
TEST_P(CudaDeltaMixer, InputsBackwardEqualsItsParts) {
  Random random(21);
  Gpu gpu(GetParam());
  for (const std::int64_t keys : {8, 64, 128, 256}) {
    SCOPED_TRACE(testing::Message() << "heads of " << keys);
    const std::int64_t heads = 3;
    const std::int64_t channels = heads * keys;
    const std::int64_t columns = 3 * channels + 8;
    const std::vector<std::int64_t> cu = random.lengths(3, 150);
    const std::int64_t tokens = cu.back();
    const Shape values{tokens, heads, keys};
    Side side = random_side(random, tokens, 0, heads, keys);
    const Side device = upload(gpu, side);
    std::array<Tensor, 3> dy;
    std::array<Tensor, 3> gpu_dy;
    std::array<Tensor, 3> dw;
    std::array<Tensor, 3> gpu_dw;
    for (std::size_t i = 0; i < 3; ++i) {
      dy[i] = random.normal_tensor(values);
      gpu_dy[i] = gpu.upload(dy[i], gpu.dtype());
      dw[i] = random.normal_tensor({channels, 4});
      gpu_dw[i] = gpu.upload(dw[i]);
    }
    Tensor dbeta = random.normal_tensor({tokens, heads});
    const Tensor gpu_dbeta = gpu.upload(dbeta);
    Tensor gpu_d(gpu.dtype(), {tokens, columns}, Device::kCuda);
    ops::delta_inputs_backward(gpu.ctx(), {.projected = device.projected.view(),
                                           .beta_logits = device.beta.view(),
                                           .q = device.conv[0].view(),
                                           .k = device.conv[1].view(),
                                           .v = device.conv[2].view(),
                                           .sequences = Sequences(cu),
                                           .dq = gpu_dy[0].view(),
                                           .dk = gpu_dy[1].view(),
                                           .dv = gpu_dy[2].view(),
                                           .dbeta = gpu_dbeta.view(),
                                           .d_projected = gpu_d.view(),
                                           .dq_conv = gpu_dw[0].view(),
                                           .dk_conv = gpu_dw[1].view(),
                                           .dv_conv = gpu_dw[2].view()});
    const Tensor got = gpu.download(gpu_d);
    const auto columns_of = [&](const Tensor& all, std::int64_t first, std::int64_t count) {
      const std::int64_t stride = all.view().shape[1];
      Tensor part(DType::kF32, {tokens, count});
      for (std::int64_t i = 0; i < tokens * count; ++i) {
        part.f32()[i] = all.f32()[i / count * stride + first + i % count];
      }
      return part;
    };
    for (std::size_t i = 0; i < 3; ++i) {
      const std::int64_t first = static_cast<std::int64_t>(i) * channels;
      const Tensor x = columns_of(side.projected, first, channels);
      Tensor dx(DType::kF32, {tokens, channels});
      ops::short_conv_backward(gpu.cpu(), {.x = x.view(),
                                           .w = side.conv[i].view(),
                                           .sequences = Sequences(cu),
                                           .activation = Activation::kSilu,
                                           .norm_width = i < 2 ? keys : 0,
                                           .dy = dy[i].view().reshaped({tokens, channels}),
                                           .dx = dx.view(),
                                           .dw = dw[i].view()});
      // Sums of some hundred terms, with cancellation behind a norm.
      const double sums = 128 * test::epsilon(DType::kF32);
      expect_close(columns_of(got, first, channels), dx, tolerance(gpu.dtype()) + sums);
      expect_close(gpu.download(gpu_dw[i]), dw[i], sums);
    }
    for (std::int64_t i = 0; i < dbeta.view().shape.size(); ++i) {
      const float beta = 1 / (1 + std::exp(-side.beta.f32()[i]));
      dbeta.f32()[i] *= beta * (1 - beta);
    }
    expect_close(columns_of(got, 3 * channels, heads), dbeta, tolerance(gpu.dtype()));
    const Tensor rest = columns_of(got, 3 * channels + heads, 8 - heads);
    expect_equal(rest, Tensor(DType::kF32, rest.view().shape));
  }
}

TEST_P(CudaDeltaMixer, InputsEqualPlainOnRaggedBatches) {
  Random random(1);
  Gpu gpu(GetParam());
  for (const auto& [heads, keys, count, longest] : {std::array<std::int64_t, 4>{12, 128, 3, 60},
                                                    {3, 64, 2, 9},
                                                    {5, 8, 70, 3},
                                                    {1, 256, 1, 99},
                                                    {16, 256, 3, 900},
                                                    {7, 32, 4, 900}}) {
    SCOPED_TRACE(testing::Message() << heads << " heads of " << keys);
    const std::vector<std::int64_t> cu = random.lengths(count, longest);
    Side host = random_side(random, cu.back(), count, heads, keys);
    Side device = upload(gpu, host);
    const Inputs got = gpu_inputs(gpu, device, cu, heads, keys);
    const Inputs expected = plain_inputs(host, cu, heads, keys);
    expect_close(gpu.download(got.q), expected.q, tolerance(gpu.dtype()));
    expect_close(gpu.download(got.k), expected.k, tolerance(gpu.dtype()));
    expect_close(gpu.download(got.v), expected.v, tolerance(gpu.dtype()));
    expect_close(gpu.download(device.beta), host.beta, tolerance(DType::kF32));
    for (std::size_t i = 0; i < 3; ++i) {
      for (std::size_t b = 0; b < host.states[i].size(); ++b) {
        expect_equal(gpu.download(device.states[i][b]), host.states[i][b]);
      }
    }
  }
}

TEST(CudaDeltaMixerBeta, BetaFromXEqualsPlain) {
  Random random(4);
  Gpu gpu(DType::kBF16);
  for (const auto& [heads, longest] :
       {std::pair<std::int64_t, std::int64_t>{12, 60}, {16, 5}, {3, 900}}) {
    SCOPED_TRACE(testing::Message() << heads << " heads");
    const std::vector<std::int64_t> cu = random.lengths(4, longest);
    Side host = random_side(random, cu.back(), 4, heads, 8);
    Side device = upload(gpu, host);
    gpu_inputs(gpu, device, cu, heads, 8, true);
    reference::linear({.x = host.x.view(), .w = host.b_proj.view(), .y = host.beta.view()});
    reference::activation({.activation = Activation::kSigmoid, .x = host.beta.view()});
    // Tensor cores cut sums off where others round.
    expect_close(gpu.download(device.beta), host.beta, 0x1p-17);
  }
}

// Rows are dealt out to blocks by the number of tokens, and sequences to launches by their number.
TEST_P(CudaDeltaMixer, InputsDependOnTheirSequenceAlone) {
  Random random(2);
  Gpu gpu(GetParam());
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kKeys = 128;
  const std::vector<std::int64_t> cu{0, 2400, 2437, 2438};
  Side host = random_side(random, cu.back(), 3, kHeads, kKeys);
  Side device = upload(gpu, host);
  const bool from_x = gpu.dtype() == DType::kBF16;
  const Inputs all = gpu_inputs(gpu, device, cu, kHeads, kKeys, from_x);
  Side alone;
  const auto row = static_cast<std::ptrdiff_t>(cu[1]);
  alone.projected = Tensor(DType::kF32, {37, 3 * kHeads * kKeys});
  std::copy_n(host.projected.f32() + row * 3 * kHeads * kKeys, 37 * 3 * kHeads * kKeys,
              alone.projected.f32());
  for (std::size_t i = 0; i < 3; ++i) {
    alone.conv[i] = host.conv[i];
    alone.states[i].push_back(host.states[i][1]);
  }
  alone.recurrent.push_back(host.recurrent[1]);
  alone.beta = Tensor(DType::kF32, {37, kHeads});
  alone.x = Tensor(DType::kF32, {37, kWidth});
  std::copy_n(host.x.f32() + row * kWidth, 37 * kWidth, alone.x.f32());
  alone.b_proj = host.b_proj;
  alone.norm = host.norm;
  Side device_alone = upload(gpu, alone);
  const Inputs one = gpu_inputs(gpu, device_alone, {0, 37}, kHeads, kKeys, from_x);
  const auto expect_part = [&](const Tensor& part, const Tensor& whole) {
    const Tensor got = gpu.download(part);
    const Tensor of = gpu.download(whole);
    for (std::int64_t i = 0; i < 37 * kHeads * kKeys; ++i) {
      ASSERT_EQ(got.f32()[i], of.f32()[row * kHeads * kKeys + i]) << i;
    }
  };
  expect_part(one.q, all.q);
  expect_part(one.k, all.k);
  expect_part(one.v, all.v);
  if (!from_x) return;
  const Tensor beta = gpu.download(device.beta);
  const Tensor beta_alone = gpu.download(device_alone.beta);
  for (std::int64_t i = 0; i < 37 * kHeads; ++i) {
    ASSERT_EQ(beta_alone.f32()[i], beta.f32()[row * kHeads + i]) << i;
  }
}

// Of a few chunks its first kernel does both; of sequences that are short or long, it does not.
TEST(CudaDeltaMixerWithin, RuleOfInputsEqualsBothToTheBit) {
  Gpu gpu(DType::kBF16);
  constexpr std::int64_t kKeys = 128;
  const auto run = [&](Side side, const std::vector<std::int64_t>& cu, std::int64_t heads,
                       bool within) {
    const Shape shape{cu.back(), heads, kKeys};
    Tensor q(gpu.dtype(), shape, Device::kCuda);
    Tensor k(gpu.dtype(), shape, Device::kCuda);
    Tensor v(gpu.dtype(), shape, Device::kCuda);
    Tensor o(gpu.dtype(), shape, Device::kCuda);
    Side device = upload(gpu, side);
    const std::vector<float*> states = pointers(device.recurrent);
    const DeltaInputsArgs inputs{.projected = device.projected.view(),
                                 .convolutions = device.convolutions(),
                                 .sequences = Sequences(cu),
                                 .x = device.x.view(),
                                 .b_proj = device.b_proj.view(),
                                 .beta = device.beta.view(),
                                 .q = q.view(),
                                 .k = k.view(),
                                 .v = v.view()};
    if (!within) ops::delta_inputs(gpu.ctx(), inputs);
    ops::delta_rule(gpu.ctx(), {.q = q.view(),
                                .k = k.view(),
                                .v = v.view(),
                                .beta = inputs.beta,
                                .sequences = Sequences(cu),
                                .states = states,
                                .o = o.view(),
                                .norm = device.norm.view(),
                                .norm_eps = 1e-6F,
                                .inputs = within ? &inputs : nullptr});
    std::vector<Tensor> results;
    results.push_back(gpu.download(o));
    for (const Tensor& state : device.recurrent) results.push_back(gpu.download(state));
    for (const auto& part : device.states) {
      for (const Tensor& state : part) results.push_back(gpu.download(state));
    }
    return results;
  };
  for (const auto& [heads, cu] : {std::pair<std::int64_t, std::vector<std::int64_t>>{12, {0, 512}},
                                  {2, {0, 130, 323, 515}},  // chunks of 2, 1 and 64 rows at last
                                  {3, {0, 1, 300}},
                                  {3, {0, 2048}}}) {
    SCOPED_TRACE(testing::Message() << cu.back() << " tokens");
    const auto count = std::ssize(cu) - 1;
    const auto side = [&] {
      Random same(7);
      return random_side(same, cu.back(), count, heads, kKeys);
    };
    const std::vector<Tensor> expected = run(side(), cu, heads, false);
    for (int repeat = 0; repeat < 2; ++repeat) {
      const std::vector<Tensor> got = run(side(), cu, heads, true);
      ASSERT_EQ(got.size(), expected.size());
      for (std::size_t i = 0; i < got.size(); ++i) expect_equal(got[i], expected[i]);
    }
  }
}

TEST_P(CudaDeltaMixer, ATokenEqualsPlain) {
  Random random(3);
  Gpu gpu(GetParam());
  for (const auto& [batch, heads] : {std::pair{1, 3}, {5, 12}, {33, 2}}) {
    SCOPED_TRACE(testing::Message() << batch << " sequences, " << heads << " heads");
    std::vector<std::int64_t> cu;
    for (int b = 0; b <= batch; ++b) cu.push_back(b);
    Side host = random_side(random, batch, batch, heads, kDeltaTokenHead);
    Side device = upload(gpu, host);
    Tensor got(gpu.dtype(), {batch, heads * kDeltaTokenHead}, Device::kCuda);
    const std::vector<float*> states = pointers(device.recurrent);
    ops::delta_token(gpu.ctx(), {.x = device.x.view(),
                                 .b_proj = device.b_proj.view(),
                                 .projected = device.projected.view(),
                                 .convolutions = device.convolutions(),
                                 .states = states,
                                 .norm = device.norm.view(),
                                 .norm_eps = 1e-6F,
                                 .o = got.view()});
    reference::linear({.x = host.x.view(), .w = host.b_proj.view(), .y = host.beta.view()});
    Inputs inputs = plain_inputs(host, cu, heads, kDeltaTokenHead);
    const Shape of_heads{batch, heads, kDeltaTokenHead};
    Tensor o(DType::kF32, of_heads);
    reference::delta_rule({.q = inputs.q.view().reshaped(of_heads),
                           .k = inputs.k.view().reshaped(of_heads),
                           .v = inputs.v.view().reshaped(of_heads),
                           .beta = host.beta.view(),
                           .sequences = Sequences(cu),
                           .states = pointers(host.recurrent),
                           .o = o.view()});
    const Shape rows{batch * heads, kDeltaTokenHead};
    reference::rms_norm({.x = o.view().reshaped(rows),
                         .w = host.norm.view(),
                         .y = o.view().reshaped(rows),
                         .eps = 1e-6F});
    expect_close(gpu.download(got), o, tolerance(gpu.dtype()));
    // The state stays float32.
    const double exact = gpu.dtype() == DType::kBF16 ? 0x1p-17 : tolerance(DType::kF32);
    for (std::size_t b = 0; b < host.recurrent.size(); ++b) {
      expect_close(gpu.download(device.recurrent[b]), host.recurrent[b], exact);
      for (std::size_t i = 0; i < 3; ++i) {
        expect_equal(gpu.download(device.states[i][b]), host.states[i][b]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaDeltaMixer, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
