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

  __device__ void load(float (&to)[4], std::int64_t i, int count) const {
    if (is_bf16) {
      load_four(to, static_cast<const bf16*>(data) + i, count);
    } else {
      load_four(to, static_cast<const float*>(data) + i, count);
    }
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

// The sum over a warp, the same in all lanes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}

}  // namespace deltafox::cuda
