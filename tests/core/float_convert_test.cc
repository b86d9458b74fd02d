// Conversions between float32, bfloat16 and half, against their definitions.
#include "core/float_convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace deltafox {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A format of one sign bit, `exponent_bits` and `mantissa_bits`, by the IEEE definition.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);

  std::uint16_t infinity() const {
    return static_cast<std::uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  }
  bool is_nan(std::uint16_t bits) const { return (bits & 0x7fff) > infinity(); }
  // The value of a finite pattern.
  double value(std::uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int significand = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
    const double magnitude = std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
};

class FloatConvert : public testing::TestWithParam<Format> {};

TEST_P(FloatConvert, WideningIsExactForEveryPattern) {
  const Format& format = GetParam();
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float wide = format.widen(bits);
    ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0) << i;
    if (format.is_nan(bits)) {
      ASSERT_TRUE(std::isnan(wide)) << i;
    } else if ((bits & 0x7fff) == format.infinity()) {
      ASSERT_TRUE(std::isinf(wide)) << i;
    } else {
      ASSERT_EQ(static_cast<double>(wide), format.value(bits)) << i;
    }
  }
}

TEST_P(FloatConvert, NarrowingUndoesWideningForEveryPattern) {
  const Format& format = GetParam();
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const std::uint16_t back = format.narrow(format.widen(bits));
    if (format.is_nan(bits)) {
      ASSERT_TRUE(format.is_nan(back)) << i;
      ASSERT_EQ(back & 0x8000, bits & 0x8000) << i;
    } else {
      ASSERT_EQ(back, bits) << i;
    }
  }
}

// Between neighbours the halfway point goes to the even one and everything else to the nearer; at
// the top, to infinity from half a step beyond the largest finite value.
TEST_P(FloatConvert, NarrowingRoundsToNearestEvenBetweenAllNeighbours) {
  const Format& format = GetParam();
  for (std::uint16_t low = 0; low < format.infinity(); ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const bool top = high == format.infinity();
    const double step = top ? format.value(low) - format.value(static_cast<std::uint16_t>(low - 1))
                            : format.value(high) - format.value(low);
    const auto middle = static_cast<float>(format.value(low) + step / 2);
    ASSERT_EQ(static_cast<double>(middle), format.value(low) + step / 2) << low;
    for (const float sign : {1.0f, -1.0f}) {
      const auto signed_bits = [&](std::uint16_t bits) {
        return static_cast<std::uint16_t>(sign < 0 ? bits | 0x8000 : bits);
      };
      ASSERT_EQ(format.narrow(sign * middle), signed_bits(low % 2 == 0 ? low : high)) << low;
      ASSERT_EQ(format.narrow(sign * std::nextafter(middle, 0.0f)), signed_bits(low)) << low;
      ASSERT_EQ(format.narrow(sign * std::nextafter(middle, kInfinity)), signed_bits(high)) << low;
    }
  }
}

TEST_P(FloatConvert, NarrowingSaturatesToInfinityAndKeepsEveryNan) {
  const Format& format = GetParam();
  EXPECT_EQ(format.narrow(std::numeric_limits<float>::max()), format.infinity());
  EXPECT_EQ(format.narrow(kInfinity), format.infinity());
  for (int bit = 0; bit < 23; ++bit) {  // a payload of low bits only must not become infinity
    EXPECT_TRUE(format.is_nan(format.narrow(std::bit_cast<float>(0x7f800000U | (1U << bit)))));
    EXPECT_TRUE(format.is_nan(format.narrow(std::bit_cast<float>(0xff800000U | (1U << bit)))));
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, FloatConvert,
                         testing::Values(Format{8, 7, bf16_to_f32, f32_to_bf16},
                                         Format{5, 10, f16_to_f32, f32_to_f16}),
                         [](const auto& format) {
                           return format.param.exponent_bits == 8 ? "BF16" : "F16";
                         });

TEST(FloatConvertViews, ConvertEveryPairOfDTypes) {
  // Exact in all three.
  const std::vector<float> values{0, -1, 0.5, 240, -0.015625, 3};
  const Shape shape{static_cast<std::int64_t>(values.size())};
  const std::vector<DType> dtypes{DType::kF32, DType::kBF16, DType::kF16};
  Tensor source(DType::kF32, shape);
  std::copy(values.begin(), values.end(), source.f32());
  for (const DType from : dtypes) {
    Tensor a(from, shape);
    convert(source.view(), a.view());
    for (const DType to : dtypes) {
      Tensor b(to, shape);
      convert(a.view(), b.view());
      for (std::size_t i = 0; i < values.size(); ++i) {
        EXPECT_EQ(load_f32(b.view(), static_cast<std::int64_t>(i)), values[i]);
      }
    }
    std::vector<float> middle(3);
    to_f32(a.view(), 2, middle);
    EXPECT_EQ(middle, (std::vector<float>{0.5, 240, -0.015625}));
  }
}

}  // namespace
}  // namespace deltafox
