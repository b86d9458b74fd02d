// Finds the keys that each query reads: one thread a query, one block a tile and head.
#include <climits>

#include "cuda/attention_kernels.cuh"

namespace deltafox::cuda {
namespace {

// The first page that the query at `position` reads: those before decay below the threshold.
template <typename T>
__device__ int first_kept_page(const AttentionParams& params, const KvSequence& sequence, int row,
                               int head, int position, int first_visible) {
  const float threshold = pruning_threshold<T>(params, sequence, row, head, position);
  const std::byte* own = sequence.page(position / kPageTokens);
  int low = first_visible / kPageTokens;
  int high = position / kPageTokens;  // the query's own page is kept
  while (low < high) {
    const int middle = low + (high - low) / 2;
    // The last key of a page is its least decayed one.
    const float decay = decay_between(own, sequence.page(middle), params.layout, head,
                                      position % kPageTokens, kPageTokens - 1);
    if (decay < threshold) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
__global__ void plan(AttentionParams params) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *params.next_turn = 0;
  const AttentionTile tile = params.tiles[blockIdx.x];
  const KvSequence sequence = params.sequences[tile.sequence];
  const int head = static_cast<int>(blockIdx.y);
  const int r = static_cast<int>(threadIdx.x);
  int least = INT_MAX;
  int greatest = 0;
  if (r < tile.count) {
    const int position = tile.position + r;
    int begin = params.window > 0 ? max(0, position + 1 - params.window) : 0;
    if (params.layout.gate_heads > 0 && params.log_tolerance > -INFINITY) {
      const int page = first_kept_page<T>(params, sequence, tile.row + r, head, position, begin);
      begin = max(begin, page * kPageTokens);
    }
    params.begins[static_cast<std::int64_t>(head) * params.tokens + tile.row + r] = begin;
    least = begin;
    greatest = begin;
  }
  __shared__ int least_of[8];
  __shared__ int greatest_of[8];
  least = __reduce_min_sync(~0U, least);
  greatest = __reduce_max_sync(~0U, greatest);
  if (r % 32 == 0) {
    least_of[r / 32] = least;
    greatest_of[r / 32] = greatest;
  }
  __syncthreads();
  if (r % kQueryGroup == 0) {
    const int w = r / 32;
    const int groups = static_cast<int>(blockDim.x) / kQueryGroup;
    params.ranges[(blockIdx.x * params.heads + head) * groups + r / kQueryGroup] = {
        min(least_of[w], least_of[w + 1]), max(greatest_of[w], greatest_of[w + 1])};
  }
}

}  // namespace

void launch_attention_plan(const AttentionParams& params, bool bf16, int tile_rows,
                           cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(params.tile_count), static_cast<unsigned>(params.heads));
  if (bf16) {
    plan<__nv_bfloat16><<<grid, tile_rows, 0, stream>>>(params);
  } else {
    plan<float><<<grid, tile_rows, 0, stream>>>(params);
  }
}

}  // namespace deltafox::cuda
