// Launches of GLA's and the state space's kernels on raw pointers. Activations (q, v, o; xbc, y)
// are bfloat16 or float32, all else is float32.
#pragma once

#include <cuda_runtime_api.h>

#include "core/context.h"
#include "cuda/sequence_batch.h"
#include "ops/gla.h"

namespace deltafox::cuda {

constexpr int kLargestStateRows = 256;

struct GlaProblem {
  const void* q;   // [T, H, K]
  const float* k;  // [T, H, K]
  const float* g;  // [T, H, K]
  const void* v;   // [T, H, V]
  void* o;         // [T, H, V]
  bool is_bf16;
  int heads;
  int key_dim;
  int value_dim;
};

// Row by row.
void launch_gla(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch);

// One row of each sequence, from what the projections give; see GlaStepArgs.
struct GlaStepProblem {
  const float* q;  // [B, H, K]
  const float* f;  // [B, H, K]
  const float* v;  // [B, H, V]
  float* o;        // [B, H, V]
  int heads;
  int key_dim;
  int value_dim;
};
void launch_gla_step(Context& ctx, const GlaStepProblem& problem, const SequenceBatch& batch);

// Chunks of kDecayedChunk rows, all of a sequence's at once; they are its segments in the batch.
constexpr int kDecayedChunk = 32;
void launch_gla_chunks(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch);
void launch_gla_backward_f32(Context& ctx, const GlaBackwardArgs& args);

// Chunks of kGlaBf16Chunk rows on the tensor cores, for activations in bfloat16.
constexpr int kGlaBf16Chunk = 64;
bool gla_bf16_fits(int key_dim, int value_dim);
void launch_gla_bf16(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch);
void launch_gla_backward_bf16(Context& ctx, const GlaBackwardArgs& args);

struct SsdProblem {
  const void* xbc;       // [T, H·P + 2·G·N]
  const float* dt;       // [T, H]
  const float* dt_bias;  // [H]
  const float* a_log;    // [H]
  const float* d;        // [H]
  void* y;               // [T, H, P]
  float dt_min;
  float dt_max;
  bool is_bf16;
  int heads;
  int groups;
  int state_size;            // N
  int head_dim;              // P
  const float* z = nullptr;  // [T, H, P]: y · silu(z) takes the place of y, row by row only
};

// Row by row.
void launch_ssd(Context& ctx, const SsdProblem& problem, const SequenceBatch& batch);

// Chunks of 64 rows on the tensor cores: bfloat16, P a multiple of 64, N one of 8 up to 128.
bool ssd_chunks_fit(const SsdProblem& problem);

// Into how many segments a sequence is cut: a function of its own length, the heads, the card and
// the bucket of all tokens, a power of two; so within a bucket what else is in a batch changes no
// bit.
int ssd_segments(const SsdProblem& problem, int length, int tokens_bucket, int multiprocessors);

// Memory of sequences in several segments.
struct SsdSegments {
  float* states = nullptr;  // [segments, H, N, P]
  float* decays = nullptr;  // [segments, H]
};

void launch_ssd_chunks(const SsdProblem& problem, const SsdSegments& segments,
                       const SequenceBatch& batch, cudaStream_t stream);

}  // namespace deltafox::cuda
