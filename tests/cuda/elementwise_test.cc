// The ops that touch each element once, on the GPU against their plain versions on the CPU.
#include <gtest/gtest.h>

#include "cuda/gpu.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "support/activations.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::Gpu;
using test::Random;

// Both sides compute in float32, to a few units in the last place of exp and the square root; the
// output is rounded once.
double tolerance(DType dtype) {
  return (dtype == DType::kBF16 ? test::epsilon(dtype) : 0) + 32 * test::epsilon(DType::kF32);
}

class CudaElementwise : public EachDType {};

TEST_P(CudaElementwise, RmsNormWithGatesGroupsAndOddWidths) {
  Random random(1);
  Gpu gpu(GetParam());
  for (int round = 0; round < 24; ++round) {
    const std::int64_t width =
        round % 3 == 0 ? 4 * random.integer(1, 1200) : random.integer(1, 700);
    const std::int64_t groups = random.integer(1, 3);
    const std::int64_t rows = groups * random.integer(1, 9);
    Tensor x = random.normal_tensor({rows, width});
    Tensor gate = random.normal_tensor({rows, width});
    Tensor w = random.normal_tensor({groups * width});
    // The residual stream is float32 whatever the activations are.
    const Tensor gpu_x = gpu.upload(x, round % 2 == 0 ? DType::kF32 : gpu.dtype());
    const Tensor gpu_gate = gpu.upload(gate, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w);
    Tensor gpu_y(gpu.dtype(), x.view().shape, Device::kCuda);
    Tensor y(DType::kF32, x.view().shape);
    const bool gated = round % 4 != 0;
    RmsNormArgs args{.x = x.view(),
                     .w = w.view(),
                     .gate = gated ? gate.view() : TensorView{},
                     .gate_first = round % 5 == 0,
                     .y = y.view(),
                     .eps = 1e-5F};
    reference::rms_norm(args);
    args.x = gpu_x.view();
    args.w = gpu_w.view();
    if (gated) args.gate = gpu_gate.view();
    args.y = gpu_y.view();
    ops::rms_norm(gpu.ctx(), args);
    expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype()));
  }
}

// More rows than are walked at a time, and every size of team; plain, and with groups and gates.
TEST_P(CudaElementwise, RmsNormOfManyRows) {
  Random random(6);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {8, 64, 72, 128, 136, 512, 520, 1536, 1544, 4096}) {
    constexpr std::int64_t kGroups = 3;
    const std::int64_t rows = ((std::int64_t{1} << 21) / width + 1) * kGroups;
    Tensor x = random.normal_tensor({rows, width});
    Tensor gate = random.normal_tensor({rows, width});
    Tensor w = random.normal_tensor({kGroups * width});
    Tensor y(DType::kF32, x.view().shape);
    const Tensor gpu_w = gpu.upload(w);
    for (const DType dtype : {DType::kF32, gpu.dtype()}) {
      const Tensor gpu_x = gpu.upload(x, dtype);
      const Tensor gpu_gate = gpu.upload(gate, dtype);
      Tensor gpu_y(gpu.dtype(), x.view().shape, Device::kCuda);
      for (const bool gated : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << width << " wide, from " << name_of(dtype) << (gated ? ", gated" : ""));
        const std::int64_t weights = gated ? kGroups * width : width;
        RmsNormArgs args{
            .x = x.view(),
            .w = {w.view().data, DType::kF32, {weights}},
            .gate_activation = width % 3 == 0 ? Activation::kSigmoid : Activation::kSilu,
            .gate_first = width >= 1536,
            .y = y.view(),
            .eps = 1e-5F};
        if (gated) args.gate = gate.view();
        reference::rms_norm(args);
        args.x = gpu_x.view();
        args.w.data = gpu_w.view().data;
        args.y = gpu_y.view();
        if (gated) args.gate = gpu_gate.view();
        ops::rms_norm(gpu.ctx(), args);
        expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype()));
      }
    }
  }
}

TEST_P(CudaElementwise, GluOfAnyWidth) {
  Random random(2);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {1, 7, 64, 130}) {
    Tensor gate_up = random.normal_tensor({5, 2 * width});
    const Tensor gpu_gate_up = gpu.upload(gate_up, gpu.dtype());
    Tensor gpu_y(gpu.dtype(), {5, width}, Device::kCuda);
    Tensor y(DType::kF32, {5, width});
    reference::glu({.gate_up = gate_up.view(), .y = y.view()});
    ops::glu(gpu.ctx(), {.gate_up = gpu_gate_up.view(), .y = gpu_y.view()});
    expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype()));
  }
}

TEST_P(CudaElementwise, ActivationsAndGatesInPlace) {
  Random random(3);
  Gpu gpu(GetParam());
  for (const Activation kind : test::kActivations) {
    Tensor x = random.normal_tensor({3, 5, 9});
    Tensor gate = random.normal_tensor({3, 5, 9});
    Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_gate = gpu.upload(gate, gpu.dtype());
    reference::gate({.activation = kind, .gate = gate.view(), .x = x.view()});
    ops::gate(gpu.ctx(), {.activation = kind, .gate = gpu_gate.view(), .x = gpu_x.view()});
    expect_close(gpu.download(gpu_x), x, tolerance(gpu.dtype()));
    gpu_x = gpu.upload(x, gpu.dtype());
    reference::activation({.activation = kind, .x = x.view()});
    ops::activation(gpu.ctx(), {.activation = kind, .x = gpu_x.view()});
    expect_close(gpu.download(gpu_x), x, tolerance(gpu.dtype()));
  }
}

TEST_P(CudaElementwise, FeatureMapsOfAnyWidth) {
  Random random(4);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {1, 31, 128, 200}) {
    for (const FeatureNorm norm : {FeatureNorm::kNone, FeatureNorm::kL2, FeatureNorm::kSum}) {
      Tensor x = random.normal_tensor({3, 4, width});
      Tensor gpu_x = gpu.upload(x, gpu.dtype());
      const Activation kind = norm == FeatureNorm::kSum ? Activation::kEluPlusOne  // positive
                                                        : Activation::kSilu;
      reference::feature_map({.activation = kind, .norm = norm, .x = x.view()});
      ops::feature_map(gpu.ctx(), {.activation = kind, .norm = norm, .x = gpu_x.view()});
      expect_close(gpu.download(gpu_x), x, tolerance(gpu.dtype()));
    }
  }
}

TEST(CudaGates, ForgetGateAndLogSigmoidKeepTheirPrecision) {
  Random random(5);
  Gpu gpu(DType::kF32);
  Tensor x = random.normal_tensor({7, 3}, 6);
  Tensor k(DType::kF32, {7, 3});
  Tensor bias = random.normal_tensor({3});
  Tensor y(DType::kF32, {7, 3});
  const Tensor gpu_bias = gpu.upload(bias);
  Tensor gpu_x = gpu.upload(x);
  Tensor gpu_k(DType::kF32, {7, 3}, Device::kCuda);
  Tensor gpu_y(DType::kF32, {7, 3}, Device::kCuda);
  reference::log_sigmoid({.x = x.view(), .bias = bias.view(), .y = y.view()});
  ops::log_sigmoid(gpu.ctx(), {.x = gpu_x.view(), .bias = gpu_bias.view(), .y = gpu_y.view()});
  reference::forget_gate({.x = x.view(), .k = k.view()});
  ops::forget_gate(gpu.ctx(), {.x = gpu_x.view(), .k = gpu_k.view()});
  const Tensor got[] = {gpu.download(gpu_x), gpu.download(gpu_k), gpu.download(gpu_y)};
  const Tensor* expected[] = {&x, &k, &y};
  for (int n = 0; n < 3; ++n) {
    for (int i = 0; i < 21; ++i) {  // each element relative to itself
      const float e = expected[n]->f32()[i];
      ASSERT_NEAR(got[n].f32()[i], e, 32 * test::epsilon(DType::kF32) * std::abs(e) + 1e-12F);
    }
  }
}

TEST_P(CudaElementwise, EmbeddingIsExact) {
  Random random(6);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {3, 64}) {
    Tensor table = random.normal_tensor({11, width});
    const Tensor gpu_table = gpu.upload(table, gpu.dtype());
    const std::vector<std::int32_t> ids{10, 0, 3, 3};
    const Tensor gpu_ids(DType::kI32, {4}, Device::kCuda);
    cuda::copy(const_cast<void*>(gpu_ids.view().data), ids.data(), 16);
    Tensor gpu_y(DType::kF32, {4, width}, Device::kCuda);
    Tensor y(DType::kF32, {4, width});
    ops::embedding(gpu.cpu(), {.ids = ids, .table = table.view(), .y = y.view()});
    ops::embedding(gpu.ctx(), {.ids = {static_cast<const std::int32_t*>(gpu_ids.view().data), 4},
                               .table = gpu_table.view(),
                               .y = gpu_y.view()});
    test::expect_equal(gpu.download(gpu_y), y);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaElementwise, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
