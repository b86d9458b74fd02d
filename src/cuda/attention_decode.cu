// Forgetting attention of one token a sequence. The keys are split at multiples of kSplitKeys of
// their position, whatever the batch, so a query gets the same bits beside any neighbours. A thread
// block takes one split of one head, a warp one page of it: it reads the page's keys and values
// once, 16 bytes a lane. The last block of a head to finish adds the splits up, oldest first.
#include "cuda/attention_kernels.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = kSplitKeys / kPageTokens;
constexpr float kMinusInfinity = -INFINITY;

// 16 bytes as floats.
template <typename T>
struct Chunk;
template <>
struct Chunk<float> {
  static constexpr int kSize = 4;
  __device__ static void widen(const uint4& chunk, float (&to)[4]) {
    to[0] = __uint_as_float(chunk.x);
    to[1] = __uint_as_float(chunk.y);
    to[2] = __uint_as_float(chunk.z);
    to[3] = __uint_as_float(chunk.w);
  }
};
template <>
struct Chunk<__nv_bfloat16> {
  static constexpr int kSize = 8;
  __device__ static void widen(const uint4& chunk, float (&to)[8]) {
    const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    }
  }
};

template <int kDim>
struct Shared {
  float query[kDim];
  float weights[kWarps][kPageTokens];
  float max[kWarps];
  float sum[kWarps];
  float o[kWarps][kDim];
  bool last;
};

// A load that the compiler leaves where it stands, of memory that is read once.
__device__ inline uint4 load_chunk(const std::byte* from) {
  uint4 chunk;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
               : "l"(from));
  return chunk;
}

// A page's part of the softmax: the greatest score, the sum of weights relative to it, and in
// shared.o the weighted sum of values. Chunks are loaded in batches of kBatch a lane, each before
// the one before it is used, the first of the values before the scores are known.
template <typename T, int kDim>
class Page {
 public:
  __device__ Page(const AttentionParams& params, const KvSequence& sequence, int p, int head)
      : page_(sequence.page(p)),
        keys_(page_ + params.layout.keys(params.kv_head(head))),
        values_(page_ + params.layout.values(params.kv_head(head))) {}

  __device__ void attend(const AttentionParams& params, const KvSequence& sequence, int p, int head,
                         int position, int begin, Shared<kDim>& shared) {
    uint4 chunks[2][kBatch];
    load_keys(chunks[0], 0);
    float decays[kSize] = {};
    if (params.layout.gate_heads > 0) {
      const std::byte* own = sequence.page(position / kPageTokens);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        decays[j] = decay_between(own, page_, params.layout, head, position % kPageTokens,
                                  lane_ % kKeyChunks * kSize + j);
      }
    }
    float s[kSize] = {};
#pragma unroll
    for (int batch = 0; batch < kKeyBatches; ++batch) {
      if (batch + 1 < kKeyBatches) {
        load_keys(chunks[(batch + 1) % 2], batch + 1);
      } else {
        load_values(chunks[(batch + 1) % 2], 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float k[kSize];
        Chunk<T>::widen(chunks[batch % 2][i], k);
        const float q = shared.query[key_dim(batch * kBatch + i)];
#pragma unroll
        for (int j = 0; j < kSize; ++j) s[j] += q * k[j];
      }
    }
    weigh(s, decays, p, position, begin, shared);

    float o[kSize] = {};
#pragma unroll
    for (int batch = 0; batch < kValueBatches; ++batch) {
      const int now = (kKeyBatches + batch) % 2;
      if (batch + 1 < kValueBatches) load_values(chunks[1 - now], batch + 1);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float v[kSize];
        Chunk<T>::widen(chunks[now][i], v);
        const float weight = shared.weights[warp_][value_token(batch * kBatch + i)];
#pragma unroll
        for (int j = 0; j < kSize; ++j) o[j] += weight * v[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
#pragma unroll
      for (int step = kValueChunks; step < 32; step *= 2) {
        o[j] += __shfl_xor_sync(~0U, o[j], step);
      }
      if (lane_ < kValueChunks) shared.o[warp_][lane_ * kSize + j] = o[j];
    }
  }

 private:
  static constexpr int kSize = Chunk<T>::kSize;
  // A lane adds up every kKeyLanes-th dimension of kSize keys, then every kValueLanes-th token of
  // kSize dimensions.
  static constexpr int kKeyChunks = kPageTokens / kSize;
  static constexpr int kKeyLanes = 32 / kKeyChunks;
  static constexpr int kValueChunks = kDim / kSize;
  static constexpr int kValueLanes = 32 / kValueChunks;
  static constexpr int kChunks = kDim / kKeyLanes;  // of a lane; of values as many
  static_assert(kChunks == kPageTokens / kValueLanes);
  static constexpr int kBatch = kChunks < 16 ? kChunks : 16;
  static constexpr int kKeyBatches = kChunks / kBatch;
  static constexpr int kValueBatches = kKeyBatches;

  __device__ int key_dim(int i) const {
    return i * kKeyLanes + lane_ / kKeyChunks;
  }
  __device__ int value_token(int i) const {
    return i * kValueLanes + lane_ / kValueChunks;
  }
  __device__ void load_keys(uint4 (&to)[kBatch], int batch) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[i] = load_chunk(keys_ + key_chunk<T>(key_dim(batch * kBatch + i), lane_ % kKeyChunks));
    }
  }
  __device__ void load_values(uint4 (&to)[kBatch], int batch) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[i] = load_chunk(
          values_ + value_chunk<T, kDim>(value_token(batch * kBatch + i), lane_ % kValueChunks));
    }
  }

  __device__ void weigh(float (&s)[kSize], const float (&decays)[kSize], int p, int position,
                        int begin, Shared<kDim>& shared) const {
    const int c = lane_ % kKeyChunks;
    float max = kMinusInfinity;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
#pragma unroll
      for (int step = kKeyChunks; step < 32; step *= 2) s[j] += __shfl_xor_sync(~0U, s[j], step);
      const int key = p * kPageTokens + c * kSize + j;
      s[j] = key > position || key < begin ? kMinusInfinity : s[j] + decays[j];
      max = fmaxf(max, s[j]);
    }
#pragma unroll
    for (int step = 1; step < kKeyChunks; step *= 2) {
      max = fmaxf(max, __shfl_xor_sync(~0U, max, step));
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float weight = expf(s[j] - max);
      sum += weight;
      if (lane_ < kKeyChunks) shared.weights[warp_][c * kSize + j] = weight;
    }
#pragma unroll
    for (int step = 1; step < kKeyChunks; step *= 2) sum += __shfl_xor_sync(~0U, sum, step);
    if (lane_ == 0) {
      shared.max[warp_] = max;
      shared.sum[warp_] = sum;
    }
    __syncwarp();
  }

  const std::byte* page_;
  const std::byte* keys_;
  const std::byte* values_;
  int lane_ = static_cast<int>(threadIdx.x) % 32;
  int warp_ = static_cast<int>(threadIdx.x) / 32;
};

// Stores dimension `d` of a head, which thread d holds; all threads of the block take part.
template <typename T>
__device__ void store_output(const AttentionParams& params, int head, std::int64_t row, int d,
                             float x) {
  const int dim = params.layout.dim;
  const bool exists = d < dim;
  const std::int64_t column = static_cast<std::int64_t>(head) * dim + d;
  if (params.output_norm != nullptr) {
    __shared__ float squares[kWarps];
    const float of_warp = warp_sum(exists ? x * x : 0);
    if (d % 32 == 0) squares[d / 32] = of_warp;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w];
    if (exists) {
      x = x / sqrtf(sum / static_cast<float>(dim) + params.output_norm_eps) *
          params.output_norm[column];
    }
  }
  if (!exists) return;
  if (params.output_gate != nullptr) {
    x *= activate(params.output_gate_activation, params.output_gate[row * dim + d]);
  }
  static_cast<T*>(params.o)[row * dim + d] = static_cast<T>(x);
}

// Whether the gates alone make the page's keys nothing to the query.
template <typename T>
__device__ bool pruned(const AttentionParams& params, const KvSequence& sequence, int p, int head,
                       int position) {
  if (params.layout.gate_heads == 0 || !(params.log_tolerance > kMinusInfinity)) return false;
  if (p == position / kPageTokens) return false;
  const float decay = decay_between(sequence.page(position / kPageTokens), sequence.page(p),
                                    params.layout, head, position % kPageTokens, kPageTokens - 1);
  return decay < pruning_threshold<T>(params, sequence, sequence.row, head, position);
}

template <typename T, int kDim>
__global__ __launch_bounds__(kWarps *
                             32) void decode(const __grid_constant__ AttentionParams params) {
  __shared__ Shared<kDim> shared;
  if (params.dependent) wait_for_input();
  const int index = static_cast<int>(blockIdx.z);
  const int head = static_cast<int>(blockIdx.y);
  KvSequence sequence = params.sequences[params.single[index]];
  sequence.advance(params.recorded_runs);
  const int position = sequence.length - 1;
  const int begin = params.window > 0 ? max(0, position + 1 - params.window) : 0;
  const int first_split = begin / kSplitKeys;
  const int splits = position / kSplitKeys - first_split + 1;
  const int split = static_cast<int>(blockIdx.x);
  if (split >= splits) return;

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int dim = params.layout.dim;
  const std::int64_t row = static_cast<std::int64_t>(sequence.row) * params.heads + head;
  for (int d = thread; d < kDim; d += kWarps * 32) {
    shared.query[d] =
        d < dim ? static_cast<float>(static_cast<const T*>(params.q)[row * dim + d]) * params.scale
                : 0;
  }
  __syncthreads();
  const int p = (first_split + split) * kWarps + warp;
  const bool seen = p * kPageTokens <= position && (p + 1) * kPageTokens > begin;
  if (seen && !pruned<T>(params, sequence, p, head, position)) {
    Page<T, kDim>(params, sequence, p, head)
        .attend(params, sequence, p, head, position, begin, shared);
  } else if (thread % 32 == 0) {
    shared.max[warp] = kMinusInfinity;
  }
  __syncthreads();

  // The split's part.
  float max = kMinusInfinity;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) max = fmaxf(max, shared.max[w]);
  float sum = 0;
  float factors[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factors[w] = shared.max[w] == kMinusInfinity ? 0.0F : expf(shared.max[w] - max);
    if (factors[w] > 0) sum += factors[w] * shared.sum[w];
  }
  const auto value = [&](int d) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (factors[w] > 0) x += factors[w] * shared.o[w][d];
    }
    return x;
  };
  static_assert(kDim <= kWarps * 32);
  if (splits == 1) {
    return store_output<T>(params, head, row, thread, thread < dim ? value(thread) / sum : 0);
  }
  const std::int64_t at = static_cast<std::int64_t>(index) * params.heads + head;
  float* partials = params.partials + at * params.max_splits * (kDim + 2);
  float* own = partials + split * (kDim + 2);
  for (int d = thread; d < kDim; d += kWarps * 32) own[d] = value(d);
  if (thread == 0) {
    own[kDim] = max;
    own[kDim + 1] = sum;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    shared.last = atomicAdd(&params.arrivals[at], 1) == splits - 1;
    if (shared.last) params.arrivals[at] = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  float greatest = kMinusInfinity;
  for (int i = 0; i < splits; ++i) {
    greatest = fmaxf(greatest, __ldcg(partials + i * (kDim + 2) + kDim));
  }
  float total = 0;
  float x = 0;
  for (int i = 0; i < splits; ++i) {
    const float* part = partials + i * (kDim + 2);
    const float factor = expf(__ldcg(part + kDim) - greatest);
    total += factor * __ldcg(part + kDim + 1);
    if (thread < kDim) x += factor * __ldcg(part + thread);
  }
  store_output<T>(params, head, row, thread, x / total);
}

template <typename T, int kDim>
void launch(Context& ctx, const AttentionParams& params) {
  const dim3 grid(static_cast<unsigned>(params.max_splits), static_cast<unsigned>(params.heads),
                  static_cast<unsigned>(params.single_count));
  if (params.dependent) {
    return launch_dependent(ctx, "attention", decode<T, kDim>, grid, kWarps * 32, 0, params);
  }
  decode<T, kDim><<<grid, kWarps * 32, 0, stream_of(ctx)>>>(params);
  check_launch("attention");
}

template <typename T>
void launch(Context& ctx, const AttentionParams& params) {
  switch (padded_dim(params.layout.dim)) {
    case 32:
      return launch<T, 32>(ctx, params);
    case 64:
      return launch<T, 64>(ctx, params);
    default:
      return launch<T, 128>(ctx, params);
  }
}

}  // namespace

void launch_attention_decode(Context& ctx, const AttentionParams& params, bool bf16) {
  bf16 ? launch<__nv_bfloat16>(ctx, params) : launch<float>(ctx, params);
}

}  // namespace deltafox::cuda
