// The delta rule's gradients in float32 (the equations are in ops/delta_rule.h), in three passes:
//
// 1. `walk_tokens` forwards: the recurrence, which keeps each token's error x = v − S₋ᵀk and the
//    state before every chunk of 64 tokens.
// 2. `walk_tokens` backwards: the same for dS, whose columns do not depend on one another either;
//    it keeps each token's dr = dSᵀk and the gradient of the state behind every chunk.
// 3. `chunk_gradients`, all chunks at once: with U = diag(β) X, dE = diag(β) dR and dO over √K,
//      dQ = dO Sᵀ + tril(dO Uᵀ) K,  dβ_t = dR_t · X_t
//      dK = U dSᵀ + tril(dO Uᵀ)ᵀ Q − dE Sᵀ − M K − Mᵀ K,  M = tril(dE Uᵀ, −1)
#include <cmath>

#include "cuda/check.h"
#include "cuda/decayed_recurrence.cuh"
#include "cuda/delta_rule_kernels.h"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kChunk = 64;

struct BackwardParams {
  Elements q, k, v, d_o, dq, dk, dv;
  const float* beta;
  float* dbeta;
  DeltaRuleBackwardWorkspace workspace;
  float scale;  // 1 / √K
  int heads, keys, values;
  SequenceBatch batch;

  __device__ float beta_at(std::ptrdiff_t row) const { return beta != nullptr ? beta[row] : 1; }
};

template <int kRows>
__device__ void load_rows(float (&to)[kRows], const Elements& from, std::ptrdiff_t row, int first,
                          int size) {
#pragma unroll
  for (int i = 0; i < kRows; i += 4) {
    from.load(reinterpret_cast<float(&)[4]>(to[i]), row * size + first + i,
              count_columns(first + i, size));
  }
}

// What a token brings to a thread.
template <int kRows, bool kReverse>
struct Token {
  float k[kRows];
  float q[kRows];       // backwards
  float value_side[4];  // v, or backwards d_o
  float beta;

  __device__ void load(const BackwardParams& p, std::ptrdiff_t row, int first_row, int column) {
    load_rows(k, p.k, row, first_row, p.keys);
    if (kReverse) load_rows(q, p.q, row, first_row, p.keys);
    (kReverse ? p.d_o : p.v)
        .load(value_side, row * p.values + column, count_columns(column, p.values));
    beta = p.beta_at(row);
  }
};

// A block owns 32 columns of one head's state, laid out as in decayed_recurrence.cuh.
template <int kRows, bool kReverse>
__global__ void __launch_bounds__(kRecurrenceThreads)
    walk_tokens(const __grid_constant__ BackwardParams p) {
  __shared__ float4 parts[2][kRecurrenceWarps][kRecurrenceColumns / 4];
  const BatchEntry& entry = p.batch.entries[blockIdx.z];
  const int head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int group = lane % (kRecurrenceColumns / 4);
  const int column = blockIdx.x * kRecurrenceColumns + group * 4;
  const int row_group = threadIdx.x / (kRecurrenceColumns / 4);
  const int columns = count_columns(column, p.values);
  float* states = kReverse ? p.workspace.d_states : p.workspace.states;
  float* errors = kReverse ? p.workspace.d_errors : p.workspace.errors;
  const auto token_at = [&](int step) { return kReverse ? entry.length - 1 - step : step; };
  const auto row_at = [&](int t) {
    return static_cast<std::ptrdiff_t>(entry.begin + t) * p.heads + head;
  };

  StateColumns<kRows> state = {};
  Token<kRows, kReverse> next;
  next.load(p, row_at(token_at(0)), row_group * kRows, column);
  for (int step = 0; step < entry.length; ++step) {
    const int t = token_at(step);
    const std::ptrdiff_t row = row_at(t);
    const Token<kRows, kReverse> token = next;
    if (step + 1 < entry.length) {
      next.load(p, row_at(token_at(step + 1)), row_group * kRows, column);
    }
    if (kReverse ? step == 0 || t % kChunk == kChunk - 1 : t % kChunk == 0) {
      const std::ptrdiff_t chunk = entry.first_block + t / kChunk;
      state.store(states + (chunk * p.heads + head) * p.keys * p.values, p.keys, p.values,
                  row_group, column);
    }
    float recalled[4] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (kReverse) state.s[i][j] += token.q[i] * (p.scale * token.value_side[j]);
        recalled[j] += state.s[i][j] * token.k[i];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) recalled[j] = sum_row_groups(recalled[j]);
    const int buffer = step % 2;
    if (lane < kRecurrenceColumns / 4) {
      parts[buffer][threadIdx.x / 32][group] =
          make_float4(recalled[0], recalled[1], recalled[2], recalled[3]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j) recalled[j] = 0;
#pragma unroll
    for (int w = 0; w < kRecurrenceWarps; ++w) add_four(recalled, parts[buffer][w][group]);
    float error[4];
    float update[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      error[j] = kReverse ? recalled[j] : token.value_side[j] - recalled[j];
      update[j] = token.beta * error[j];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        state.s[i][j] += (kReverse ? -token.k[i] : token.k[i]) * update[j];
      }
    }
    if (row_group == 0) {
      store_four(errors + row * p.values + column, error, columns);
      if (kReverse) p.dv.store(update, row * p.values + column, columns);
    }
  }
}

constexpr int kGradientThreads = 256;
constexpr int kSlice = 16;           // columns in shared memory at a time
constexpr int kStride = kSlice + 1;  // apart, so that a column's rows lie in different banks
constexpr int kRowsOfThread = 4;     // of the chunk
constexpr int kScoreColumns = 4;     // of a thread
using Slice = float[kChunk][kStride];

// Columns [first, first + 16) of `valid` rows, zeros elsewhere.
template <int kRows>
__device__ void load_slice(float (&to)[kRows][kStride], const Elements& from, std::ptrdiff_t begin,
                           std::ptrdiff_t stride, int valid, int first, int size,
                           float factor = 1) {
  const int row = threadIdx.x / 4;
  const int column = threadIdx.x % 4 * 4;
  if (row >= kRows) return;
  float x[4];
  from.load(x, begin + row * stride + first + column,
            row < valid ? count_columns(first + column, size) : 0);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[row][column + j] = factor * x[j];
}

// A block owns one chunk of one head; a thread four rows of it and every sixteenth column.
__global__ void __launch_bounds__(kGradientThreads)
    chunk_gradients(const __grid_constant__ BackwardParams p) {
  __shared__ Slice d_o_slice;  // or k
  __shared__ Slice x_slice;    // or q
  __shared__ Slice d_r_slice;
  __shared__ float states[2][kSlice][kStride];  // S, dS
  __shared__ float queries[kChunk][kChunk];     // tril(dO Uᵀ)
  __shared__ float updates[kChunk][kChunk];     // M
  const int head = blockIdx.x;
  int sequence = 0;
  while (sequence + 1 < p.batch.count &&
         p.batch.entries[sequence + 1].first_block <= static_cast<int>(blockIdx.y)) {
    ++sequence;
  }
  const BatchEntry& entry = p.batch.entries[sequence];
  const int first_token = (static_cast<int>(blockIdx.y) - entry.first_block) * kChunk;
  const int rows = min(kChunk, entry.length - first_token);
  const std::ptrdiff_t first_row =
      static_cast<std::ptrdiff_t>(entry.begin + first_token) * p.heads + head;
  const auto load_keys = [&](Slice& to, const Elements& from, int first) {
    load_slice(to, from, first_row * p.keys, static_cast<std::ptrdiff_t>(p.heads) * p.keys, rows,
               first, p.keys);
  };
  const auto load_values = [&](Slice& to, const Elements& from, int first, float factor = 1) {
    load_slice(to, from, first_row * p.values, static_cast<std::ptrdiff_t>(p.heads) * p.values,
               rows, first, p.values, factor);
  };
  const Elements errors(p.workspace.errors, false);
  const Elements d_errors(p.workspace.d_errors, false);

  const int column = threadIdx.x % kSlice;
  const int row = threadIdx.x / kSlice * kRowsOfThread;
  const auto beta_at = [&](int r) {
    return r < rows ? p.beta_at(first_row + static_cast<std::ptrdiff_t>(r) * p.heads) : 0.0F;
  };
  float beta[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) beta[i] = beta_at(row + i);

  float d_o_x[kRowsOfThread][kScoreColumns] = {};
  float d_r_x[kRowsOfThread][kScoreColumns] = {};
  for (int first = 0; first < p.values; first += kSlice) {
    __syncthreads();
    load_values(d_o_slice, p.d_o, first, p.scale);
    load_values(x_slice, errors, first);
    load_values(d_r_slice, d_errors, first);
    __syncthreads();
    for (int j = 0; j < kSlice; ++j) {
#pragma unroll
      for (int c = 0; c < kScoreColumns; ++c) {
        const float x = x_slice[column + c * kSlice][j];
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
          d_o_x[i][c] += d_o_slice[row + i][j] * x;
          d_r_x[i][c] += d_r_slice[row + i][j] * x;
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kScoreColumns; ++c) {
    const int s = column + c * kSlice;
    const float beta_s = beta_at(s);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int t = row + i;
      queries[t][s] = s <= t ? d_o_x[i][c] * beta_s : 0;
      updates[t][s] = s < t ? beta[i] * d_r_x[i][c] * beta_s : 0;
      if (s == t && t < rows && p.dbeta != nullptr) {
        p.dbeta[first_row + static_cast<std::ptrdiff_t>(t) * p.heads] = d_r_x[i][c];
      }
    }
  }

  const std::ptrdiff_t state = (static_cast<std::ptrdiff_t>(blockIdx.y) * p.heads + head) * p.keys *
                               static_cast<std::ptrdiff_t>(p.values);
  for (int first_key = 0; first_key < p.keys; first_key += kSlice) {
    float dq[kRowsOfThread] = {};
    float dk[kRowsOfThread] = {};
    for (int first = 0; first < p.values; first += kSlice) {
      __syncthreads();
      load_values(d_o_slice, p.d_o, first, p.scale);
      load_values(x_slice, errors, first);
      load_values(d_r_slice, d_errors, first);
      const std::ptrdiff_t begin = state + static_cast<std::ptrdiff_t>(first_key) * p.values;
      load_slice(states[0], Elements(p.workspace.states, false), begin, p.values,
                 p.keys - first_key, first, p.values);
      load_slice(states[1], Elements(p.workspace.d_states, false), begin, p.values,
                 p.keys - first_key, first, p.values);
      __syncthreads();
      for (int j = 0; j < kSlice; ++j) {
        const float s = states[0][column][j];
        const float ds = states[1][column][j];
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
          dq[i] += d_o_slice[row + i][j] * s;
          dk[i] += x_slice[row + i][j] * ds - d_r_slice[row + i][j] * s;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) dk[i] *= beta[i];
    __syncthreads();
    load_keys(d_o_slice, p.k, first_key);
    load_keys(x_slice, p.q, first_key);
    __syncthreads();
    for (int s = 0; s < kChunk; ++s) {
      const float k = d_o_slice[s][column];
      const float q = x_slice[s][column];
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int t = row + i;
        dq[i] += queries[t][s] * k;
        dk[i] += queries[s][t] * q - (updates[t][s] + updates[s][t]) * k;
      }
    }
    const int key = first_key + column;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      if (row + i >= rows || key >= p.keys) continue;
      const std::ptrdiff_t to =
          (first_row + static_cast<std::ptrdiff_t>(row + i) * p.heads) * p.keys + key;
      p.dq.store({dq[i], 0, 0, 0}, to, 1);
      p.dk.store({dk[i], 0, 0, 0}, to, 1);
    }
  }
}

template <int kRows>
void launch_walks(const BackwardParams& params, cudaStream_t stream) {
  const dim3 grid((params.values + kRecurrenceColumns - 1) / kRecurrenceColumns, params.heads,
                  params.batch.count);
  walk_tokens<kRows, false><<<grid, kRecurrenceThreads, 0, stream>>>(params);
  check_launch("delta_rule_backward");
  walk_tokens<kRows, true><<<grid, kRecurrenceThreads, 0, stream>>>(params);
  check_launch("delta_rule_backward");
}

}  // namespace

void launch_delta_rule_backward_plain(const DeltaRuleBackwardProblem& problem,
                                      const DeltaRuleBackwardWorkspace& workspace,
                                      const SequenceBatch& batch, cudaStream_t stream) {
  const auto elements = [&](const void* data) { return Elements(data, problem.is_bf16); };
  const BackwardParams params{.q = elements(problem.q),
                              .k = elements(problem.k),
                              .v = elements(problem.v),
                              .d_o = elements(problem.d_o),
                              .dq = elements(problem.dq),
                              .dk = elements(problem.dk),
                              .dv = elements(problem.dv),
                              .beta = problem.beta,
                              .dbeta = problem.dbeta,
                              .workspace = workspace,
                              .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
                              .heads = problem.heads,
                              .keys = problem.key_dim,
                              .values = problem.value_dim,
                              .batch = batch};
  if (params.keys <= 8 * kRowGroups) {
    launch_walks<8>(params, stream);
  } else {
    launch_walks<16>(params, stream);
  }
  chunk_gradients<<<dim3(params.heads, batch.blocks), kGradientThreads, 0, stream>>>(params);
  check_launch("delta_rule_backward");
}

}  // namespace deltafox::cuda
