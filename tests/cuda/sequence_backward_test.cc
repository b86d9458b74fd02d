// Backward of the ops over sequences on the GPU against the plain versions on the CPU.
#include <gtest/gtest.h>

#include "cuda/gpu.h"
#include "ops/rope.h"
#include "ops/short_conv.h"
#include "ops/token_shift.h"

namespace deltafox {
namespace {

using test::EachDType;
using test::expect_close;
using test::Gpu;
using test::Random;

// Sums of a few hundred terms in another order are worth a few roundings.
const double kSums = 64 * test::epsilon(DType::kF32);

// Of ops that compute in float32 and round their outputs alone.
double output_tolerance(DType dtype) {
  return (dtype == DType::kBF16 ? test::epsilon(dtype) : 0) + kSums;
}

class CudaSequenceBackward : public EachDType {};

TEST_P(CudaSequenceBackward, ShortConvolution) {
  Random random(1);
  Gpu gpu(GetParam());
  for (int round = 0; round < 8; ++round) {
    const bool usual = round % 2 == 0;
    const std::int64_t channels = usual ? 4 * random.integer(1, 150) : random.integer(1, 200);
    const std::int64_t width = usual ? 4 : random.integer(1, 5);
    const std::vector<std::int64_t> cu = random.lengths(3, round < 4 ? 60 : 300);
    const bool biased = round % 3 != 0;
    const Activation activation = round % 4 < 2 ? Activation::kSilu : Activation::kIdentity;
    Tensor x = random.normal_tensor({cu.back(), channels});
    Tensor dy = random.normal_tensor({cu.back(), channels});
    Tensor w = random.normal_tensor({channels, width});
    Tensor bias = random.normal_tensor({channels});
    Tensor dw = random.normal_tensor({channels, width});
    Tensor dbias = random.normal_tensor({channels});
    Tensor dx(DType::kF32, x.view().shape);
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w);
    const Tensor gpu_bias = gpu.upload(bias);
    Tensor gpu_dw = gpu.upload(dw);
    Tensor gpu_dbias = gpu.upload(dbias);
    Tensor gpu_dx(gpu.dtype(), x.view().shape, Device::kCuda);
    reference::short_conv_backward({.x = x.view(),
                                    .w = w.view(),
                                    .bias = biased ? bias.view() : TensorView{},
                                    .sequences = Sequences(cu),
                                    .activation = activation,
                                    .dy = dy.view(),
                                    .dx = dx.view(),
                                    .dw = dw.view(),
                                    .dbias = biased ? dbias.view() : TensorView{}});
    ops::short_conv_backward(gpu.ctx(), {.x = gpu_x.view(),
                                         .w = gpu_w.view(),
                                         .bias = biased ? gpu_bias.view() : ConstTensorView{},
                                         .sequences = Sequences(cu),
                                         .activation = activation,
                                         .dy = gpu_dy.view(),
                                         .dx = gpu_dx.view(),
                                         .dw = gpu_dw.view(),
                                         .dbias = biased ? gpu_dbias.view() : TensorView{}});
    SCOPED_TRACE(testing::Message() << channels << " channels, width " << width);
    expect_close(gpu.download(gpu_dx), dx, output_tolerance(gpu.dtype()));
    expect_close(gpu.download(gpu_dw), dw, kSums);
    expect_close(gpu.download(gpu_dbias), dbias, kSums);
  }
}

// The fused kernel's head sizes, and one that it leaves to the ops one by one, as the CPU always
// does.
TEST_P(CudaSequenceBackward, ShortConvolutionBehindANorm) {
  Random random(4);
  Gpu gpu(GetParam());
  for (const std::int64_t head_dim : {128, 64, 8, 256, 12}) {
    const std::vector<std::int64_t> cu = random.lengths(3, 150);
    const std::int64_t channels = 3 * head_dim;
    Tensor x = random.normal_tensor({cu.back(), channels});
    Tensor dy = random.normal_tensor({cu.back(), channels});
    Tensor w = random.normal_tensor({channels, 4}, 0.5F);
    Tensor dw = random.normal_tensor({channels, 4});
    Tensor dx(DType::kF32, x.view().shape);
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w);
    Tensor gpu_dw = gpu.upload(dw);
    Tensor gpu_dx(gpu.dtype(), x.view().shape, Device::kCuda);
    ShortConvBackwardArgs args{.x = x.view(),
                               .w = w.view(),
                               .sequences = Sequences(cu),
                               .activation = Activation::kSilu,
                               .norm_width = head_dim,
                               .dy = dy.view(),
                               .dx = dx.view(),
                               .dw = dw.view()};
    ops::short_conv_backward(gpu.cpu(), args);
    args.x = gpu_x.view();
    args.w = gpu_w.view();
    args.dy = gpu_dy.view();
    args.dx = gpu_dx.view();
    args.dw = gpu_dw.view();
    ops::short_conv_backward(gpu.ctx(), args);
    SCOPED_TRACE(testing::Message() << "heads of " << head_dim);
    // One by one, the convolution's output and the norm's gradient are rounded on the way.
    const bool fused = head_dim != 12;
    const double between = fused ? 0 : 2 * test::epsilon(gpu.dtype());
    expect_close(gpu.download(gpu_dx), dx, output_tolerance(gpu.dtype()) + 2 * kSums + between);
    expect_close(gpu.download(gpu_dw), dw, 2 * kSums + between);
  }
}

// Of columns of a wider matrix: the same bits, and nothing else is touched.
TEST_P(CudaSequenceBackward, ShortConvolutionOfColumns) {
  Random random(5);
  Gpu gpu(GetParam());
  for (const std::int64_t width : {4, 3}) {
    const std::vector<std::int64_t> cu = random.lengths(3, 100);
    const std::int64_t tokens = cu.back();
    const std::int64_t channels = 64;
    const std::int64_t first = 40;
    const std::int64_t all = 112;
    Tensor wide_x = random.normal_tensor({tokens, all});
    Tensor x(DType::kF32, {tokens, channels});
    for (std::int64_t i = 0; i < tokens * channels; ++i) {
      x.f32()[i] = wide_x.f32()[i / channels * all + first + i % channels];
    }
    Tensor dy = random.normal_tensor(x.view().shape);
    Tensor w = random.normal_tensor({channels, width});
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    Tensor gpu_wide_x = gpu.upload(wide_x, gpu.dtype());
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    const Tensor gpu_w = gpu.upload(w);
    Tensor wide_dx = random.normal_tensor(wide_x.view().shape);
    Tensor gpu_wide_dx = gpu.upload(wide_dx, gpu.dtype());
    Tensor gpu_dx(gpu.dtype(), x.view().shape, Device::kCuda);
    const auto columns = [&](Tensor& wide) {
      return TensorView{static_cast<std::byte*>(wide.view().data) + first * size_of(gpu.dtype()),
                        gpu.dtype(), wide.view().shape};
    };
    const auto backward = [&](const ConstTensorView& input, const TensorView& gradient) {
      ops::short_conv_backward(gpu.ctx(), {.x = input,
                                           .w = gpu_w.view(),
                                           .sequences = Sequences(cu),
                                           .activation = Activation::kSilu,
                                           .dy = gpu_dy.view(),
                                           .dx = gradient});
    };
    backward(gpu_x.view(), gpu_dx.view());
    backward(columns(gpu_wide_x), columns(gpu_wide_dx));
    const Tensor dx = gpu.download(gpu_dx);
    const Tensor got = gpu.download(gpu_wide_dx);
    for (std::int64_t i = 0; i < tokens * all; ++i) {
      const std::int64_t column = i % all - first;
      const bool inside = column >= 0 && column < channels;
      ASSERT_EQ(got.f32()[i], inside ? dx.f32()[i / all * channels + column] : wide_dx.f32()[i])
          << "element " << i;
    }
  }
}

TEST_P(CudaSequenceBackward, TokenShift) {
  Random random(2);
  Gpu gpu(GetParam());
  for (const std::int64_t dim : {5, 64}) {
    const std::vector<std::int64_t> cu = random.lengths(4, 50);
    Tensor x = random.normal_tensor({cu.back(), 3, dim});
    Tensor dy = random.normal_tensor(x.view().shape);
    Tensor alpha(DType::kF32, {cu.back(), 3});
    for (std::int64_t i = 0; i < cu.back() * 3; ++i) alpha.f32()[i] = random.uniform(0, 1);
    Tensor dx(DType::kF32, x.view().shape);
    Tensor dalpha(DType::kF32, alpha.view().shape);
    const Tensor gpu_x = gpu.upload(x, gpu.dtype());
    const Tensor gpu_dy = gpu.upload(dy, gpu.dtype());
    const Tensor gpu_alpha = gpu.upload(alpha);
    Tensor gpu_dx(gpu.dtype(), x.view().shape, Device::kCuda);
    Tensor gpu_dalpha(DType::kF32, alpha.view().shape, Device::kCuda);
    reference::token_shift_backward({.x = x.view(),
                                     .alpha = alpha.view(),
                                     .sequences = Sequences(cu),
                                     .dy = dy.view(),
                                     .dx = dx.view(),
                                     .dalpha = dalpha.view()});
    ops::token_shift_backward(gpu.ctx(), {.x = gpu_x.view(),
                                          .alpha = gpu_alpha.view(),
                                          .sequences = Sequences(cu),
                                          .dy = gpu_dy.view(),
                                          .dx = gpu_dx.view(),
                                          .dalpha = gpu_dalpha.view()});
    expect_close(gpu.download(gpu_dx), dx, output_tolerance(gpu.dtype()));
    expect_close(gpu.download(gpu_dalpha), dalpha, kSums);
  }
}

TEST_P(CudaSequenceBackward, Rope) {
  Random random(3);
  Gpu gpu(GetParam());
  const std::vector<std::int64_t> cu = random.lengths(3, 40);
  const std::vector<std::int64_t> positions{0, 5, 70};
  Tensor dq = random.normal_tensor({cu.back(), 4, 64});
  Tensor dk = random.normal_tensor({cu.back(), 2, 64});
  Tensor gpu_dq = gpu.upload(dq, gpu.dtype());
  Tensor gpu_dk = gpu.upload(dk, gpu.dtype());
  reference::rope_backward(
      {.dq = dq.view(), .dk = dk.view(), .sequences = Sequences(cu), .positions = positions});
  ops::rope_backward(gpu.ctx(), {.dq = gpu_dq.view(),
                                 .dk = gpu_dk.view(),
                                 .sequences = Sequences(cu),
                                 .positions = positions});
  // An angle of up to a hundred is off by its rounding, which the sine and the cosine see whole.
  const double angles = 110 * test::epsilon(DType::kF32);
  expect_close(gpu.download(gpu_dq), dq, output_tolerance(gpu.dtype()) + angles);
  expect_close(gpu.download(gpu_dk), dk, output_tolerance(gpu.dtype()) + angles);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaSequenceBackward, test::kDTypes, test::dtype_name);

}  // namespace
}  // namespace deltafox
