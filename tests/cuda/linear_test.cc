// Products and fused decoding steps on the GPU against plain float32 on the CPU.
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "cuda/gpu.h"
#include "ops/delta_rule.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/short_conv.h"
#include "ops/step.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

// A sum of K products of random signs, with K/32 additions in a row at least, in float32, relative
// to its own size: √K roundings at the most likely; and one of the output.
double tolerance(DType output, std::int64_t k) {
  return (output == DType::kBF16 ? test::epsilon(output) : 0) +
         2 * std::sqrt(static_cast<double>(k)) * test::epsilon(DType::kF32);
}

// The same for weights of some form: those of packed ones are rounded to bfloat16 for more than a
// few rows.
double tolerance(DType output, std::int64_t k, DType weights, std::int64_t rows) {
  return tolerance(output, k) +
         (is_packed(weights) && rows > kStepLinearRows ? test::epsilon(DType::kBF16) : 0);
}

Tensor device(DType dtype, const Shape& shape) {
  return {dtype, shape, Device::kCuda};
}

class CudaLinear : public EachDType {};

// The parameter is the form of the weights.
class CudaProduct : public EachDType {
 protected:
  DType form() const { return GetParam(); }
  DType activations() const { return form() == DType::kF32 ? DType::kF32 : DType::kBF16; }
};

TEST_P(CudaProduct, EqualsPlainOnAllShapes) {
  Random random(1);
  Gpu gpu(activations());
  const std::int64_t widths[] = {256, 768, 8, 64, 33, 1, 1536, 448};
  for (int round = 0; round < 48; ++round) {
    const std::int64_t tokens = round % 2 == 0 ? random.integer(1, 16) : random.integer(17, 200);
    const std::int64_t outputs = random.integer(1, 150);
    const std::int64_t k = widths[round % 8];
    Tensor x = random.normal_tensor({tokens, k});
    Tensor w = random.normal_tensor({outputs, k});
    Tensor bias = random.normal_tensor({outputs});
    Tensor y = random.normal_tensor({tokens, outputs});
    const bool accumulate = round / 2 % 3 == 0;
    const DType y_dtype = round % 5 < 2 ? DType::kF32 : gpu.dtype();
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, form());
    const Tensor gpu_bias = gpu.upload(bias);
    Tensor gpu_y = gpu.upload(y, y_dtype);
    const bool biased = y_dtype == DType::kF32;  // else the output is rounded twice
    reference::linear({.x = x.view(),
                       .w = w.view(),
                       .y = y.view(),
                       .accumulate = accumulate,
                       .bias = biased ? bias.view() : TensorView{}});
    ops::linear(gpu.ctx(), {.x = gpu_x.view(),
                            .w = gpu_w.view(),
                            .y = gpu_y.view(),
                            .accumulate = accumulate,
                            .bias = biased ? gpu_bias.view() : ConstTensorView{}});
    SCOPED_TRACE(testing::Message() << tokens << " x " << outputs << " x " << k);
    expect_close(gpu.download(gpu_y), y, tolerance(y_dtype, k, form(), tokens));
  }
}

// Shapes that no tile divides, stored, added and under a gate.
TEST_P(CudaProduct, ManyRowsEqualPlain) {
  Random random(10);
  Gpu gpu(activations());
  struct Case {
    std::int64_t tokens, outputs, k;
  };
  for (const Case& c : {Case{1100, 392, 768}, {1281, 1536, 64}, {1025, 8, 104}, {300, 136, 1536}}) {
    SCOPED_TRACE(testing::Message() << c.tokens << " x " << c.outputs << " x " << c.k);
    Tensor x = random.normal_tensor({c.tokens, c.k});
    Tensor w = random.normal_tensor({2 * c.outputs, c.k}, 1 / std::sqrt(static_cast<float>(c.k)));
    Tensor sums = random.normal_tensor({c.tokens, 2 * c.outputs});
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, form());
    Tensor gpu_sums = gpu.upload(sums);
    Tensor gpu_y = device(gpu.dtype(), {c.tokens, 2 * c.outputs});
    Tensor gpu_gated = device(gpu.dtype(), {c.tokens, c.outputs});
    ops::linear(gpu.ctx(), {.x = gpu_x.view(), .w = gpu_w.view(), .y = gpu_y.view()});
    ops::linear(gpu.ctx(),
                {.x = gpu_x.view(), .w = gpu_w.view(), .y = gpu_sums.view(), .accumulate = true});
    ops::linear_glu(gpu.ctx(), {.x = gpu_x.view(), .w = gpu_w.view(), .y = gpu_gated.view()});
    Tensor y(DType::kF32, {c.tokens, 2 * c.outputs});
    reference::linear({.x = x.view(), .w = w.view(), .y = y.view()});
    Tensor gated(DType::kF32, {c.tokens, c.outputs});
    reference::glu({.gate_up = y.view(), .y = gated.view()});
    for (std::int64_t i = 0; i < sums.view().shape.size(); ++i) sums.f32()[i] += y.f32()[i];
    expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype(), c.k, form(), c.tokens));
    expect_close(gpu.download(gpu_sums), sums, tolerance(DType::kF32, c.k, form(), c.tokens));
    // Exponentials to 20 bits; gate and up lie in memory, rounded, where no kernel gates at once.
    expect_close(gpu.download(gpu_gated), gated,
                 2 * tolerance(gpu.dtype(), c.k, form(), c.tokens) + 0x1p-17);

    // With gate and up kept, with them alone.
    Tensor kept = device(gpu.dtype(), {c.tokens, 2 * c.outputs});
    Tensor alone = device(gpu.dtype(), {c.tokens, 2 * c.outputs});
    Tensor again = device(gpu.dtype(), {c.tokens, c.outputs});
    ops::linear_glu(
        gpu.ctx(),
        {.x = gpu_x.view(), .w = gpu_w.view(), .gate_up = kept.view(), .y = again.view()});
    ops::linear_glu(gpu.ctx(), {.x = gpu_x.view(), .w = gpu_w.view(), .gate_up = alone.view()});
    expect_close(gpu.download(kept), y, tolerance(gpu.dtype(), c.k, form(), c.tokens));
    test::expect_near(gpu.download(alone), gpu.download(kept), 0);
    test::expect_near(gpu.download(again), gpu.download(gpu_gated), 0);
  }
}

// More than a card has thread blocks for at a time.
TEST_P(CudaProduct, ManyOutputsEqualPlain) {
  Random random(12);
  Gpu gpu(activations());
  constexpr std::int64_t kOutputs = 17030;
  constexpr std::int64_t kInputs = 520;
  for (const std::int64_t tokens : {3, 70}) {
    SCOPED_TRACE(tokens);
    Tensor x = random.normal_tensor({tokens, kInputs});
    Tensor w = random.normal_tensor({kOutputs, kInputs});
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, form());
    Tensor gpu_y = device(DType::kF32, {tokens, kOutputs});
    ops::linear(gpu.ctx(), {.x = gpu_x.view(), .w = gpu_w.view(), .y = gpu_y.view()});
    Tensor y(DType::kF32, {tokens, kOutputs});
    reference::linear({.x = x.view(), .w = w.view(), .y = y.view()});
    expect_close(gpu.download(gpu_y), y, tolerance(DType::kF32, kInputs, form(), tokens));
  }
}

TEST_P(CudaProduct, ARowOfManyDoesNotDependOnTheOthers) {
  Random random(11);
  Gpu gpu(activations());
  constexpr std::int64_t kOutputs = 256;
  constexpr std::int64_t kInputs = 320;
  Tensor x = random.normal_tensor({2000, kInputs});
  Tensor w = random.normal_tensor({2 * kOutputs, kInputs});
  const Tensor gpu_x = gpu.upload(x, gpu.dtype());
  const Tensor gpu_w = gpu.upload(w, form());
  const auto gated = [&](std::int64_t rows) {
    Tensor y = device(gpu.dtype(), {rows, kOutputs});
    ops::linear_glu(
        gpu.ctx(),
        {.x = {gpu_x.view().data, gpu.dtype(), {rows, kInputs}}, .w = gpu_w.view(), .y = y.view()});
    return gpu.download(y);
  };
  const Tensor all = gated(2000);
  const Tensor some = gated(1029);
  for (std::int64_t i = 0; i < 1029 * kOutputs; ++i) ASSERT_EQ(some.f32()[i], all.f32()[i]) << i;
}

// Blocks that share a tile, in four parts of K and in two, and those that have whole ones; y and K
// end within a tile.
TEST_P(CudaLinear, SumsOfManyRowsEqualPlainAndDoNotDependOnTheOthers) {
  Random random(12);
  Gpu gpu(GetParam());
  struct Case {
    std::int64_t tokens, fewer, outputs, k;
  };
  for (const Case& c : {Case{500, 257, 396, 520},
                        {512, 300, 96, 264},
                        {901, 513, 1160, 328},
                        {2100, 2050, 1400, 264},
                        {4100, 4097, 40, 200}}) {
    SCOPED_TRACE(testing::Message() << c.tokens << " x " << c.outputs << " x " << c.k);
    Tensor x = random.normal_tensor({c.tokens, c.k});
    Tensor w = random.normal_tensor({c.outputs, c.k}, 1 / std::sqrt(static_cast<float>(c.k)));
    Tensor sums = random.normal_tensor({c.tokens, c.outputs});
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, gpu.dtype());
    const auto added = [&](std::int64_t rows) {
      Tensor y = gpu.upload(sums);
      const Shape shape{rows, c.outputs};
      ops::linear(gpu.ctx(), {.x = {gpu_x.view().data, gpu.dtype(), {rows, c.k}},
                              .w = gpu_w.view(),
                              .y = {y.view().data, DType::kF32, shape},
                              .accumulate = true});
      return gpu.download(y);
    };
    const Tensor all = added(c.tokens);
    const Tensor some = added(c.fewer);
    const std::int64_t size = c.fewer * c.outputs;
    for (std::int64_t i = 0; i < size; ++i) ASSERT_EQ(some.f32()[i], all.f32()[i]) << i;
    for (std::int64_t i = size; i < c.tokens * c.outputs; ++i) {
      ASSERT_EQ(some.f32()[i], sums.f32()[i]) << i;
    }
    reference::linear({.x = x.view(), .w = w.view(), .y = sums.view(), .accumulate = true});
    expect_close(all, sums, tolerance(DType::kF32, c.k));
  }
}

// Rows of a bucket: 1 to 16, 17 to 32, 33 to 64 and so on.
TEST_P(CudaProduct, ARowDoesNotDependOnTheOthersOfItsBucket) {
  Random random(2);
  Gpu gpu(activations());
  const std::int64_t k = 512;
  const std::int64_t outputs = 392;
  Tensor w = random.normal_tensor({outputs, k});
  Tensor x = random.normal_tensor({64, k});
  const Tensor gpu_w = gpu.upload(w, form());
  const Tensor gpu_x = gpu.upload(x, gpu.dtype());
  for (const auto& [all, some] : {std::pair{16, 1}, {16, 7}, {32, 17}, {64, 33}, {64, 50}}) {
    const auto product = [&](std::int64_t rows) {
      Tensor y = device(DType::kF32, {rows, outputs});
      ops::linear(
          gpu.ctx(),
          {.x = {gpu_x.view().data, gpu.dtype(), {rows, k}}, .w = gpu_w.view(), .y = y.view()});
      return gpu.download(y);
    };
    const Tensor expected = product(all);
    const Tensor got = product(some);
    for (std::int64_t i = 0; i < some * outputs; ++i) {
      ASSERT_EQ(got.f32()[i], expected.f32()[i]) << all << " " << some << " " << i;
    }
  }
}

TEST_P(CudaLinear, BackwardEqualsPlainOnAllShapes) {
  Random random(5);
  Gpu gpu(GetParam());
  const std::int64_t widths[] = {256, 768, 8, 64, 33, 1};
  for (int round = 0; round < 24; ++round) {
    const std::int64_t tokens = random.integer(1, 200);
    const std::int64_t outputs = round % 4 == 0 ? 8 * random.integer(1, 20) : random.integer(1, 99);
    const std::int64_t k = widths[round % 6];
    Tensor dy = random.normal_tensor({tokens, outputs});
    Tensor x = random.normal_tensor({tokens, k});
    Tensor w = random.normal_tensor({outputs, k});
    Tensor dx = random.normal_tensor({tokens, k});
    Tensor dw = random.normal_tensor({outputs, k});
    Tensor dbias = random.normal_tensor({outputs});
    const bool accumulate = round % 3 == 0;
    const bool begins = round % 4 == 0;
    const DType dx_dtype = round % 2 == 0 ? DType::kF32 : gpu.dtype();
    // A float32 gradient that bfloat16 holds exactly is rounded without a trace.
    Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    if (round % 5 == 0) gpu_dy = gpu.upload(dy);
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, gpu.dtype());
    Tensor gpu_dx = gpu.upload(dx, dx_dtype);
    Tensor gpu_dw = gpu.upload(dw);
    Tensor gpu_dbias = gpu.upload(dbias);
    reference::linear_backward({.dy = dy.view(),
                                .x = x.view(),
                                .w = w.view(),
                                .dx = dx.view(),
                                .accumulate_dx = accumulate,
                                .dw = {dw.view(), begins},
                                .dbias = dbias.view()});
    ops::linear_backward(gpu.ctx(), {.dy = gpu_dy.view(),
                                     .x = gpu_x.view(),
                                     .w = gpu_w.view(),
                                     .dx = gpu_dx.view(),
                                     .accumulate_dx = accumulate,
                                     .dw = {gpu_dw.view(), begins},
                                     .dbias = gpu_dbias.view()});
    SCOPED_TRACE(testing::Message() << tokens << " x " << outputs << " x " << k);
    expect_close(gpu.download(gpu_dx), dx, tolerance(dx_dtype, outputs));
    expect_close(gpu.download(gpu_dw), dw, tolerance(DType::kF32, tokens));
    expect_close(gpu.download(gpu_dbias), dbias, tolerance(DType::kF32, tokens));
  }
}

TEST_P(CudaLinear, RowsMayBeLongerThanTheirOutputs) {
  Random random(6);
  Gpu gpu(GetParam());
  const std::int64_t k = 64;
  const std::int64_t outputs = 37;
  const std::int64_t stride = 40;
  for (const std::int64_t tokens : {5, 70}) {
    Tensor x = random.normal_tensor({tokens, k});
    Tensor w = random.normal_tensor({outputs, k});
    Tensor bias = random.normal_tensor({outputs});
    Tensor wide = random.normal_tensor({tokens, stride});
    Tensor y(DType::kF32, {tokens, outputs});
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w, gpu.dtype());
    const Tensor gpu_bias = gpu.upload(bias);
    Tensor gpu_wide = gpu.upload(wide);
    ops::linear(
        gpu.ctx(),
        {.x = gpu_x.view(), .w = gpu_w.view(), .y = gpu_wide.view(), .bias = gpu_bias.view()});
    reference::linear({.x = x.view(), .w = w.view(), .y = y.view(), .bias = bias.view()});
    const auto narrow = [&](const Tensor& rows) {
      Tensor result(DType::kF32, {tokens, outputs});
      for (std::int64_t t = 0; t < tokens; ++t) {
        std::copy_n(rows.f32() + t * stride, outputs, result.f32() + t * outputs);
      }
      return result;
    };
    const Tensor got = gpu.download(gpu_wide);
    expect_close(narrow(got), y, tolerance(DType::kF32, k));
    for (std::int64_t t = 0; t < tokens; ++t) {
      ASSERT_EQ(got.f32()[t * stride + outputs], wide.f32()[t * stride + outputs]) << "row " << t;
    }

    gpu_wide = gpu.upload(wide, gpu.dtype());
    Tensor dy = narrow(wide);
    Tensor dx(DType::kF32, {tokens, k});
    Tensor dw(DType::kF32, {outputs, k});
    Tensor gpu_dx = device(gpu.dtype(), {tokens, k});
    Tensor gpu_dw = device(DType::kF32, {outputs, k});
    reference::linear_backward(
        {.dy = dy.view(), .x = x.view(), .w = w.view(), .dx = dx.view(), .dw = dw.view()});
    ops::linear_backward(gpu.ctx(), {.dy = gpu_wide.view(),
                                     .x = gpu_x.view(),
                                     .w = gpu_w.view(),
                                     .dx = gpu_dx.view(),
                                     .dw = gpu_dw.view()});
    expect_close(gpu.download(gpu_dx), dx, tolerance(gpu.dtype(), outputs));
    expect_close(gpu.download(gpu_dw), dw, tolerance(DType::kF32, tokens));
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, CudaProduct,
                         testing::Values(DType::kF32, DType::kBF16, DType::kQ8, DType::kQ4),
                         test::dtype_name);
INSTANTIATE_TEST_SUITE_P(DTypes, CudaLinear, test::kDTypes, test::dtype_name);

Tensor normed(Tensor& x, Tensor& w, std::int64_t width) {
  Tensor y(DType::kF32, x.view().shape);
  const Shape rows{x.view().shape.size() / width, width};
  reference::rms_norm(
      {.x = x.view().reshaped(rows), .w = w.view(), .y = y.view().reshaped(rows), .eps = 1e-6F});
  return y;
}

// The parameter is the form of the weights but for those of β.
class CudaStepOfForm : public EachDType {};

TEST_P(CudaStepOfForm, FusedProjectionsEqualTheirParts) {
  Random random(3);
  const DType form = GetParam();
  Gpu gpu(DType::kBF16);
  for (const std::int64_t batch : {1, 3, 8, 11, 16}) {
    const std::int64_t k = batch % 2 == 1 ? 512 : 2816;
    const bool heads = batch == 3;  // a norm in groups
    Tensor x = random.normal_tensor({batch, k});
    Tensor norm = random.normal_tensor({heads ? kStepHeadDim : k});
    Tensor conv_w = random.normal_tensor({40, 4});
    Tensor w_conv = random.normal_tensor({40, k});
    Tensor w_beta = random.normal_tensor({5, k}, 0.05F);
    Tensor w_glu = random.normal_tensor({2 * 32, k}, 0.05F);
    Tensor w_add = random.normal_tensor({17, k});
    Tensor y_add = random.normal_tensor({batch, 17});
    std::vector<Tensor> states;
    for (std::int64_t b = 0; b < batch; ++b) states.push_back(random.normal_tensor({40, 4}));
    std::vector<Tensor> gpu_states;
    for (Tensor& state : states) gpu_states.push_back(gpu.upload(state));

    const Tensor gpu_x = gpu.upload(x);
    const Tensor gpu_norm = gpu.upload(norm);
    const Tensor gpu_conv = gpu.upload(conv_w);
    const Tensor gpu_w[] = {gpu.upload(w_conv, form), gpu.upload(w_beta, DType::kBF16),
                            gpu.upload(w_glu, form), gpu.upload(w_add, form)};
    Tensor gpu_y[] = {device(DType::kF32, {batch, 40}), device(DType::kF32, {batch, 5}),
                      device(DType::kBF16, {batch, 32}), gpu.upload(y_add)};
    const std::vector<float*> gpu_pointers = test::pointers(gpu_states);
    const StepLinearPart parts[] = {
        {.w = gpu_w[0].view(),
         .y = gpu_y[0].view(),
         .epilogue = StepEpilogue::kConvSilu,
         .conv = gpu_conv.view(),
         .conv_states = gpu_pointers},
        {.w = gpu_w[1].view(), .y = gpu_y[1].view(), .epilogue = StepEpilogue::kSigmoid},
        {.w = gpu_w[2].view(), .y = gpu_y[2].view(), .epilogue = StepEpilogue::kGlu},
        {.w = gpu_w[3].view(), .y = gpu_y[3].view(), .epilogue = StepEpilogue::kAdd}};
    ops::step_linear(
        gpu.ctx(), {.x = gpu_x.view(), .norm = gpu_norm.view(), .norm_eps = 1e-6F, .parts = parts});

    Tensor input = normed(x, norm, heads ? kStepHeadDim : k);
    gpu.upload(input, DType::kBF16);  // rounds it
    const auto product = [&](Tensor& w) {
      Tensor y(DType::kF32, {batch, w.view().shape[0]});
      reference::linear({.x = input.view(), .w = w.view(), .y = y.view()});
      return y;
    };
    const Tensor convolution_input = product(w_conv);
    Tensor convolved(DType::kF32, {batch, 40});
    std::vector<std::int64_t> cu;
    for (std::int64_t b = 0; b <= batch; ++b) cu.push_back(b);
    reference::short_conv({.x = convolution_input.view(),
                           .w = conv_w.view(),
                           .sequences = Sequences(cu),
                           .states = test::pointers(states),
                           .activation = Activation::kSilu,
                           .y = convolved.view()});
    Tensor beta = product(w_beta);
    reference::activation({.activation = Activation::kSigmoid, .x = beta.view()});
    Tensor glu(DType::kF32, {batch, 32});
    const Tensor gate_up = product(w_glu);
    reference::glu({.gate_up = gate_up.view(), .y = glu.view()});
    reference::linear(
        {.x = input.view(), .w = w_add.view(), .y = y_add.view(), .accumulate = true});

    // The normed input may fall on the other side of a rounding to bfloat16 here and there: one
    // element in a hundred, each by ε of its own.
    const double exact = tolerance(DType::kF32, k) + 0.1 * test::epsilon(DType::kBF16);
    expect_close(gpu.download(gpu_y[0]), convolved, exact);
    expect_close(gpu.download(gpu_y[1]), beta, exact);
    expect_close(gpu.download(gpu_y[2]), glu, exact + test::epsilon(DType::kBF16));
    expect_close(gpu.download(gpu_y[3]), y_add, exact);
    for (std::size_t b = 0; b < states.size(); ++b) {
      expect_close(gpu.download(gpu_states[b]), states[b], exact);
    }
  }
}

TEST(CudaStep, DeltaRuleEqualsPlain) {
  Random random(4);
  Gpu gpu(DType::kBF16);
  const std::int64_t batch = 3;
  const Shape shape{batch, 2, 128};
  Tensor q = random.normal_tensor(shape);
  Tensor k = random.normal_tensor(shape);
  Tensor v = random.normal_tensor(shape);
  Tensor beta(DType::kF32, {batch, 2});
  for (int i = 0; i < 6; ++i) beta.f32()[i] = random.uniform(0, 1);
  std::vector<Tensor> states;
  for (int b = 0; b < 3; ++b) states.push_back(random.normal_tensor({2, 128, 128}));
  std::vector<Tensor> gpu_states;
  for (Tensor& state : states) gpu_states.push_back(gpu.upload(state));
  const Tensor gpu_q = gpu.upload(q);
  const Tensor gpu_k = gpu.upload(k);
  const Tensor gpu_v = gpu.upload(v);
  const Tensor gpu_beta = gpu.upload(beta);
  Tensor gpu_o = device(DType::kF32, shape);
  Tensor o(DType::kF32, shape);
  const std::vector<float*> gpu_pointers = test::pointers(gpu_states);
  ops::delta_rule_step(gpu.ctx(), {.q = gpu_q.view(),
                                   .k = gpu_k.view(),
                                   .v = gpu_v.view(),
                                   .beta = gpu_beta.view(),
                                   .states = gpu_pointers,
                                   .o = gpu_o.view()});
  for (Tensor* x : {&q, &k}) {
    reference::feature_map({.norm = FeatureNorm::kL2, .x = x->view()});
  }
  const std::int64_t cu[] = {0, 1, 2, 3};
  reference::delta_rule({.q = q.view(),
                         .k = k.view(),
                         .v = v.view(),
                         .beta = beta.view(),
                         .sequences = Sequences(cu),
                         .states = test::pointers(states),
                         .o = o.view()});
  expect_close(gpu.download(gpu_o), o, tolerance(DType::kF32, 128));
  for (std::size_t b = 0; b < 3; ++b) {
    expect_close(gpu.download(gpu_states[b]), states[b], tolerance(DType::kF32, 128));
  }
}

// A layer of a DeltaNet and a head, by steps.
class Layer {
 public:
  // With weights of a form, but for those of β. The MLP is 1,280 wide, five blocks of 256 columns
  // of w, or as said.
  Layer(Gpu& gpu, DType form, std::int64_t inner = 1280) : gpu_(gpu), form_(form), inner_(inner) {
    for (Tensor& proj : projections_) proj = matrix(kWidth, kWidth);
    for (Tensor& conv : convolutions_) conv = vector({kWidth, kStepConvWidth});
  }

  // Logits [B, kVocab] behind three steps from zero states; step s of sequence b has x [s, b] of
  // inputs [3, all, kWidth] as its input.
  Tensor run(const Tensor& inputs, std::int64_t first, std::int64_t batch, bool as_program) {
    const std::int64_t all = inputs.view().shape[1];
    std::array<std::vector<Tensor>, 4> states;
    std::array<std::vector<float*>, 4> pointers;
    for (std::size_t i = 0; i < 4; ++i) {
      for (std::int64_t b = 0; b < batch; ++b) {
        states[i].push_back(device(DType::kF32, i < 3 ? Shape{kWidth, kStepConvWidth}
                                                      : Shape{kHeads, kStepHeadDim, kStepHeadDim}));
      }
      pointers[i] = test::pointers(states[i]);
    }
    Tensor logits = device(DType::kF32, {batch, kVocab});
    for (std::int64_t s = 0; s < 3; ++s) {
      Tensor rows(DType::kF32, {batch, kWidth});
      std::copy_n(inputs.f32() + (s * all + first) * kWidth, batch * kWidth, rows.f32());
      Tensor hidden = gpu_.upload(rows);
      step(pointers, hidden, logits, as_program);
      gpu_.ctx().synchronize();
    }
    return gpu_.download(logits);
  }

  static constexpr std::int64_t kHeads = 4;
  static constexpr std::int64_t kWidth = kHeads * kStepHeadDim;
  static constexpr std::int64_t kVocab = 40001;  // several groups of tiles a thread block

 private:
  Tensor matrix(std::int64_t rows, std::int64_t columns) { return matrix(rows, columns, form_); }
  Tensor matrix(std::int64_t rows, std::int64_t columns, DType form) {
    Tensor host =
        random_.normal_tensor({rows, columns}, 1 / std::sqrt(static_cast<float>(columns)));
    return gpu_.upload(host, form);
  }
  Tensor vector(const Shape& shape) {
    Tensor host = random_.normal_tensor(shape);
    return gpu_.upload(host);
  }

  void step(std::array<std::vector<float*>, 4>& states, Tensor& hidden, Tensor& logits,
            bool as_program) {
    Context& ctx = gpu_.ctx();
    const std::int64_t batch = hidden.view().shape[0];
    const Shape heads{batch, kHeads, kStepHeadDim};
    Tensor mixed[4] = {device(DType::kF32, {batch, kWidth}), device(DType::kF32, {batch, kWidth}),
                       device(DType::kF32, {batch, kWidth}), device(DType::kF32, {batch, kWidth})};
    Tensor beta = device(DType::kF32, {batch, kHeads});
    Tensor product = device(DType::kBF16, {batch, inner_});
    const auto& self = *this;
    std::vector<StepLinearPart> parts;
    for (std::size_t i = 0; i < 3; ++i) {
      parts.push_back({.w = self.projections_[i].view(),
                       .y = mixed[i].view(),
                       .epilogue = StepEpilogue::kConvSilu,
                       .conv = self.convolutions_[i].view(),
                       .conv_states = states[i]});
    }
    parts.push_back({.w = self.beta_.view(), .y = beta.view(), .epilogue = StepEpilogue::kSigmoid});
    const StepLinearPart output{
        .w = self.projections_[3].view(), .y = hidden.view(), .epilogue = StepEpilogue::kAdd};
    const StepLinearPart glu{
        .w = self.gate_up_.view(), .y = product.view(), .epilogue = StepEpilogue::kGlu};
    const StepLinearPart down{
        .w = self.down_.view(), .y = hidden.view(), .epilogue = StepEpilogue::kAdd};
    const StepLinearPart head{.w = self.head_.view(), .y = logits.view()};
    const ConstTensorView norm = self.norm_.view();
    ops::StepProgram program(ctx, as_program);
    ops::step_linear(ctx, {.x = hidden.view(), .norm = norm, .norm_eps = 1e-6F, .parts = parts});
    ops::delta_rule_step(ctx, {.q = mixed[0].view().reshaped(heads),
                               .k = mixed[1].view().reshaped(heads),
                               .v = mixed[2].view().reshaped(heads),
                               .beta = beta.view(),
                               .states = states[3],
                               .o = mixed[3].view().reshaped(heads)});
    ops::step_linear(ctx, {.x = mixed[3].view(),
                           .norm = self.head_norm_.view(),
                           .norm_eps = 1e-6F,
                           .parts = {&output, 1}});
    ops::step_linear(ctx,
                     {.x = hidden.view(), .norm = norm, .norm_eps = 1e-6F, .parts = {&glu, 1}});
    ops::step_linear(ctx, {.x = product.view(), .parts = {&down, 1}});
    ops::step_linear(ctx,
                     {.x = hidden.view(), .norm = norm, .norm_eps = 1e-6F, .parts = {&head, 1}});
    program.run();
    ctx.synchronize();
  }

  Gpu& gpu_;
  DType form_;
  std::int64_t inner_;
  Random random_{7};
  std::array<Tensor, 4> projections_;   // q, k, v, o [kWidth, kWidth]
  std::array<Tensor, 3> convolutions_;  // [kWidth, 4]
  Tensor beta_ = matrix(kHeads, kWidth, DType::kBF16);
  Tensor gate_up_ = matrix(2 * inner_, kWidth);
  Tensor down_ = matrix(kWidth, inner_);
  Tensor head_ = matrix(kVocab, kWidth);
  Tensor norm_ = vector({kWidth});
  Tensor head_norm_ = vector({kStepHeadDim});
};

// Inputs of five products are rounded to bfloat16; at worst each rounding falls the other way.
TEST_P(CudaStepOfForm, AProgramEqualsItsSteps) {
  Random random(8);
  Gpu gpu(DType::kBF16);
  Layer layer(gpu, GetParam());
  for (const std::int64_t batch : {1, 3, 8, 11, 16}) {
    SCOPED_TRACE(testing::Message() << batch << " sequences");
    const Tensor inputs = random.normal_tensor({3, batch, Layer::kWidth});
    expect_close(layer.run(inputs, 0, batch, true), layer.run(inputs, 0, batch, false),
                 5 * test::epsilon(DType::kBF16));
  }
}

// Two pieces of a tile, of which the second is one block or a whole one.
TEST_P(CudaStepOfForm, AProgramOfManyColumnsEqualsItsSteps) {
  Random random(10);
  Gpu gpu(DType::kBF16);
  for (const std::int64_t inner : {2304, 4096}) {
    Layer layer(gpu, GetParam(), inner);
    for (const std::int64_t batch : {2, 9}) {
      SCOPED_TRACE(testing::Message() << inner << " columns, " << batch << " sequences");
      const Tensor inputs = random.normal_tensor({3, batch, Layer::kWidth});
      expect_close(layer.run(inputs, 0, batch, true), layer.run(inputs, 0, batch, false),
                   5 * test::epsilon(DType::kBF16));
    }
  }
}

TEST_P(CudaStepOfForm, AProgramDoesNotDependOnTheBatch) {
  Random random(9);
  Gpu gpu(DType::kBF16);
  Layer layer(gpu, GetParam());
  const Tensor inputs = random.normal_tensor({3, 16, Layer::kWidth});
  const Tensor all = layer.run(inputs, 0, 16, true);
  expect_equal(layer.run(inputs, 0, 16, true), all);
  for (const auto& [first, batch] :
       {std::pair<std::int64_t, std::int64_t>{0, 1}, {3, 8}, {5, 11}}) {
    const Tensor some = layer.run(inputs, first, batch, true);
    for (std::int64_t i = 0; i < batch * Layer::kVocab; ++i) {
      ASSERT_EQ(some.f32()[i], all.f32()[first * Layer::kVocab + i]) << batch << " " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, CudaStepOfForm,
                         testing::Values(DType::kBF16, DType::kQ8, DType::kQ4), test::dtype_name);

}  // namespace
}  // namespace deltafox
