// The loss and its gradient in place of the logits: one block a row. Rows of up to kKeptBytes stay
// in shared memory between the pass that finds the softmax's sum and the one that writes, so that
// memory sees them once; longer ones are read again, mostly from the second-level cache.
#include <algorithm>

#include "core/context.h"
#include "cuda/check.h"
#include "cuda/elements.cuh"
#include "cuda/stream.h"
#include "ops/cross_entropy.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 4;                                    // vectors of a thread under way
constexpr std::int64_t kKeptBytes = std::int64_t{104} << 10;  // two blocks a multiprocessor

template <typename T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// Rounded to bfloat16 afterwards, about 20 bits are plenty.
template <typename T>
__device__ float exponential(float x) {
  return sizeof(T) == 2 ? __expf(x) : expf(x);
}

template <typename T>
__device__ void widen(float (&to)[kWidth<T>], const uint4& bits) {
  const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(words[i]);
    } else {
      to[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000U);
    }
  }
}

__device__ uint4 narrow(const float (&from)[4]) {
  return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                    __float_as_uint(from[3]));
}
__device__ uint4 narrow(const float (&from)[8]) {
  const auto pair = [&](int i) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    return reinterpret_cast<const std::uint32_t&>(both);
  };
  return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

// Σ e^(x − max) and max of some logits.
template <typename T>
struct Softmax {
  float max = -INFINITY;
  float sum = 0;

  __device__ void add(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max);
    if (both == -INFINITY) return;
    sum = sum * exponential<T>(max - both) + other_sum * exponential<T>(other_max - both);
    max = both;
  }
  template <int kCount>
  __device__ void add(const float (&x)[kCount]) {
    float most = max;
#pragma unroll
    for (const float value : x) most = fmaxf(most, value);
    if (most == -INFINITY) return;
    sum *= exponential<T>(max - most);
#pragma unroll
    for (const float value : x) sum += exponential<T>(value - most);
    max = most;
  }
};

// The block's, the same in all threads.
template <typename T>
__device__ Softmax<T> block_softmax(Softmax<T> own) {
  __shared__ float2 parts[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float max = __shfl_xor_sync(0xffffffff, own.max, offset);
    const float sum = __shfl_xor_sync(0xffffffff, own.sum, offset);
    own.add(max, sum);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = make_float2(own.max, own.sum);
  __syncthreads();
  Softmax<T> all;
#pragma unroll
  for (const float2& part : parts) all.add(part.x, part.y);
  return all;
}

struct Params {
  void* logits;
  const std::int32_t* labels;
  float* loss;
  std::int64_t stride;
  int classes;
  int vectors;  // that lie whole in a row
  float scale;
};

template <typename T, bool kKept>
__global__ void __launch_bounds__(kThreads) cross_entropy_backward_kernel(const Params p) {
  extern __shared__ uint4 kept[];
  const int thread = static_cast<int>(threadIdx.x);
  T* row = static_cast<T*>(p.logits) + static_cast<std::int64_t>(blockIdx.x) * p.stride;
  auto* vectors = reinterpret_cast<uint4*>(row);
  const int label = p.labels[blockIdx.x];
  const float label_logit = label < 0 ? 0 : to_float(row[label]);
  const int tail = p.vectors * kWidth<T>;  // elements from here on are taken one by one
  Softmax<T> own;
  for (int v = thread; v < p.vectors; v += kThreads * kAtOnce) {
    uint4 bits[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (v + i * kThreads < p.vectors) bits[i] = vectors[v + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (v + i * kThreads >= p.vectors) break;
      if constexpr (kKept) kept[v + i * kThreads] = bits[i];
      float x[kWidth<T>];
      widen<T>(x, bits[i]);
      own.add(x);
    }
  }
  for (int n = tail + thread; n < p.classes; n += kThreads) own.add(to_float(row[n]), 1);
  const Softmax<T> all = block_softmax(own);  // behind its barrier the row may be overwritten
  if (thread == 0) p.loss[blockIdx.x] = label < 0 ? 0 : all.max - label_logit + logf(all.sum);
  const float factor = label < 0 ? 0 : p.scale / all.sum;
  const float at_label = label < 0 ? 0 : p.scale;
  const auto gradient = [&](float x, int n) {
    return factor * exponential<T>(x - all.max) - (n == label ? at_label : 0);
  };
#pragma unroll kAtOnce
  for (int v = thread; v < p.vectors; v += kThreads) {
    float x[kWidth<T>];
    widen<T>(x, kKept ? kept[v] : vectors[v]);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) x[e] = gradient(x[e], v * kWidth<T> + e);
    vectors[v] = narrow(x);
  }
  for (int n = tail + thread; n < p.classes; n += kThreads) {
    from_float(row[n], gradient(to_float(row[n]), n));
  }
}

template <typename T, bool kKept>
void launch_as(Context& ctx, const Params& p, unsigned rows) {
  const auto kernel = cross_entropy_backward_kernel<T, kKept>;
  const std::size_t shared = kKept ? static_cast<std::size_t>(p.vectors) * sizeof(uint4) : 0;
  if (kKept) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kKeptBytes)),
          "cudaFuncSetAttribute");
  }
  kernel<<<rows, kThreads, shared, stream_of(ctx)>>>(p);
  check_launch("cross_entropy_backward");
}

template <typename T>
void launch(Context& ctx, Params p, unsigned rows) {
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(p.logits) % 16 == 0 && p.stride % kWidth<T> == 0;
  p.vectors = aligned ? p.classes / kWidth<T> : 0;
  if (static_cast<std::int64_t>(p.vectors) * 16 <= kKeptBytes) {
    launch_as<T, true>(ctx, p, rows);
  } else {
    launch_as<T, false>(ctx, p, rows);
  }
}

}  // namespace

void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args) {
  if (args.labels.empty()) return;
  const std::int64_t columns = args.logits.shape[1];
  const Params p{.logits = args.logits.data,
                 .labels = args.labels.data(),
                 .loss = args.loss.data(),
                 .stride = columns,
                 .classes = static_cast<int>(args.classes == 0 ? columns : args.classes),
                 .vectors = 0,
                 .scale = args.scale};
  const auto rows = static_cast<unsigned>(args.labels.size());
  if (args.logits.dtype == DType::kBF16) {
    launch<bf16>(ctx, p, rows);
  } else {
    launch<float>(ctx, p, rows);
  }
}

}  // namespace deltafox::cuda
