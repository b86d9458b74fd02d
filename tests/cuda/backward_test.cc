// Backward on the GPU against the plain versions on the CPU: every op but the recurrences and
// attention.
#include <gtest/gtest.h>

#include "cuda/gpu.h"
#include "ops/activation.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/gate.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "support/activations.h"
#include "support/tensors.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::Gpu;
using test::Random;

// Both sides compute in float32, to a few units in the last place of exp and the square root, with
// one cancellation of terms of like size; the output is rounded once.
double tolerance(DType dtype) {
  return (dtype == DType::kBF16 ? test::epsilon(dtype) : 0) + 64 * test::epsilon(DType::kF32);
}

// Sums of some hundred terms in another order.
const double kSums = 64 * test::epsilon(DType::kF32);

Tensor on_gpu(DType dtype, const Tensor& like) {
  return {dtype, like.view().shape, Device::kCuda};
}

Tensor uniform_tensor(Random& random, const Shape& shape, float low, float high) {
  Tensor tensor(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.size(); ++i) tensor.f32()[i] = random.uniform(low, high);
  return tensor;
}

// In the GPU's memory.
Tensor upload_ids(const std::vector<std::int32_t>& ids) {
  Tensor device(DType::kI32, {static_cast<std::int64_t>(ids.size())}, Device::kCuda);
  cuda::copy(device.view().data, ids.data(), ids.size() * sizeof(ids[0]));
  return device;
}

std::span<const std::int32_t> ids_of(const Tensor& device) {
  return {static_cast<const std::int32_t*>(device.view().data),
          static_cast<std::size_t>(device.view().shape[0])};
}

class CudaBackward : public EachDType {};

TEST_P(CudaBackward, ActivationsAndGates) {
  Random random(1);
  Gpu gpu(GetParam());
  for (const Activation kind : test::kActivations) {
    const Shape shape{3, random.integer(1, 99)};
    Tensor x = random.normal_tensor(shape);
    Tensor gate = random.normal_tensor(shape);
    Tensor dy = random.normal_tensor(shape);
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_gate = gpu.upload(gate, gpu.dtype());
    Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    Tensor dx(DType::kF32, shape);
    Tensor dgate(DType::kF32, shape);
    Tensor gpu_dx = on_gpu(gpu.dtype(), dx);
    Tensor gpu_dgate = on_gpu(gpu.dtype(), dgate);
    reference::gate_backward({kind, gate.view(), x.view(), dy.view(), dx.view(), dgate.view()});
    ops::gate_backward(gpu.ctx(), {kind, gpu_gate.view(), gpu_x.view(), gpu_dy.view(),
                                   gpu_dx.view(), gpu_dgate.view()});
    expect_close(gpu.download(gpu_dx), dx, tolerance(gpu.dtype()));
    expect_close(gpu.download(gpu_dgate), dgate, tolerance(gpu.dtype()));
    reference::activation_backward({kind, x.view(), dy.view(), dx.view()});
    ops::activation_backward(gpu.ctx(), {kind, gpu_x.view(), gpu_dy.view(), gpu_dy.view()});
    expect_close(gpu.download(gpu_dy), dx, tolerance(gpu.dtype()));
  }
}

TEST_P(CudaBackward, GluOfAnyWidthAndItsProduct) {
  Random random(2);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {1, 7, 64, 130}) {
    Tensor gate_up = random.normal_tensor({5, 2 * width});
    Tensor dy = random.normal_tensor({5, width});
    Tensor dgate_up(DType::kF32, {5, 2 * width});
    Tensor y(DType::kF32, {5, width});
    const Tensor gpu_gate_up = gpu.upload(gate_up, gpu.dtype());
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    Tensor gpu_dgate_up = on_gpu(gpu.dtype(), dgate_up);
    Tensor gpu_y = on_gpu(gpu.dtype(), y);
    reference::glu_backward(
        {.gate_up = gate_up.view(), .dy = dy.view(), .dgate_up = dgate_up.view(), .y = y.view()});
    ops::glu_backward(gpu.ctx(), {.gate_up = gpu_gate_up.view(),
                                  .dy = gpu_dy.view(),
                                  .dgate_up = gpu_dgate_up.view(),
                                  .y = gpu_y.view()});
    expect_close(gpu.download(gpu_dgate_up), dgate_up, tolerance(gpu.dtype()));
    expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype()));
  }
}

TEST_P(CudaBackward, FeatureMapsOfAnyWidth) {
  Random random(3);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {1, 31, 128, 200, 1040}) {
    for (const FeatureNorm norm : {FeatureNorm::kNone, FeatureNorm::kL2, FeatureNorm::kSum}) {
      Tensor x = random.normal_tensor({3, 4, width});
      Tensor dy = random.normal_tensor({3, 4, width});
      Tensor dx(DType::kF32, x.view().shape);
      const Tensor gpu_x = gpu.upload(x, gpu.dtype());
      Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
      const Activation kind = norm == FeatureNorm::kSum ? Activation::kEluPlusOne  // positive
                                                        : Activation::kSilu;
      reference::feature_map_backward({kind, norm, x.view(), dy.view(), dx.view()});
      ops::feature_map_backward(gpu.ctx(),
                                {kind, norm, gpu_x.view(), gpu_dy.view(), gpu_dy.view()});
      SCOPED_TRACE(testing::Message() << width << " " << static_cast<int>(norm));
      const Tensor got = gpu.download(gpu_dy);
      if (width > 1) {
        expect_close(got, dx, tolerance(gpu.dtype()));
        continue;
      }
      // A row of one cancels to nothing: errors are relative to what cancels, of order one.
      for (int i = 0; i < 12; ++i) {
        ASSERT_NEAR(got.f32()[i], dx.f32()[i], 16 * tolerance(gpu.dtype())) << "element " << i;
      }
    }
  }
}

TEST_P(CudaBackward, RmsNormWithGatesGroupsAndAnyWidth) {
  Random random(4);
  Gpu gpu(GetParam());
  const std::int64_t widths[] = {1, 64, 128, 33, 260, 1536, 777, 2048, 2062, 8200};
  for (int round = 0; round < 30; ++round) {
    const std::int64_t width = widths[round % 10];
    const std::int64_t groups = round % 4 == 0 ? random.integer(2, 3) : 1;
    // The last rounds have more rows than there are teams.
    const std::int64_t rows = groups * random.integer(1, round >= 20 && width < 64 ? 5000 : 9);
    const bool gated = round % 3 != 0;
    const bool accumulate = round % 2 == 0;
    Tensor x = random.normal_tensor({rows, width});
    // Bounded: of products of several normal numbers a few are so large that rounding them is an
    // error of many times the tensor's root mean square.
    Tensor gate = uniform_tensor(random, {rows, width}, -2, 2);
    Tensor w = uniform_tensor(random, {groups * width}, 0.5F, 1.5F);
    Tensor dy = uniform_tensor(random, {rows, width}, -2, 2);
    Tensor dx = random.normal_tensor({rows, width});
    Tensor dw = random.normal_tensor({groups * width});
    Tensor dgate(DType::kF32, {rows, width});
    // The residual stream and its gradient are float32 whatever the activations are.
    const DType stream = accumulate ? DType::kF32 : gpu.dtype();
    const Tensor gpu_x = gpu.upload(x, stream);
    const Tensor gpu_gate = gpu.upload(gate, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w);
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    Tensor gpu_dx = gpu.upload(dx, stream);
    Tensor gpu_dw = gpu.upload(dw);
    Tensor gpu_dgate = on_gpu(gpu.dtype(), dgate);
    Tensor gpu_rounded = on_gpu(DType::kBF16, dx);
    RmsNormBackwardArgs args{.x = x.view(),
                             .w = w.view(),
                             .gate = gated ? gate.view() : TensorView{},
                             .gate_first = round % 5 == 0,
                             .eps = 1e-5F,
                             .dy = dy.view(),
                             .dx = dx.view(),
                             .accumulate_dx = accumulate,
                             .dw = dw.view(),
                             .dgate = dgate.view()};
    reference::rms_norm_backward(args);
    args.x = gpu_x.view();
    args.w = gpu_w.view();
    if (gated) args.gate = gpu_gate.view();
    args.dy = gpu_dy.view();
    args.dx = gpu_dx.view();
    args.rounded = gpu_rounded.view();
    args.dw = gpu_dw.view();
    args.dgate = gpu_dgate.view();
    ops::rms_norm_backward(gpu.ctx(), args);
    SCOPED_TRACE(testing::Message() << "round " << round << ": " << rows << " x " << width);
    // Of a row of one, dx is nothing but what cancels.
    if (width > 1) {
      expect_close(gpu.download(gpu_dx), dx, tolerance(stream));
      expect_close(gpu.download(gpu_rounded), dx, tolerance(DType::kBF16));
    }
    expect_close(gpu.download(gpu_dw), dw, kSums);
    if (gated && (width > 1 || !args.gate_first)) {
      expect_close(gpu.download(gpu_dgate), dgate, tolerance(gpu.dtype()));
    }
  }
}

TEST_P(CudaBackward, RmsNormFromWhatForwardGave) {
  Random random(40);
  Gpu gpu(GetParam());
  const std::int64_t widths[] = {1, 64, 128, 33, 260, 1536, 777, 2048, 2062, 8200};
  for (int round = 0; round < 20; ++round) {
    const std::int64_t width = widths[round % 10];
    const std::int64_t groups = round % 4 == 0 ? random.integer(2, 3) : 1;
    const std::int64_t rows = groups * random.integer(1, round >= 10 && width < 64 ? 5000 : 9);
    Tensor x = random.normal_tensor({rows, width});
    Tensor w = uniform_tensor(random, {groups * width}, 0.5F, 1.5F);
    if (width > 1) w.f32()[0] = 0;
    Tensor y(DType::kF32, {rows, width});
    Tensor scales(DType::kF32, {rows});
    const Tensor gpu_x = gpu.upload(x);
    const Tensor gpu_w = gpu.upload(w);
    Tensor gpu_y = on_gpu(gpu.dtype(), y);
    Tensor gpu_scales = on_gpu(DType::kF32, scales);
    RmsNormArgs forward{
        .x = x.view(), .w = w.view(), .y = y.view(), .scales = scales.view(), .eps = 1e-5F};
    reference::rms_norm(forward);
    forward.x = gpu_x.view();
    forward.w = gpu_w.view();
    forward.y = gpu_y.view();
    forward.scales = gpu_scales.view();
    ops::rms_norm(gpu.ctx(), forward);
    SCOPED_TRACE(testing::Message() << "round " << round << ": " << rows << " x " << width);
    expect_close(gpu.download(gpu_y), y, tolerance(gpu.dtype()));
    expect_close(gpu.download(gpu_scales), scales, tolerance(DType::kF32));

    // The stream's gradient is float32 and added to; that of heads is not.
    const bool accumulate = round % 2 == 0;
    const DType stream = accumulate ? DType::kF32 : gpu.dtype();
    y = gpu.download(gpu_y);
    scales = gpu.download(gpu_scales);
    Tensor dy = uniform_tensor(random, {rows, width}, -2, 2);
    Tensor dx = random.normal_tensor({rows, width});
    Tensor dw = random.normal_tensor({groups * width});
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    Tensor gpu_dx = gpu.upload(dx, stream);
    Tensor gpu_dw = gpu.upload(dw);
    Tensor gpu_rounded = on_gpu(DType::kBF16, dx);
    RmsNormBackwardArgs args{.y = y.view(),
                             .scales = scales.view(),
                             .w = w.view(),
                             .dy = dy.view(),
                             .dx = dx.view(),
                             .accumulate_dx = accumulate,
                             .dw = dw.view()};
    reference::rms_norm_backward(args);
    args.y = gpu_y.view();
    args.scales = gpu_scales.view();
    args.w = gpu_w.view();
    args.dy = gpu_dy.view();
    args.dx = gpu_dx.view();
    args.rounded = gpu_rounded.view();
    args.dw = gpu_dw.view();
    ops::rms_norm_backward(gpu.ctx(), args);
    if (width > 1) {
      expect_close(gpu.download(gpu_dx), dx, tolerance(stream));
      expect_close(gpu.download(gpu_rounded), dx, tolerance(DType::kBF16));
    }
    expect_close(gpu.download(gpu_dw), dw, kSums);
  }
}

TEST(CudaBackwardOfGates, LogSigmoidAndForgetGate) {
  Random random(5);
  Gpu gpu(DType::kF32);
  const Shape shape{2500, 3};  // more rows than a stretch of the sums over them
  Tensor y = random.normal_tensor(shape, 3);
  for (std::int64_t i = 0; i < shape.size(); ++i) y.f32()[i] = -std::abs(y.f32()[i]);
  Tensor dy = random.normal_tensor(shape);
  Tensor dbias = random.normal_tensor({3});
  Tensor dx(DType::kF32, shape);
  const Tensor gpu_y = gpu.upload(y);
  Tensor gpu_dy = gpu.upload(dy);
  Tensor gpu_dbias = gpu.upload(dbias);
  reference::log_sigmoid_backward({y.view(), dy.view(), dx.view(), dbias.view()});
  ops::log_sigmoid_backward(gpu.ctx(),
                            {gpu_y.view(), gpu_dy.view(), gpu_dy.view(), gpu_dbias.view()});
  expect_close(gpu.download(gpu_dy), dx, tolerance(DType::kF32));
  expect_close(gpu.download(gpu_dbias), dbias, kSums);

  Tensor g(DType::kF32, shape);
  Tensor k(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.size(); ++i) {
    g.f32()[i] = random.uniform(0, 1);
    k.f32()[i] = 1 - g.f32()[i];
  }
  Tensor dk = random.normal_tensor(shape);
  const Tensor gpu_g = gpu.upload(g);
  const Tensor gpu_k = gpu.upload(k);
  Tensor gpu_dg = gpu.upload(dy);
  const Tensor gpu_dk = gpu.upload(dk);
  reference::forget_gate_backward({g.view(), k.view(), dy.view(), dk.view(), dx.view()});
  ops::forget_gate_backward(
      gpu.ctx(), {gpu_g.view(), gpu_k.view(), gpu_dg.view(), gpu_dk.view(), gpu_dg.view()});
  expect_close(gpu.download(gpu_dg), dx, tolerance(DType::kF32));
}

TEST(CudaBackwardOfEmbedding, AddsWhatTokensOfAnIdGet) {
  Random random(6);
  Gpu gpu(DType::kF32);
  for (const std::int64_t width : {5, 64, 520}) {
    // Rows of no token, of few, and one of so many that they are in many pieces; in the first round
    // every token has the same id.
    std::vector<std::int32_t> ids(2300);
    for (std::int32_t& id : ids) {
      const bool any = width > 5 && random.integer(0, 2) == 0;
      id = static_cast<std::int32_t>(any ? random.integer(0, 300) : 7);
    }
    const auto tokens = static_cast<std::int64_t>(ids.size());
    Tensor dy = random.normal_tensor({tokens, width});
    Tensor dtable = random.normal_tensor({301, width});
    const Tensor gpu_dy = gpu.upload(dy);
    Tensor gpu_dtable = gpu.upload(dtable);
    const Tensor gpu_ids = upload_ids(ids);
    reference::embedding_backward({.ids = ids, .dy = dy.view(), .dtable = dtable.view()});
    ops::embedding_backward(
        gpu.ctx(), {.ids = ids_of(gpu_ids), .dy = gpu_dy.view(), .dtable = gpu_dtable.view()});
    expect_close(gpu.download(gpu_dtable), dtable, kSums);
  }
}

// Rows of whole vectors and not; the last too long for shared memory in either dtype, with a
// vocabulary that is no multiple of anything, in rows that are.
TEST_P(CudaBackward, CrossEntropyInPlaceOfLogits) {
  Random random(7);
  Gpu gpu(GetParam());
  struct Sizes {
    std::int64_t classes, columns;
  };
  for (const Sizes& sizes : {Sizes{1, 1}, {37, 37}, {37, 40}, {4096, 4096}, {60'013, 60'016}}) {
    const std::vector<std::int32_t> labels{0, static_cast<std::int32_t>(sizes.classes - 1), -1,
                                           static_cast<std::int32_t>(sizes.classes / 2)};
    Tensor wide = random.normal_tensor({4, sizes.columns}, 3);
    const float scale = 0.25F;
    Tensor gpu_logits = gpu.upload(wide, gpu.dtype());
    Tensor logits(DType::kF32, {4, sizes.classes});
    for (std::int64_t t = 0; t < 4; ++t) {
      std::copy_n(wide.f32() + t * sizes.columns, sizes.classes, logits.f32() + t * sizes.classes);
    }
    Tensor loss(DType::kF32, {4});
    const Tensor gpu_labels = upload_ids(labels);
    Tensor gpu_loss = on_gpu(DType::kF32, loss);
    reference::cross_entropy_backward(
        {.logits = logits.view(), .labels = labels, .scale = scale, .loss = {loss.f32(), 4}});
    ops::cross_entropy_backward(gpu.ctx(), {.logits = gpu_logits.view(),
                                            .classes = sizes.classes,
                                            .labels = ids_of(gpu_labels),
                                            .scale = scale,
                                            .loss = {gpu_loss.f32(), 4}});
    SCOPED_TRACE(testing::Message() << sizes.classes << " classes");
    // exp(x − max) is as far off as the rounding of the difference, some tens, and in bfloat16
    // another 2^-20 of it.
    expect_close(gpu.download(gpu_loss), loss,
                 gpu.dtype() == DType::kBF16 ? 1e-5 : tolerance(DType::kF32));
    const Tensor got = gpu.download(gpu_logits);
    Tensor dlogits(DType::kF32, {4, sizes.classes});
    for (std::int64_t t = 0; t < 4; ++t) {
      const float* row = got.f32() + t * sizes.columns;
      std::copy_n(row, sizes.classes, dlogits.f32() + t * sizes.classes);
      for (std::int64_t n = sizes.classes; n < sizes.columns; ++n) {
        ASSERT_EQ(row[n], wide.f32()[t * sizes.columns + n]) << "behind row " << t;
      }
    }
    if (sizes.classes > 1) {
      expect_close(dlogits, logits, 2 * tolerance(gpu.dtype()));
    } else {
      test::expect_near(dlogits, logits, 1e-6F);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaBackward, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
