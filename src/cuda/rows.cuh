// Views of float32 or bfloat16 elements for kernels that memory bounds: the dtype is looked at as
// they run, the same for all threads, so that one kernel serves all combinations.
#pragma once

#include "core/tensor.h"
#include "cuda/elements.cuh"
#include "ops/activation.h"

namespace deltafox::cuda {

struct Elements {
  void* data;
  bool is_bf16;

  __host__ __device__ Elements(const void* elements, bool of_bf16)
      : data(const_cast<void*>(elements)), is_bf16(of_bf16) {}
  explicit Elements(const TensorView& view)
      : data(view.data), is_bf16(view.dtype == DType::kBF16) {}
  explicit Elements(const ConstTensorView& view)
      : data(const_cast<void*>(view.data)), is_bf16(view.dtype == DType::kBF16) {}

  // Whether every fourth element starts a whole vector.
  bool aligned() const { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

  __device__ float get(std::int64_t i) const {
    return is_bf16 ? to_float(static_cast<const bf16*>(data)[i])
                   : static_cast<const float*>(data)[i];
  }
  __device__ void put(std::int64_t i, float x) const {
    if (is_bf16) {
      from_float(static_cast<bf16*>(data)[i], x);
    } else {
      static_cast<float*>(data)[i] = x;
    }
  }
  __device__ void load(float (&to)[4], std::int64_t i, int count) const {
    if (is_bf16) {
      load_four(to, static_cast<const bf16*>(data) + i, count);
    } else {
      load_four(to, static_cast<const float*>(data) + i, count);
    }
  }
  // Four elements as they lie in memory: nothing waits for a load before it is widened, so several
  // can be under way.
  __device__ uint4 fetch(std::int64_t i, int count) const {
    if (count == kVector) {
      if (!is_bf16) return *reinterpret_cast<const uint4*>(static_cast<const float*>(data) + i);
      const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(data) + i);
      return make_uint4(bits.x, bits.y, 0, 0);
    }
    float x[4];
    load(x, i, count);
    uint4 bits = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                            __float_as_uint(x[3]));
    if (is_bf16) {  // exact: these are bfloat16 widened
      bits = make_uint4(bits.x >> 16 | bits.y, bits.z >> 16 | bits.w, 0, 0);
    }
    return bits;
  }
  __device__ void widen(float (&to)[4], const uint4& bits) const {
    to[0] = __uint_as_float(is_bf16 ? bits.x << 16 : bits.x);
    to[1] = __uint_as_float(is_bf16 ? bits.x & 0xffff0000U : bits.y);
    to[2] = __uint_as_float(is_bf16 ? bits.y << 16 : bits.z);
    to[3] = __uint_as_float(is_bf16 ? bits.y & 0xffff0000U : bits.w);
  }
  __device__ void store(const float (&from)[4], std::int64_t i, int count) const {
    if (is_bf16) {
      store_four(static_cast<bf16*>(data) + i, from, count);
    } else {
      store_four(static_cast<float*>(data) + i, from, count);
    }
  }
};

__device__ inline float sigmoid(float x) {
  return 1 / (1 + expf(-x));
}

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kIdentity:
      return x;
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kRelu:
      return fmaxf(x, 0);
    case Activation::kEluPlusOne:
      return x > 0 ? x + 1 : expf(x);
  }
  return x;
}

// act'(x)
__device__ inline float activation_slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kIdentity:
      return 1;
    case Activation::kSilu: {
      const float s = sigmoid(x);
      return s * (1 + x * (1 - s));
    }
    case Activation::kSigmoid:
      return sigmoid(x) * sigmoid(-x);
    case Activation::kRelu:
      return x > 0 ? 1 : 0;
    case Activation::kEluPlusOne:
      return x > 0 ? 1 : expf(x);
  }
  return 1;
}

// The sum over a warp, the same in all lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

}  // namespace deltafox::cuda
