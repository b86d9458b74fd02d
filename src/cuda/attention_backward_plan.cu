// What the passes of attention's backward need of each token: running sums of the log gates, do·o,
// the keys that a query reads; and after them the log gates' gradients. Bound by memory.
#include <climits>

#include "cuda/attention_backward.cuh"

namespace deltafox::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kWarps = 4;

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Greatest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of the warp's values up to this lane's.
template <typename T, typename Combine>
__device__ T scan_warp(T value, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value = combine(before, value);
  }
  return value;
}

// Of the lanes before this one; `none` for the first.
template <typename T>
__device__ T shift_warp(T scanned, T none) {
  const T before = __shfl_up_sync(kAllLanes, scanned, 1);
  return threadIdx.x % 32 == 0 ? none : before;
}

// One warp a block and head of queries.
__global__ void gate_terms(const AttentionBackwardParams params) {
  const int block_index = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (head >= params.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const AttentionBlock block = params.blocks[block_index];
  const auto at = [&](int t) {
    return static_cast<std::int64_t>(block.row + t) * params.heads + head;
  };
  double gates[2];
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    gates[i] = params.log_gates != nullptr && t < block.count ? params.log_gates[at(t)] : 0;
  }
  const double scanned = scan_warp(gates[0] + gates[1], Sum());
  const double before = shift_warp(scanned, 0.0);
  const float sums[2] = {static_cast<float>(before + gates[0]),
                         static_cast<float>(before + gates[0] + gates[1])};
  if (lane == 31) params.gate_sums[params.block_at(head, block_index)] = scanned;
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    const std::int64_t row = params.row_at(head, block_index) + t;
    params.query_terms[row] =
        t < block.count ? (sums[i] - params.lse[at(t)]) / params.scale : -INFINITY;
    params.key_terms[row] = -sums[i] / params.scale;
  }
}

// One warp a block and head of keys.
template <typename T>
__global__ void key_norms(const AttentionBackwardParams params) {
  const int block_index = static_cast<int>(blockIdx.x);
  const int g = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (g >= params.kv_heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const AttentionBlock block = params.blocks[block_index];
  float norms[2];
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    const T* k = static_cast<const T*>(params.k) +
                 (static_cast<std::int64_t>(block.row + t) * params.kv_heads + g) * params.dim;
    norms[i] = t < block.count ? scaled_norm(k, params.dim, 1.0F) : 0;
  }
  const float scanned = scan_warp(fmaxf(norms[0], norms[1]), Greatest());
  const float before = shift_warp(scanned, 0.0F);
  if (lane == 31) params.norms_before[params.block_at(g, block_index)] = scanned;
  float* to = params.key_norms + params.row_at(g, block_index) + 2 * lane;
  to[0] = fmaxf(before, norms[0]);
  to[1] = scanned;
}

// A sequence's values become what combines those before each, or with a step of −1 those behind
// it: one warp. `values` is the first in this order.
template <typename T, typename Combine>
__device__ void combine_before(T* values, int step, int count, T none, const Combine& combine) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  T before = none;
  for (int first = 0; first < count; first += 32) {
    const int i = first + lane;
    const T scanned = scan_warp(i < count ? values[i * step] : none, combine);
    const T shifted = shift_warp(scanned, none);
    if (i < count) values[i * step] = combine(before, shifted);
    before = combine(before, __shfl_sync(kAllLanes, scanned, 31));
  }
}

__global__ void combine_blocks(const AttentionBackwardParams params) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x < 2 && params.next_turn != nullptr) {
    params.next_turn[threadIdx.x] = 0;
  }
  const AttentionSequence sequence = params.sequences[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y);
  const int count = sequence.end - sequence.first;
  combine_before(params.gate_sums + params.block_at(head, sequence.first), 1, count, 0.0, Sum());
  if (params.key_norms != nullptr && head < params.kv_heads) {
    combine_before(params.norms_before + params.block_at(head, sequence.first), 1, count, 0.0F,
                   Greatest());
  }
}

// The first block that the query reads: those before decay below the threshold, as in the forward.
template <typename T>
__device__ int first_kept_block(const AttentionBackwardParams& params, const AttentionBlock& block,
                                int block_index, int head, int t, int first_visible) {
  const int position = block.position + t;
  float bound = 0;
  if (params.score_bounds != nullptr) {
    bound = params.score_bounds[head];
  } else {
    const int g = head / params.sharing();
    const T* q = static_cast<const T*>(params.q) +
                 (static_cast<std::int64_t>(block.row + t) * params.heads + head) * params.dim;
    bound = scaled_norm(q, params.dim, params.scale) *
            fmaxf(params.norms_before[params.block_at(g, block_index)],
                  params.key_norms[params.row_at(g, block_index) + t]);
  }
  const float threshold = pruning_threshold(params.log_tolerance, bound, position);
  const double* sums = params.gate_sums + params.block_at(head, block.first);
  const double own = params.gate_sums[params.block_at(head, block_index)] -
                     params.key_terms[params.row_at(head, block_index) + t] * params.scale;
  int low = first_visible / kBlockTokens;
  int high = position / kBlockTokens;  // the query's own block is kept
  while (low < high) {
    const int middle = low + (high - low) / 2;
    // The last key of a block is its least decayed one.
    if (static_cast<float>(own - sums[middle + 1]) < threshold) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One thread a query, one thread block a block and head.
template <typename T>
__global__ void find_begins(const AttentionBackwardParams params) {
  const int block_index = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const int t = static_cast<int>(threadIdx.x);
  const AttentionBlock block = params.blocks[block_index];
  int begin = 0;
  int least = INT_MAX;
  int greatest = 0;
  if (t < block.count) {
    begin = params.window > 0 ? max(0, block.position + t + 1 - params.window) : 0;
    if (params.log_gates != nullptr && params.log_tolerance > -INFINITY) {
      const int first = first_kept_block<T>(params, block, block_index, head, t, begin);
      begin = max(begin, first * kBlockTokens);
    }
    least = begin;
    greatest = begin;
  }
  params.begins[params.row_at(head, block_index) + t] = begin;
  __shared__ int least_of[2];
  __shared__ int greatest_of[2];
  least = __reduce_min_sync(kAllLanes, least);
  greatest = __reduce_max_sync(kAllLanes, greatest);
  if (t % 32 == 0) {
    least_of[t / 32] = least;
    greatest_of[t / 32] = greatest;
  }
  __syncthreads();
  if (t == 0) {
    params.ranges[params.block_at(head, block_index)] = {min(least_of[0], least_of[1]),
                                                         max(greatest_of[0], greatest_of[1])};
  }
}

// Of float32, sixteen threads a token and head.
__global__ void find_deltas(const AttentionBackwardParams params) {
  const int block_index = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y);
  const AttentionBlock block = params.blocks[block_index];
  const int lane = static_cast<int>(threadIdx.x) % 16;
  for (int t = static_cast<int>(threadIdx.x) / 16; t < kBlockTokens;
       t += static_cast<int>(blockDim.x) / 16) {
    float sum = 0;
    if (t < block.count) {
      const std::int64_t at =
          (static_cast<std::int64_t>(block.row + t) * params.heads + head) * params.dim;
      const float* o = static_cast<const float*>(params.o) + at;
      const float* d_o = static_cast<const float*>(params.d_o) + at;
      for (int d = lane; d < params.dim; d += 16) sum += o[d] * d_o[d];
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0) params.deltas[params.row_at(head, block_index) + t] = -sum;
  }
}

// d log f_l = Σ_{i>=l} (Σ_j dS_ij − Σ_j dS_ji): scans like those of the gates, backwards. One warp
// a block and head; first the blocks' sums, then, with those behind each, the gradients.
template <bool kSumsOnly>
__global__ void scan_gate_gradients(const AttentionBackwardParams params) {
  const int block_index = static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (head >= params.heads) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int t = kBlockTokens - 2 - 2 * lane;  // the first of this lane's two
  const std::int64_t row = params.row_at(head, block_index) + t;
  const float2 of_queries = *reinterpret_cast<const float2*>(params.query_sums + row);
  const float2 of_keys = *reinterpret_cast<const float2*>(params.key_sums + row);
  const double last = static_cast<double>(of_queries.y) - of_keys.y;
  const double first = static_cast<double>(of_queries.x) - of_keys.x;
  const double scanned = scan_warp(first + last, Sum());
  double* of_block = params.gate_sums + params.block_at(head, block_index);
  if (kSumsOnly) {
    if (lane == 31) *of_block = scanned;
    return;
  }
  const AttentionBlock block = params.blocks[block_index];
  const double behind = *of_block + shift_warp(scanned, 0.0);
  const double gradients[2] = {behind + last + first, behind + last};
  for (int i = 0; i < 2; ++i) {
    if (t + i >= block.count) continue;
    params.dlog_gates[static_cast<std::int64_t>(block.row + t + i) * params.heads + head] =
        static_cast<float>(gradients[i]);
  }
}

__global__ void combine_blocks_behind(const AttentionBackwardParams params) {
  const AttentionSequence sequence = params.sequences[blockIdx.x];
  const int head = static_cast<int>(blockIdx.y);
  combine_before(params.gate_sums + params.block_at(head, sequence.end - 1), -1,
                 sequence.end - sequence.first, 0.0, Sum());
}

template <typename T>
void launch_plan(const AttentionBackwardParams& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.block_count);
  const auto heads = static_cast<unsigned>(params.heads);
  const auto kv_heads = static_cast<unsigned>(params.kv_heads);
  const dim3 of_queries(blocks, heads);
  gate_terms<<<dim3(blocks, (heads + kWarps - 1) / kWarps), kWarps * 32, 0, stream>>>(params);
  if (params.key_norms != nullptr) {
    key_norms<T>
        <<<dim3(blocks, (kv_heads + kWarps - 1) / kWarps), kWarps * 32, 0, stream>>>(params);
  }
  combine_blocks<<<dim3(static_cast<unsigned>(params.sequence_count), heads), 32, 0, stream>>>(
      params);
  find_begins<T><<<of_queries, kBlockTokens, 0, stream>>>(params);
}

}  // namespace

void launch_attention_backward_plan(const AttentionBackwardParams& params, bool bf16,
                                    cudaStream_t stream) {
  if (bf16) {
    launch_plan<__nv_bfloat16>(params, stream);
  } else {
    launch_plan<float>(params, stream);
    const dim3 grid(static_cast<unsigned>(params.block_count), static_cast<unsigned>(params.heads));
    find_deltas<<<grid, 256, 0, stream>>>(params);
  }
}

void launch_attention_backward_gates(const AttentionBackwardParams& params, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(params.heads);
  const dim3 of_blocks(static_cast<unsigned>(params.block_count), (heads + kWarps - 1) / kWarps);
  scan_gate_gradients<true><<<of_blocks, kWarps * 32, 0, stream>>>(params);
  combine_blocks_behind<<<dim3(static_cast<unsigned>(params.sequence_count), heads), 32, 0,
                          stream>>>(params);
  scan_gate_gradients<false><<<of_blocks, kWarps * 32, 0, stream>>>(params);
}

}  // namespace deltafox::cuda
