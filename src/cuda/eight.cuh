// Eight neighbouring elements of a row: 16 bytes of bfloat16, twice that of float32.
#pragma once

#include "cuda/elements.cuh"
#include "ops/activation.h"

namespace deltafox::cuda {

// A `count` below: this many of the eight elements exist, or all eight, aligned.
constexpr int kWholeEight = 9;

// Eight elements as they lie in memory: converted when they are used, so that several loads can be
// under way at once.
template <typename T>
struct Eight;

template <>
struct Eight<float> {
  float4 low;
  float4 high;

  __device__ void load(const float* from) {
    low = reinterpret_cast<const float4*>(from)[0];
    high = reinterpret_cast<const float4*>(from)[1];
  }
  __device__ void get(float (&to)[8]) const {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
  __device__ void set(const float (&from)[8]) {
    low = make_float4(from[0], from[1], from[2], from[3]);
    high = make_float4(from[4], from[5], from[6], from[7]);
  }
  __device__ static void store(float* to, const float (&from)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
  }
};

template <>
struct Eight<bf16> {
  uint4 pairs;

  __device__ void load(const bf16* from) { pairs = *reinterpret_cast<const uint4*>(from); }
  __device__ void get(float (&to)[8]) const {
    const std::uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    }
  }
  __device__ void set(const float (&from)[8]) {
    const auto pair = [&](int i) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      return reinterpret_cast<const std::uint32_t&>(both);
    };
    pairs = make_uint4(pair(0), pair(1), pair(2), pair(3));
  }
  __device__ static void store(bf16* to, const float (&from)[8]) {
    Eight eight;
    eight.set(from);
    *reinterpret_cast<uint4*>(to) = eight.pairs;
  }
};

// With zeros behind the last that exists.
template <typename T>
__device__ void load_eight(Eight<T>& to, const T* from, int count) {
  if (count == kWholeEight) {
    to.load(from);
    return;
  }
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(from[i]) : 0;
  to.set(x);  // exact
}

template <typename T>
__device__ void store_eight(T* to, const float (&from)[8], int count) {
  if (count == kWholeEight) {
    Eight<T>::store(to, from);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) from_float(to[i], from[i]);
  }
}

// kRough: to about 20 bits, plenty for what is rounded to bfloat16 and three times as fast.
template <bool kRough>
__device__ float sigmoid(float x) {
  // The rough quotient is zero where the denominator exceeds 2^126.
  return kRough ? __fdividef(1, 1 + __expf(-x)) : 1 / (1 + expf(-x));
}

// act(x) and act'(x).
template <bool kRough>
__device__ float2 activate_with_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kIdentity:
      return make_float2(x, 1);
    case Activation::kSilu: {
      const float s = sigmoid<kRough>(x);
      return make_float2(x * s, s * (1 + x * (1 - s)));
    }
    case Activation::kSigmoid: {
      const float s = sigmoid<kRough>(x);
      return make_float2(s, s * sigmoid<kRough>(-x));
    }
    case Activation::kRelu:
      return make_float2(fmaxf(x, 0), x > 0 ? 1 : 0);
    case Activation::kEluPlusOne: {
      const float e = kRough ? __expf(x) : expf(x);
      return x > 0 ? make_float2(x + 1, 1) : make_float2(e, e);
    }
  }
  return make_float2(x, 1);
}

template <bool kRough>
__device__ float activate(Activation activation, float x) {
  return activate_with_slope<kRough>(activation, x).x;
}

}  // namespace deltafox::cuda
