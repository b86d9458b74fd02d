// Launches of the delta rule's kernels on raw pointers; delta_rule.cu chooses among them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "core/context.h"
#include "cuda/sequence_batch.h"
#include "ops/delta_mixer.h"

namespace deltafox::cuda {

// Up to so many values a head, chunks compute the norm of outputs too.
constexpr int kNormedValues = 128;

struct DeltaRuleProblem {
  const void* q = nullptr;     // [T, H, K]
  const void* k = nullptr;     // [T, H, K]
  const void* v = nullptr;     // [T, H, V]
  const void* beta = nullptr;  // [T, H] float32, or null for β = 1
  void* o = nullptr;           // [T, H, V]
  bool is_bf16 = false;        // q, k, v, o: bfloat16 instead of float32
  int heads = 0;
  int key_dim = 0;
  int value_dim = 0;
  const float* norm = nullptr;  // [V]: o ← rms_norm(o) · norm, in chunks only; or null
  float norm_eps = 0;
};

// The recurrence itself, row by row, in float32: any head sizes up to K = 256. The exact mode, and
// the way of single tokens, where reading and writing the states is all the work: `single_rows`
// says that every sequence has one row.
void launch_delta_rule_recurrent(const DeltaRuleProblem& problem, const SequenceBatch& batch,
                                 bool single_rows, cudaStream_t stream);

// Chunks of 64 rows on the tensor cores: bfloat16, K and V multiples of 8, K at most 128; a
// sequence in several segments needs V at most 128 too.
bool delta_rule_chunks_fit(const DeltaRuleProblem& problem);

// Into how many segments the forward cuts a sequence: a function of its own length, the heads, the
// card and the bucket of all tokens, a power of two; so within a bucket what else is in a batch
// changes no bit.
int delta_rule_segments_of(const DeltaRuleProblem& problem, int length, int tokens_bucket,
                           int multiprocessors);

// The same for the backward, of whole sequences: a function of its own length, the heads and the
// card, so that what else is in a batch changes no bit.
int delta_rule_segments(const DeltaRuleProblem& problem, int length, int multiprocessors);

// Workspace bytes for the state maps of all segments but each sequence's last.
std::size_t delta_rule_maps_bytes(const DeltaRuleProblem& problem, int maps);

// Few chunks, by three kernels that are parallel over chunks or over values: bfloat16, K = V = 128,
// on sm_90. Whether that is how a sequence is read is a function of what delta_rule_segments_of
// reads.
bool delta_rule_scans(const DeltaRuleProblem& problem, int length, int tokens_bucket,
                      int multiprocessors);
std::size_t delta_rule_scan_bytes(const DeltaRuleProblem& problem, const SequenceBatch& batch);
// Whether its first kernel may compute what these would give; all sequences being scanned, in one
// batch.
bool delta_rule_scan_takes(Context& ctx, const DeltaInputsArgs& inputs);
// With `inputs` q, k, v and beta are not there yet: of them it writes q and beta only, and asks for
// `next`, weights of the next product.
void launch_delta_rule_scan(Context& ctx, const DeltaRuleProblem& problem,
                            const SequenceBatch& batch, void* workspace,
                            const DeltaInputsArgs* inputs, const ConstTensorView& next);

void launch_delta_rule_chunks(Context& ctx, const DeltaRuleProblem& problem,
                              const SequenceBatch& batch, float* maps);

// The joins of the backward, states in order and their gradients against it. K' is K rounded up to
// 64 or 128.
//   maps    [maps, H, 128 + K', K']: Nᵀ and Mᵀ of S ← M S + N over each segment but a sequence's
//           last; Nᵀ becomes the transposed state behind the segment
//   d_maps  [maps, H, 128, K']: N'ᵀ of dS ← Mᵀ dS + N' over each segment but a sequence's first; it
//           becomes the transposed gradient of the state before the segment
void launch_delta_rule_joins(Context& ctx, const DeltaRuleProblem& problem,
                             const SequenceBatch& batch, float* maps, float* d_maps);

struct DeltaRuleBackwardProblem {
  const void* q = nullptr;      // [T, H, K]
  const void* k = nullptr;      // [T, H, K]
  const void* v = nullptr;      // [T, H, V]
  const float* beta = nullptr;  // [T, H], or null for β = 1
  const void* d_o = nullptr;    // [T, H, V]
  void* dq = nullptr;           // [T, H, K]
  void* dk = nullptr;           // [T, H, K]
  void* dv = nullptr;           // [T, H, V]
  float* dbeta = nullptr;       // [T, H], or null
  bool is_bf16 = false;         // all but beta and dbeta: bfloat16 instead of float32
  int heads = 0;
  int key_dim = 0;
  int value_dim = 0;
};

// What the exact backward keeps between its passes. Chunks are those of all entries of a batch, in
// order: an entry has a segment for each of its chunks.
struct DeltaRuleBackwardWorkspace {
  float* errors = nullptr;    // [T, H, V]: v − S₋ᵀk
  float* d_errors = nullptr;  // [T, H, V]: their gradients over β, dSᵀk
  float* states = nullptr;    // [chunks, H, K, V]: before each chunk
  float* d_states = nullptr;  // [chunks, H, K, V]: gradient of the state behind each chunk
};

// In float32 throughout, for any head sizes up to K = 256.
void launch_delta_rule_backward_plain(const DeltaRuleBackwardProblem& problem,
                                      const DeltaRuleBackwardWorkspace& workspace,
                                      const SequenceBatch& batch, cudaStream_t stream);

// In chunks on the tensor cores of sm_90: bfloat16, K and V multiples of 8, at most 128.
bool delta_rule_backward_chunks_fit(const DeltaRuleBackwardProblem& problem);

// Into how many segments it cuts a sequence.
int delta_rule_backward_segments(const DeltaRuleBackwardProblem& problem, int length,
                                 int multiprocessors);

// Workspace bytes for a batch.
std::size_t delta_rule_backward_chunks_bytes(const DeltaRuleBackwardProblem& problem,
                                             const SequenceBatch& batch);

void launch_delta_rule_backward_chunks(Context& ctx, const DeltaRuleBackwardProblem& problem,
                                       const SequenceBatch& batch, void* workspace);

}  // namespace deltafox::cuda
