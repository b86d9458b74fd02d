// What the kernels of attention's backward share. See ops/forgetting_attention.h for the equations.
//
// Tokens are cut into blocks of 64 of one sequence. With c the running sums of the log gates and
// c_B that before block B, the weight of query i and key j is 2^e,
//   e = (q_i·k_j + x_i + y_j) log₂e / √D + (c_I − c_J) log₂e,
//   x_i = (c_i − c_I − lse_i) √D,  y_j = (c_J − c_j) √D,
// I and J their blocks: no large numbers cancel, and weights need no maxima of scores.
//
// Two passes visit the blocks' pairs. A thread block of Pass::kKeys owns keys and goes by the
// queries that read them: dk, dv and Σ_i dS_ij. One of Pass::kQueries owns queries and goes by the
// keys that they read: dq and Σ_j dS_ij. So every sum has one owner and one order. What a pass
// owns are its rows, what it goes by its columns.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/attention_kernels.cuh"

namespace deltafox::cuda {

constexpr int kBlockTokens = kPageTokens;
constexpr float kLog2E = 1.4426950408889634F;

enum class Pass { kKeys, kQueries };

// Successive tokens of a sequence: 64, or fewer at its end.
struct AttentionBlock {
  std::int32_t row;       // of the packed batch
  std::int32_t count;     // tokens
  std::int32_t position;  // of the first
  std::int32_t first;     // blocks of its sequence: [first, end)
  std::int32_t end;
};

struct AttentionSequence {
  std::int32_t row;  // of the packed batch
  std::int32_t length;
  std::int32_t first;  // blocks: [first, end)
  std::int32_t end;
};

// The rows of a thread block: one block or two successive ones of a sequence.
struct AttentionRows {
  std::int32_t block;
  std::int32_t count;
};

// Per-token arrays of the workspace have R = 64 · block_count rows, those behind a sequence's end
// without effect: their x is −∞.
struct AttentionBackwardParams {
  const void* q;           // [T, H, D]
  const void* k;           // [T, G, D]
  const void* v;           // [T, G, D]
  const void* o;           // [T, H, D]
  const void* d_o;         // [T, H, D]
  const float* lse;        // [T, H]
  const float* log_gates;  // [T, H] or null
  void* dq;                // [T, H, D], =
  void* dk;                // [T, G, D], =
  void* dv;                // [T, G, D], =
  float* dlog_gates;       // [T, H], =; null without gates

  std::int32_t heads;         // H
  std::int32_t kv_heads;      // G
  std::int32_t dim;           // D
  std::int32_t window;        // positions a query sees; 0: all
  float scale;                // 1 / √D
  float log_tolerance;        // infinitely low without pruning
  const float* score_bounds;  // [H] in device memory, or null

  const AttentionSequence* sequences;  // [sequence_count]
  std::int32_t sequence_count;
  const AttentionBlock* blocks;  // [block_count]
  std::int32_t block_count;

  // Workspace.
  double* gate_sums;     // [H, block_count]: of each block, then c_B; last, of the gradients
  float* query_terms;    // [H, R]: x
  float* key_terms;      // [H, R]: y
  float* deltas;         // [H, R]: −do·o
  float* key_norms;      // [G, R]: the greatest of the block so far; null if not needed
  float* norms_before;   // [G, block_count]: the greatest of each block, then of all before it
  std::int32_t* begins;  // [H, R]: the first key of a query
  GroupRange* ranges;    // [H, block_count]
  float* query_sums;     // [H, R]: Σ_j dS_ij
  float* key_sums;       // [H, R]: Σ_i dS_ij

  // Of bfloat16: rows of the inputs, ordered for the tensor cores.
  std::byte* q_tiles;               // [H, block_count, tile]
  std::byte* k_tiles;               // [G, block_count, tile]
  std::byte* v_tiles;               // [G, block_count, tile]
  std::byte* d_o_tiles;             // [H, block_count, tile]
  const AttentionRows* key_rows;    // [rows_count], the longest first
  const AttentionRows* query_rows;  // [rows_count], the longest first
  std::int32_t rows_count;
  std::int32_t* next_turn;  // [2], zeroed by the plan

  __host__ __device__ std::int64_t rows() const {
    return static_cast<std::int64_t>(block_count) * kBlockTokens;
  }
  __host__ __device__ int sharing() const { return heads / kv_heads; }
  __device__ std::int64_t row_at(int head, int block) const {
    return head * rows() + static_cast<std::int64_t>(block) * kBlockTokens;
  }
  __device__ std::int64_t block_at(int head, int block) const {
    return static_cast<std::int64_t>(head) * block_count + block;
  }
  // (c_I − c_J) log₂e
  __device__ float decay(int head, int query_block, int key_block) const {
    return static_cast<float>(gate_sums[block_at(head, query_block)] -
                              gate_sums[block_at(head, key_block)]) *
           kLog2E;
  }
};

// Whether some query of a block reads some key of a block, and whether not all do.
struct BlockPair {
  bool read;
  bool masked;
  // `range` of the queries, `first` block of the sequence.
  __device__ BlockPair(const GroupRange& range, int query_block, int key_block, int first) {
    const int key = (key_block - first) * kBlockTokens;
    read = key_block <= query_block && range.first < key + kBlockTokens;
    masked = key_block == query_block || key < range.all_begun;
  }
};

// What the passes read of the workspace; of bfloat16 but for the tiles and deltas.
void launch_attention_backward_plan(const AttentionBackwardParams& params, bool bf16,
                                    cudaStream_t stream);
void launch_attention_backward_f32(const AttentionBackwardParams& params, cudaStream_t stream);
// The log gates' gradients from both sums.
void launch_attention_backward_gates(const AttentionBackwardParams& params, cudaStream_t stream);

// Bytes of 64 rows for the tensor cores, and the blocks that a thread block owns.
std::int64_t attention_tile_bytes(std::int64_t dim);
constexpr int attention_row_blocks(bool sm90) {
  return sm90 ? 2 : 1;
}
void launch_attention_backward_bf16(const AttentionBackwardParams& params, bool sm90,
                                    int multiprocessors, cudaStream_t stream);

}  // namespace deltafox::cuda
