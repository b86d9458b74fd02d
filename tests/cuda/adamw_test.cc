// AdamW on the GPU against the CPU.
#include "ops/adamw.h"

#include <gtest/gtest.h>

#include "cuda/gpu.h"

namespace deltafox {
namespace {

using test::expect_close;
using test::expect_equal;
using test::Gpu;
using test::Random;

// Host and device copies of what a step reads and writes.
struct Parameter {
  Parameter(Gpu& gpu, Random& random, std::int64_t size)
      : grad(random.normal_tensor({size})),
        w(random.normal_tensor({size})),
        m(random.normal_tensor({size}, 0.1F)),
        v(random.normal_tensor({size}, 0.1F)) {
    for (std::int64_t i = 0; i < size; ++i) v.f32()[i] *= v.f32()[i];
    gpu_grad = gpu.upload(grad);
    gpu_w = gpu.upload(w);
    gpu_m = gpu.upload(m);
    gpu_v = gpu.upload(v);
    rounded = Tensor(DType::kBF16, {size});
    gpu_rounded = Tensor(DType::kBF16, {size}, Device::kCuda);
  }
  AdamWParam host() {
    return {.grad = grad.view(),
            .w = w.view(),
            .m = m.view(),
            .v = v.view(),
            .rounded = rounded.view(),
            .weight_decay = 0.1};
  }
  AdamWParam device() {
    return {.grad = gpu_grad.view(),
            .w = gpu_w.view(),
            .m = gpu_m.view(),
            .v = gpu_v.view(),
            .rounded = gpu_rounded.view(),
            .weight_decay = 0.1};
  }

  Tensor grad, w, m, v, rounded;
  Tensor gpu_grad, gpu_w, gpu_m, gpu_v, gpu_rounded;
};

// A few roundings of w, which the new one is near to.
const double kTolerance = 8 * test::epsilon(DType::kF32);

TEST(CudaAdamW, AStepOfAllEqualsTheCpu) {
  Random random(1);
  Gpu gpu(DType::kF32);
  std::vector<Parameter> params;
  for (const std::int64_t size : {1, 7, 4096, 4097, 40'000}) {
    params.emplace_back(gpu, random, size);
  }
  std::vector<AdamWParam> host;
  std::vector<AdamWParam> device;
  for (Parameter& param : params) {
    host.push_back(param.host());
    device.push_back(param.device());
  }
  Tensor norm(DType::kF32, {1});
  Tensor gpu_norm(DType::kF32, {1}, Device::kCuda);
  AdamWStepArgs args{
      .params = host, .lr = 0.01, .beta2 = 0.95, .max_norm = 3, .step = 4, .norm = norm.view()};
  ops::adamw_step(gpu.cpu(), args);
  args.params = device;
  args.norm = gpu_norm.view();
  ops::adamw_step(gpu.ctx(), args);
  EXPECT_FLOAT_EQ(gpu.download(gpu_norm).f32()[0], norm.f32()[0]);
  for (Parameter& param : params) {
    const Tensor w = gpu.download(param.gpu_w);
    expect_close(w, param.w, kTolerance);
    expect_close(gpu.download(param.gpu_m), param.m, kTolerance);
    expect_close(gpu.download(param.gpu_v), param.v, kTolerance);
    Tensor expected(DType::kBF16, w.view().shape);
    convert(w.view(), expected.view());
    Tensor widened(DType::kF32, w.view().shape);
    convert(expected.view(), widened.view());
    expect_equal(gpu.download(param.gpu_rounded), widened);
  }
}

TEST(CudaAdamW, AnInfiniteNormChangesNothing) {
  Random random(2);
  Gpu gpu(DType::kF32);
  Parameter finite(gpu, random, 5000);
  Parameter infinite(gpu, random, 5000);
  infinite.grad.f32()[4999] = INFINITY;
  infinite.gpu_grad = gpu.upload(infinite.grad);
  const AdamWParam params[] = {finite.device(), infinite.device()};
  Tensor norm(DType::kF32, {1}, Device::kCuda);
  ops::adamw_step(gpu.ctx(), {.params = params, .lr = 0.01, .norm = norm.view()});
  EXPECT_TRUE(std::isinf(gpu.download(norm).f32()[0]));
  expect_equal(gpu.download(finite.gpu_w), finite.w);
  expect_equal(gpu.download(finite.gpu_v), finite.v);
}

TEST(CudaAdamW, OneParameterAndItsSumOfSquaresEqualTheCpu) {
  Random random(3);
  Gpu gpu(DType::kF32);
  Parameter param(gpu, random, 12'345);
  const double expected = ops::sum_of_squares(gpu.cpu(), param.grad.view());
  EXPECT_NEAR(ops::sum_of_squares(gpu.ctx(), param.gpu_grad.view()), expected, 1e-12 * expected);
  const auto args = [](const AdamWParam& p) {
    return AdamWArgs{.grad = p.grad,
                     .w = p.w,
                     .m = p.m,
                     .v = p.v,
                     .lr = 0.01,
                     .weight_decay = p.weight_decay,
                     .scale = 0.5,
                     .step = 2};
  };
  reference::adamw(args(param.host()));
  ops::adamw(gpu.ctx(), args(param.device()));
  expect_close(gpu.download(param.gpu_w), param.w, kTolerance);
  expect_close(gpu.download(param.gpu_m), param.m, kTolerance);
  expect_close(gpu.download(param.gpu_v), param.v, kTolerance);
}

}  // namespace
}  // namespace deltafox
