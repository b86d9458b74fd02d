// Packing weights and unpacking them.
#include "ops/quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "core/quantized.h"
#include "deltafox/error.h"
#include "support/random.h"

namespace deltafox {
namespace {

using test::Random;

std::vector<float> unpacked(const Tensor& packed, std::int64_t row) {
  std::vector<float> values(static_cast<std::size_t>(packed.view().shape[1]));
  cpu::dequantize_row(packed.view(), row, values.data());
  return values;
}

// Σ (w − ŵ)² / Σ w²
double packing_error(const Tensor& w, const Tensor& packed) {
  double error = 0;
  double total = 0;
  const std::int64_t depth = w.view().shape[1];
  for (std::int64_t n = 0; n < w.view().shape[0]; ++n) {
    const std::vector<float> row = unpacked(packed, n);
    for (std::int64_t k = 0; k < depth; ++k) {
      const double exact = w.f32()[n * depth + k];
      const double gap = exact - row[static_cast<std::size_t>(k)];
      error += gap * gap;
      total += exact * exact;
    }
  }
  return error / total;
}

// A multiple of the scale, which is the largest magnitude of a block over 127, is half a step away
// at most.
TEST(Quantize, EightBitsAreOffByHalfAStep) {
  Random random(1);
  ThreadPool threads(2);
  Context ctx(threads);
  for (int round = 0; round < 10; ++round) {
    const std::int64_t rows = random.integer(1, 40);
    const std::int64_t depth = random.integer(1, 600);
    const Tensor w = random.normal_tensor({rows, depth});
    Tensor packed(DType::kQ8, {rows, depth});
    ops::quantize(ctx, {.w = w.view(), .packed = packed.view()});
    for (std::int64_t n = 0; n < rows; ++n) {
      const std::vector<float> row = unpacked(packed, n);
      for (std::int64_t begin = 0; begin < depth; begin += kQuantBlock) {
        float max = 0;
        const std::int64_t end = std::min(depth, begin + kQuantBlock);
        for (std::int64_t k = begin; k < end; ++k) {
          max = std::max(max, std::abs(w.f32()[n * depth + k]));
        }
        for (std::int64_t k = begin; k < end; ++k) {
          // The last digits of w / scale may tip it to the further integer.
          ASSERT_NEAR(w.f32()[n * depth + k], row[static_cast<std::size_t>(k)], max / 253);
        }
      }
    }
  }
}

// A group of 32 normal variables reaches to 2.1 deviations or so: sixteen steps between ±2.1 of
// uniform error step/√12 make 0.0058; the coarser scales of groups add some.
TEST(Quantize, FourBitsOfNormalWeightsLoseLessThanAHundredthOfTheSquare) {
  Random random(2);
  ThreadPool threads(2);
  Context ctx(threads);
  const Tensor w = random.normal_tensor({48, 512}, 0.02F);
  Tensor packed(DType::kQ4, {48, 512});
  ops::quantize(ctx, {.w = w.view(), .packed = packed.view()});
  EXPECT_LT(packing_error(w, packed), 0.01);
}

TEST(Quantize, ZerosAndMultiplesOfTheScaleAreExact) {
  ThreadPool threads(1);
  Context ctx(threads);
  Tensor w(DType::kF32, {17, 300});
  for (std::int64_t k = 0; k < 300; ++k) w.f32()[k] = 0.5F * static_cast<float>(k % 255 - 127);
  Tensor packed(DType::kQ8, {17, 300});
  ops::quantize(ctx, {.w = std::as_const(w).view(), .packed = packed.view()});
  const std::vector<float> row = unpacked(packed, 0);
  for (std::int64_t k = 0; k < 256; ++k) EXPECT_EQ(row[static_cast<std::size_t>(k)], w.f32()[k]);
  for (const DType dtype : {DType::kQ8, DType::kQ4}) {
    Tensor any(dtype, {17, 300});
    ops::quantize(ctx, {.w = std::as_const(w).view(), .packed = any.view()});
    for (const float value : unpacked(any, 16)) EXPECT_EQ(value, 0);
  }
}

TEST(Quantize, PacksTheSameBytesOnAnyNumberOfThreads) {
  Random random(3);
  ThreadPool one(1);
  ThreadPool many(4);
  Context one_ctx(one);
  Context many_ctx(many);
  const Tensor w = random.normal_tensor({100, 320});
  for (const DType dtype : {DType::kQ8, DType::kQ4}) {
    Tensor a(dtype, {100, 320});
    Tensor b(dtype, {100, 320});
    ops::quantize(one_ctx, {.w = w.view(), .packed = a.view()});
    ops::quantize(many_ctx, {.w = w.view(), .packed = b.view()});
    EXPECT_EQ(std::memcmp(a.view().data, b.view().data, a.bytes()), 0);
  }
}

TEST(Quantize, RefusesWhatIsNotFinite) {
  ThreadPool threads(1);
  Context ctx(threads);
  Tensor w(DType::kF32, {4, 64});
  w.f32()[100] = std::nanf("");
  Tensor packed(DType::kQ8, {4, 64});
  EXPECT_THROW(ops::quantize(ctx, {.w = std::as_const(w).view(), .packed = packed.view()}), Error);
}

}  // namespace
}  // namespace deltafox
