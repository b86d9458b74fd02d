// What the tests of the CUDA back end share: a Context of the CPU and one of the GPU, tensors there
// and back, comparisons.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/float_convert.h"
#include "ops/quantize.h"
#include "support/random.h"

namespace deltafox::test {

class Gpu {
 public:
  explicit Gpu(DType activation_dtype)
      : threads_(1), cpu_(threads_), ctx_(threads_, Device::kCuda, activation_dtype) {}

  Context& ctx() { return ctx_; }
  Context& cpu() { return cpu_; }
  DType dtype() { return ctx_.activation_dtype(); }

  // A copy of a float32 tensor in the GPU's memory, rounded to `dtype` or packed. With others than
  // F32 the host's tensor is rounded as well, so that both sides compute with the same numbers.
  Tensor upload(Tensor& host, DType dtype = DType::kF32) {
    const Shape shape = host.view().shape;
    if (is_packed(dtype)) return upload_packed(host, dtype);
    Tensor device(dtype, shape, Device::kCuda);
    if (dtype == DType::kF32) {
      cuda::copy(device.view().data, host.view().data, host.bytes());
      return device;
    }
    Tensor rounded(dtype, shape);
    convert(host.view(), rounded.view());
    convert(rounded.view(), host.view());
    cuda::copy(device.view().data, rounded.view().data, rounded.bytes());
    return device;
  }

  // As float32 in the host's memory, after all ops.
  Tensor download(const Tensor& device) {
    ctx_.synchronize();
    const ConstTensorView view = device.view();
    Tensor stored(view.dtype, view.shape);
    cuda::copy(stored.view().data, view.data, stored.bytes());
    if (view.dtype == DType::kF32) return stored;
    Tensor host(DType::kF32, view.shape);
    convert(stored.view(), host.view());
    return host;
  }

 private:
  Tensor upload_packed(Tensor& host, DType dtype) {
    const Shape shape = host.view().shape;
    Tensor packed(dtype, shape);
    ops::quantize(cpu_, {.w = host.view(), .packed = packed.view()});
    for (std::int64_t n = 0; n < shape[0]; ++n) {
      cpu::dequantize_row(packed.view(), n, host.f32() + n * shape[1]);
    }
    Tensor device(dtype, shape, Device::kCuda);
    cuda::copy(device.view().data, packed.view().data, packed.bytes());
    ops::arrange_packed(ctx_, device.view());
    return device;
  }

  ThreadPool threads_;
  Context cpu_;
  Context ctx_;
};

// Half the distance of neighbouring numbers at 1.
inline float epsilon(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8F : 0x1p-24F;
}

// ‖got − expected‖ <= tolerance ‖expected‖ over the whole tensor, and no element is farther off
// than tolerance times its own size or, if that is more, 16 times the root-mean-square size.
inline void expect_close(const Tensor& got, const Tensor& expected, double tolerance) {
  const std::int64_t size = expected.view().shape.size();
  ASSERT_EQ(got.view().shape.size(), size);
  double error = 0;
  double norm = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const double difference = static_cast<double>(got.f32()[i]) - expected.f32()[i];
    ASSERT_FALSE(std::isnan(difference)) << "element " << i;
    error += difference * difference;
    norm += static_cast<double>(expected.f32()[i]) * expected.f32()[i];
  }
  EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(norm));
  const double usual = 16 * std::sqrt(norm / static_cast<double>(size));
  for (std::int64_t i = 0; i < size; ++i) {
    const double element = expected.f32()[i];
    ASSERT_LE(std::abs(got.f32()[i] - element), tolerance * std::max(usual, std::abs(element)))
        << "element " << i;
  }
}

inline void expect_equal(const Tensor& got, const Tensor& expected) {
  for (std::int64_t i = 0; i < expected.view().shape.size(); ++i) {
    ASSERT_EQ(got.f32()[i], expected.f32()[i]) << "element " << i;
  }
}

// A test for each dtype of activations.
class EachDType : public testing::TestWithParam<DType> {};
inline const auto kDTypes = testing::Values(DType::kF32, DType::kBF16);

inline std::string dtype_name(const testing::TestParamInfo<DType>& info) {
  return std::string(name_of(info.param));
}

}  // namespace deltafox::test
