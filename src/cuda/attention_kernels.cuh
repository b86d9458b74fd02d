// What the attention kernels share. See ops/forgetting_attention.h for the equations.
//
// forgetting_attention() of several tokens runs in two steps. The plan finds for each query and
// head the first key that it reads (window, pruning), and for each 64 queries the first and the
// greatest of these. Then one thread block (of sm_80 and of float32) or one turn of a persistent
// thread block (sm_90) attends for a tile of successive queries of one head, from the newest keys
// to the oldest, so that the running maximum settles at once. A query of one token has kernels of
// its own, which split the keys (attention_decode.cu). A query masks exactly what it does not see
// or skips, and tiles lie where the sequence's own call puts them: neighbours change nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/context.h"
#include "cuda/kv_pages.cuh"
#include "ops/activation.h"

namespace deltafox::cuda {

constexpr int kQueryGroup = 64;  // queries of a warpgroup or of a thread block

struct AttentionTile {
  std::int32_t sequence;
  std::int32_t row;       // of the packed batch
  std::int32_t position;  // of this row
  std::int32_t count;     // queries
};

// Keys that some of a query group's queries read.
struct GroupRange {
  std::int32_t first;      // the least first key of its queries
  std::int32_t all_begun;  // the greatest: from here on all read, as far as causality goes
};

struct AttentionParams {
  const void* q = nullptr;                // [T, H, D]
  void* o = nullptr;                      // [T, H, D]
  float* lse = nullptr;                   // [T, H] or null
  const KvSequence* sequences = nullptr;  // [B], in device memory
  KvPageLayout layout;
  std::int32_t heads = 0;   // H
  std::int32_t window = 0;  // positions a query sees; 0: all
  float scale = 0;          // 1 / √D

  // Pruning; infinitely low without.
  float log_tolerance = 0;
  const float* score_bounds = nullptr;  // [H] in device memory, or null

  // Queries of several tokens.
  const AttentionTile* tiles = nullptr;  // [tile_count], in device memory, the longest first
  std::int32_t tile_count = 0;
  std::int32_t heads_per_turn = 0;    // heads whose keys fit the L2 cache together; divides H
  std::int32_t tokens = 0;            // T
  std::int32_t* begins = nullptr;     // [H, T], written by the plan
  GroupRange* ranges = nullptr;       // [tile_count, H, tile / 64], written by the plan
  std::int32_t* next_turn = nullptr;  // [1], zeroed by the plan

  // Queries of one token.
  const std::int32_t* single = nullptr;  // [single_count] sequences
  std::int32_t single_count = 0;
  std::int32_t max_splits = 0;                  // of the longest sequence, as far as there is room
  float* partials = nullptr;                    // [single_count, H, max_splits, kDim + 2]
  std::int32_t* arrivals = nullptr;             // [single_count, H], zero before and after
  const std::int32_t* recorded_runs = nullptr;  // see Context
  // What a finished head goes through: o = act(gate) · norm(o).
  const float* output_norm = nullptr;  // [H·D] or null
  float output_norm_eps = 0;
  const float* output_gate = nullptr;  // [T, H·D] or null
  Activation output_gate_activation = Activation::kIdentity;
  bool dependent = false;  // launched while the kernel before it ends

  __device__ int kv_head(int h) const { return h / (heads / layout.kv_heads); }
  // The turns' order: heads in groups whose keys stay in the L2 cache, within these long tiles
  // first.
  __device__ void tile_of(int turn, int& tile, int& head) const {
    const int per_group = tile_count * heads_per_turn;
    const int within = turn % per_group;
    tile = within / heads_per_turn;
    head = turn / per_group * heads_per_turn + within % heads_per_turn;
  }
};

// Rows of a tile.
constexpr int attention_tile_rows(int kdim, bool sm90) {
  return !sm90 ? 64 : kdim == 128 ? 128 : 192;
}

void launch_attention_plan(const AttentionParams& params, bool bf16, int tile_rows,
                           cudaStream_t stream);
void launch_attention_f32(const AttentionParams& params, cudaStream_t stream);
void launch_attention_bf16_sm80(const AttentionParams& params, cudaStream_t stream);
void launch_attention_bf16_sm90(const AttentionParams& params, int multiprocessors,
                                cudaStream_t stream);
void launch_attention_decode(Context& ctx, const AttentionParams& params, bool bf16);
// That with the scratch memory it needs: `single` is all that it attends for.
void attend_to_last(Context& ctx, AttentionParams params, bool bf16);

// How far a log gates' sum falls from behind token `key` of page `keys` up to token `query` of
// `queries`: a difference of sums kept in two parts.
__device__ inline float decay_between(const std::byte* queries, const std::byte* keys,
                                      const KvPageLayout& layout, int head, int query, int key) {
  const auto part = [](const std::byte* page, std::int64_t offset, int token) {
    return reinterpret_cast<const float*>(page + offset)[token];
  };
  const std::int64_t high = layout.gates(head);
  const std::int64_t low = layout.low_gates(head);
  return (part(queries, high, query) - part(keys, high, key)) +
         (part(queries, low, query) - part(keys, low, key));
}

template <typename T>
__device__ inline float scaled_norm(const T* x, int size, float scale) {
  float squares = 0;
  for (int d = 0; d < size; ++d) {
    const float scaled = static_cast<float>(x[d]) * scale;
    squares += scaled * scaled;
  }
  return sqrtf(squares);
}

// The decay below which a query with scores of at most `bound` skips a page.
__device__ inline float pruning_threshold(float log_tolerance, float bound, int position) {
  return log_tolerance - 2 * bound - logf(static_cast<float>(position + 1));
}

template <typename T>
__device__ inline float pruning_threshold(const AttentionParams& params, const KvSequence& sequence,
                                          int row, int head, int position) {
  float bound = 0;
  if (params.score_bounds != nullptr) {
    bound = params.score_bounds[head];
  } else {
    const int dim = params.layout.dim;
    const T* q = static_cast<const T*>(params.q) +
                 (static_cast<std::int64_t>(row) * params.heads + head) * dim;
    const auto* norms = reinterpret_cast<const float*>(sequence.page(position / kPageTokens) +
                                                       params.layout.norms(params.kv_head(head)));
    bound = scaled_norm(q, dim, params.scale) * norms[position % kPageTokens];
  }
  return pruning_threshold(params.log_tolerance, bound, position);
}

// Stores ln Σ_j e^s_ij of a tile's query, given relative to the decay of the tile's first query.
__device__ inline void store_lse(const AttentionParams& params, const AttentionTile& tile, int row,
                                 int head, float relative) {
  if (params.lse == nullptr) return;
  float decay = 0;
  if (params.layout.gate_heads > 0) {
    const KvSequence& sequence = params.sequences[tile.sequence];
    const int position = tile.position + row;
    decay = decay_between(sequence.page(position / kPageTokens),
                          sequence.page(tile.position / kPageTokens), params.layout, head,
                          position % kPageTokens, tile.position % kPageTokens);
  }
  params.lse[static_cast<std::int64_t>(tile.row + row) * params.heads + head] = relative + decay;
}

}  // namespace deltafox::cuda
