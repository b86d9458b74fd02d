// Loads and stores of float32 and bfloat16 elements, computed with in float32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace deltafox::cuda {

using bf16 = __nv_bfloat16;

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(bf16 x) {
  return __bfloat162float(x);
}
__device__ inline void from_float(float& to, float x) {
  to = x;
}
__device__ inline void from_float(bf16& to, float x) {
  to = __float2bfloat16(x);
}

// The `count` argument below: this many of the four elements exist, or all four, aligned.
constexpr int kVector = 5;

__device__ inline void load_four(float (&to)[4], const float* from, int count) {
  if (count == kVector) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < count ? from[i] : 0;
}

__device__ inline void load_four(float (&to)[4], const bf16* from, int count) {
  if (count == kVector) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x.y));
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < count ? to_float(from[i]) : 0;
}

__device__ inline void store_four(float* to, const float (&from)[4], int count) {
  if (count == kVector) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = from[i];
  }
}

__device__ inline void store_four(bf16* to, const float (&from)[4], int count) {
  if (count == kVector) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(from[0], from[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(from[2], from[3]);
    *reinterpret_cast<uint2*>(to) = make_uint2(reinterpret_cast<const std::uint32_t&>(low),
                                               reinterpret_cast<const std::uint32_t&>(high));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) to[i] = __float2bfloat16(from[i]);
  }
}

// How many of four columns exist; whole vectors where rows keep their alignment.
__device__ inline int count_columns(int column, int all) {
  return all % 4 == 0 && column < all ? kVector : min(max(all - column, 0), 4);
}

// Elements [first, first + kCount) of a row of `size`, zeros behind its end; `aligned` rows are
// read by the vector.
template <int kCount, typename T>
__device__ void load_part(float (&to)[kCount], const T* row, int first, int size, bool aligned) {
  static_assert(kCount % 4 == 0);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      load_four(reinterpret_cast<float(&)[4]>(to[i]), row + first + i,
                first + i < size ? kVector : 0);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = first + i < size ? to_float(row[first + i]) : 0;
}

// Rows that a loop over tokens reads next are brought to the second-level cache this many tokens
// early: a token's work is much shorter than the way from memory.
constexpr int kTokensAhead = 12;

__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// What is read once.
__device__ inline uint4 load_stream(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

__device__ inline void add_four(float (&to)[4], const float4& x) {
  to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}

}  // namespace deltafox::cuda
