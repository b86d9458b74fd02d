// Eight neighbouring channels as they lie in memory: converted when they are used, so that several
// rows can be under way at once.
#pragma once

#include "cuda/elements.cuh"

namespace deltafox::cuda {

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
  __device__ static void store(float* to, const float (&from)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
  }
};

template <>
struct Eight<bf16> {
  __nv_bfloat162 pairs[4];

  __device__ void load(const bf16* from) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    pairs[0] = reinterpret_cast<const __nv_bfloat162&>(x.x);
    pairs[1] = reinterpret_cast<const __nv_bfloat162&>(x.y);
    pairs[2] = reinterpret_cast<const __nv_bfloat162&>(x.z);
    pairs[3] = reinterpret_cast<const __nv_bfloat162&>(x.w);
  }
  __device__ void get(float (&to)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(pairs[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
  __device__ static void store(bf16* to, const float (&from)[8]) {
    uint4 x;
    const auto pair = [&](int i) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      return reinterpret_cast<const unsigned&>(both);
    };
    x.x = pair(0), x.y = pair(1), x.z = pair(2), x.w = pair(3);
    *reinterpret_cast<uint4*>(to) = x;
  }
};

}  // namespace deltafox::cuda
