// What the kernels of src/cpu share, compiled once for each instruction set by foreach_target.
//
// Vectors have up to 16 lanes. Rows whose length is not a multiple of that end in a partial vector:
// loads beyond the end read zeros, and stores write only what is inside.
#if defined(DELTAFOX_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DELTAFOX_CPU_SIMD_INL_H_
#undef DELTAFOX_CPU_SIMD_INL_H_
#else
#define DELTAFOX_CPU_SIMD_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/tensor.h"
#include "ops/activation.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 16>;
using VF32 = hn::Vec<F32>;
constexpr F32 kF32;

inline std::int64_t lanes() {
  return static_cast<std::int64_t>(hn::Lanes(kF32));
}

// Reads rows of a weight matrix as float32.
HWY_INLINE VF32 load(const float* p) {
  return hn::LoadU(kF32, p);
}
HWY_INLINE VF32 load(const hwy::bfloat16_t* p) {
  const hn::Rebind<std::uint16_t, F32> narrow;
  const hn::Rebind<std::uint32_t, F32> wide;
  const auto bits = hn::LoadU(narrow, reinterpret_cast<const std::uint16_t*>(p));
  return hn::BitCast(kF32, hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
}
HWY_INLINE VF32 load(const hwy::float16_t* p) {
  const hn::Rebind<hwy::float16_t, F32> narrow;
  return hn::PromoteTo(kF32, hn::LoadU(narrow, p));
}

// Instruction sets without masks touch whole vectors, aligned ones, whatever the mask says: there
// the ends of rows go through a buffer.
#if HWY_TARGET <= HWY_AVX2
constexpr bool kHasMasks = true;
#else
constexpr bool kHasMasks = false;
#endif

// The first n < lanes() elements at p, then zeros.
template <typename T>
HWY_INLINE VF32 load_first(const T* p, std::int64_t n) {
  if constexpr (kHasMasks && std::is_same_v<T, float>) {
    return hn::MaskedLoad(hn::FirstN(kF32, static_cast<std::size_t>(n)), kF32, p);
  } else {
    HWY_ALIGN T buffer[16] = {};
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
}
HWY_INLINE void store(VF32 v, float* p) {
  hn::StoreU(v, kF32, p);
}
HWY_INLINE void store_first(VF32 v, float* p, std::int64_t n) {
  if constexpr (kHasMasks) {
    hn::BlendedStore(v, hn::FirstN(kF32, static_cast<std::size_t>(n)), kF32, p);
  } else {
    HWY_ALIGN float buffer[16];
    store(v, buffer);
    for (std::int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
}

HWY_INLINE float sum_of(VF32 v) {
  return hn::GetLane(hn::SumOfLanes(kF32, v));
}

// f(i, n) for each vector of a row of `size` elements: n = lanes(), or what is left at the end.
// Called with two functions so that the whole vectors take no masks.
template <typename Whole, typename Rest>
HWY_INLINE void for_row(std::int64_t size, Whole&& whole, Rest&& rest) {
  std::int64_t i = 0;
  for (; i + lanes() <= size; i += lanes()) whole(i);
  if (i < size) rest(i, size - i);
}

// f(i, load_vector, store_vector) for each vector of a row: the functions read and write what the
// row has there.
template <typename F>
HWY_INLINE void for_vectors(std::int64_t size, F&& f) {
  for_row(
      size,
      [&](std::int64_t i) HWY_ATTR {
        f(
            i, [](const float* p) HWY_ATTR { return load(p); },
            [](VF32 v, float* p) HWY_ATTR { store(v, p); });
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        f(
            i, [n](const float* p) HWY_ATTR { return load_first(p, n); },
            [n](VF32 v, float* p) HWY_ATTR { store_first(v, p, n); });
      });
}

// e^x for x ≤ 0, to 2⁻²³ or so; zero where it is below the normal numbers, NaN of NaN.
HWY_INLINE VF32 exp_of_negative(VF32 x) {
  // Added to a number, it leaves that rounded in the low bits, and -127 to 0 shifted to the
  // exponent.
  const VF32 rounding = hn::Set(kF32, 12582912.0f);  // 1.5 · 2²³
  const VF32 biased = hn::MulAdd(x, hn::Set(kF32, 1.44269504f), rounding);
  const VF32 power = hn::Sub(biased, rounding);                      // of two
  VF32 rest = hn::NegMulAdd(power, hn::Set(kF32, 0.693145752f), x);  // log 2 in two parts
  rest = hn::NegMulAdd(power, hn::Set(kF32, 1.42860677e-6f), rest);
  VF32 y = hn::Set(kF32, 0.00139261759f);
  y = hn::MulAdd(y, rest, hn::Set(kF32, 0.00836317334f));
  y = hn::MulAdd(y, rest, hn::Set(kF32, 0.0416665561f));
  y = hn::MulAdd(y, rest, hn::Set(kF32, 0.166665778f));
  y = hn::MulAdd(y, rest, hn::Set(kF32, 0.5f));
  y = hn::MulAdd(y, rest, hn::Set(kF32, 1.0f));
  y = hn::MulAdd(y, rest, hn::Set(kF32, 1.0f));
  const hn::RebindToSigned<F32> bits;
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(bits, biased));
  y = hn::BitCast(kF32, hn::Add(hn::BitCast(bits, y), exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(kF32, -87.33f)), y);
}

// Through e^-|x|, which cannot overflow.
HWY_INLINE VF32 sigmoid(VF32 x) {
  const VF32 one = hn::Set(kF32, 1.0f);
  const VF32 e = exp_of_negative(hn::Neg(hn::Abs(x)));
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(kF32)), e, one), hn::Add(one, e));
}

// log(1 + e^x)
HWY_INLINE VF32 softplus(VF32 x) {
  const VF32 rest = hn::Log1p(kF32, hn::Exp(kF32, hn::Neg(hn::Abs(x))));
  return hn::Add(hn::Max(x, hn::Zero(kF32)), rest);
}

HWY_INLINE VF32 activate(Activation activation, VF32 x) {
  switch (activation) {
    case Activation::kIdentity:
      return x;
    case Activation::kSilu:
      return hn::Mul(x, sigmoid(x));
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kRelu:
      return hn::Max(x, hn::Zero(kF32));
    case Activation::kEluPlusOne:
      return hn::IfThenElse(hn::Gt(x, hn::Zero(kF32)), hn::Add(x, hn::Set(kF32, 1.0f)),
                            hn::Exp(kF32, hn::Min(x, hn::Zero(kF32))));
  }
  return x;
}

// Of several vectors, which need not wait for one another.
template <std::size_t kVectors>
HWY_INLINE void activate_all(Activation activation, VF32 (&x)[kVectors]) {
  if (activation == Activation::kSilu) {
    for (VF32& v : x) v = activate(Activation::kSilu, v);
  } else {
    for (VF32& v : x) v = activate(activation, v);
  }
}

// The derivative of activate.
HWY_INLINE VF32 activation_slope(Activation activation, VF32 x) {
  const VF32 one = hn::Set(kF32, 1.0f);
  switch (activation) {
    case Activation::kIdentity:
      return one;
    case Activation::kSilu: {
      const VF32 s = sigmoid(x);
      return hn::Mul(s, hn::MulAdd(x, sigmoid(hn::Neg(x)), one));
    }
    case Activation::kSigmoid:
      return hn::Mul(sigmoid(x), sigmoid(hn::Neg(x)));
    case Activation::kRelu:
      return hn::IfThenElseZero(hn::Gt(x, hn::Zero(kF32)), one);
    case Activation::kEluPlusOne:
      return hn::Exp(kF32, hn::Min(x, hn::Zero(kF32)));
  }
  return one;
}

// Σ x²
HWY_INLINE float sum_of_squares(const float* x, std::int64_t size) {
  VF32 sum = hn::Zero(kF32);
  for_row(
      size,
      [&](std::int64_t i) {
        const VF32 v = load(x + i);
        sum = hn::MulAdd(v, v, sum);
      },
      [&](std::int64_t i, std::int64_t n) {
        const VF32 v = load_first(x + i, n);
        sum = hn::MulAdd(v, v, sum);
      });
  return sum_of(sum);
}

// y = x · scale [· w], x's mean square being one behind that but for eps; y may be x.
HWY_INLINE void normalize(const float* x, const float* w, float eps, float* y, std::int64_t size) {
  const float mean = sum_of_squares(x, size) / static_cast<float>(size);
  const VF32 scale = hn::Set(kF32, 1 / std::sqrt(mean + eps));
  for_vectors(size, [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    store_vector(hn::Mul(hn::Mul(load_vector(x + i), scale), load_vector(w + i)), y + i);
  });
}

// What an L2 norm (ops/activation.h) multiplies by, of Σ x².
inline float l2_scale(float squares) {
  return 1 / std::sqrt(squares + 1e-6f);
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
