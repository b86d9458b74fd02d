// S ← diag(g) S + k vᵀ, o = Sᵀ q for S [K, V] in chunks of 32 tokens, in float32, and half of its
// gradients: what GLA and Mamba-2's state space share. All chunks of all heads are worked on at
// once but for one pass along them. Within a chunk let D_ts = Π_{s<r≤t} g_r, e_s the product of all
// gates behind s and b_t of those up to t; S is the state before the chunk, dS the gradient of the
// state behind it.
//
// 1. chunk_sums: what a chunk adds to the state, Σ_s (k_s ⊙ e_s) v_sᵀ, and to its gradient,
//    Σ_t (q_t ⊙ b_t) do_tᵀ.
// 2. scan_chunks: from these S and dS of every chunk, element by element.
// 3. chunk_columns, a thread a column, with A_ts = Σ_i q_ti k_si D_ts,i:
//      o_t = Sᵀ (q_t ⊙ b_t) + Σ_{s≤t} A_ts v_s,  dv_s = dSᵀ (k_s ⊙ e_s) + Σ_{t≥s} A_ts do_t
//
// Every product of gates is taken factor by factor, none is a quotient: gates may be zero.
//
// A Source says where a head's rows lie: heads, rows (K), columns (V); q, k, g (token, head, row);
// v (token, head, column) and store_o; for gradients d_o, store_dv and what decayed_backward.cuh
// asks for.
#pragma once

#include "core/context.h"
#include "cuda/batches.h"
#include "cuda/check.h"
#include "cuda/chunk.cuh"
#include "cuda/decayed_kernels.h"
#include "cuda/rows.cuh"
#include "cuda/stream.h"

namespace deltafox::cuda {

constexpr int kDecayedTile = 128;  // rows of a block, or columns; a thread each
constexpr int kValueColumns = 64;  // in shared memory at a time
// Of arrays [.., tokens]: whole vectors, and not all in the same banks.
constexpr int kTokenStride = kDecayedChunk + 4;
constexpr int kScanThreads = 256;

struct DecayedWorkspace {
  float* states;    // [chunks, H, V, K], sums and then S
  float* d_states;  // [chunks, H, V, K], sums and then dS; or null
  float* decays;    // [chunks, H, K], products of a chunk's gates
};

template <class Source>
struct DecayedParams {
  Source source;
  DecayedWorkspace workspace;
  SequenceBatch batch;

  __device__ std::ptrdiff_t decays_at(int chunk, int head) const {
    return (static_cast<std::ptrdiff_t>(chunk) * source.heads + head) * source.rows;
  }
  __device__ std::ptrdiff_t state_at(int chunk, int head) const {
    return decays_at(chunk, head) * source.columns;
  }
};

// q, k and g of one row; behind the chunk's end nothing comes and nothing decays.
struct RowOfChunk {
  float q[kDecayedChunk];
  float k[kDecayedChunk];
  float g[kDecayedChunk];

  template <class Source>
  __device__ void load(const Source& source, const Chunk& chunk, int head, int row) {
#pragma unroll
    for (int t = 0; t < kDecayedChunk; ++t) {
      const bool exists = t < chunk.tokens && row < source.rows;
      q[t] = exists ? source.q(chunk.begin + t, head, row) : 0;
      k[t] = exists ? source.k(chunk.begin + t, head, row) : 0;
      g[t] = exists ? source.g(chunk.begin + t, head, row) : 1;
    }
  }
};

using ValueTile = float[kValueColumns][kTokenStride];

// Columns [first, first + kValueColumns) of value(token, column), zeros where there are none.
template <class Source, class F>
__device__ void load_value_tile(ValueTile& to, const Source& source, const Chunk& chunk, int first,
                                const F& value) {
  for (int i = static_cast<int>(threadIdx.x); i < kValueColumns * kDecayedChunk;
       i += kDecayedTile) {
    const int j = i % kValueColumns;
    const int t = i / kValueColumns;
    const bool exists = t < chunk.tokens && first + j < source.columns;
    to[j][t] = exists ? value(chunk.begin + t, first + j) : 0;
  }
}

// f(t, x[t]) for the tokens of one row of shared memory.
template <class F>
__device__ void each_token(const float* x, const F& f) {
#pragma unroll
  for (int t = 0; t < kDecayedChunk; t += 4) {
    const float4 four = *reinterpret_cast<const float4*>(x + t);
    f(t, four.x);
    f(t + 1, four.y);
    f(t + 2, four.z);
    f(t + 3, four.w);
  }
}

template <class Source, bool kGradients>
__global__ void __launch_bounds__(kDecayedTile)
    chunk_sums(const __grid_constant__ DecayedParams<Source> p) {
  __shared__ __align__(16) ValueTile v;
  __shared__ __align__(16) ValueTile d_o;
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.x), kDecayedChunk);
  const int head = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.z) * kDecayedTile + static_cast<int>(threadIdx.x);
  RowOfChunk own;
  own.load(p.source, chunk, head, row);
  float before = 1;
  float behind = 1;
#pragma unroll
  for (int t = 0; t < kDecayedChunk; ++t) {
    before *= own.g[t];
    own.q[t] *= before;
    own.k[kDecayedChunk - 1 - t] *= behind;
    behind *= own.g[kDecayedChunk - 1 - t];
  }
  const int rows = p.source.rows;
  if (row < rows) p.workspace.decays[p.decays_at(blockIdx.x, head) + row] = before;
  const std::ptrdiff_t state = p.state_at(blockIdx.x, head) + row;
  for (int first = 0; first < p.source.columns; first += kValueColumns) {
    __syncthreads();
    load_value_tile(v, p.source, chunk, first, [&](std::ptrdiff_t token, int column) {
      return p.source.v(token, head, column);
    });
    if constexpr (kGradients) {
      load_value_tile(d_o, p.source, chunk, first, [&](std::ptrdiff_t token, int column) {
        return p.source.d_o(token, head, column);
      });
    }
    __syncthreads();
    const int columns = min(kValueColumns, p.source.columns - first);
    for (int j = 0; j < columns; ++j) {
      float sum = 0;
      float d_sum = 0;
      each_token(v[j], [&](int t, float x) { sum = fmaf(x, own.k[t], sum); });
      if constexpr (kGradients) {
        each_token(d_o[j], [&](int t, float x) { d_sum = fmaf(x, own.q[t], d_sum); });
      }
      if (row >= rows) continue;
      const std::ptrdiff_t to = state + static_cast<std::ptrdiff_t>(first + j) * rows;
      p.workspace.states[to] = sum;
      if constexpr (kGradients) p.workspace.d_states[to] = d_sum;
    }
  }
}

// blockIdx.z: a sequence. Forwards from its state, which is updated, or from zero where it has
// none; or backwards the gradients, from zero.
template <class Source, bool kForwards>
__global__ void __launch_bounds__(kScanThreads)
    scan_chunks(const __grid_constant__ DecayedParams<Source> p) {
  constexpr int kAtOnce = 8;
  const BatchEntry& entry = p.batch.entries[blockIdx.z];
  const int head = static_cast<int>(blockIdx.y);
  const int rows = p.source.rows;
  const int columns = p.source.columns;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= static_cast<std::int64_t>(rows) * columns) return;
  const int row = static_cast<int>(i % rows);
  const int column = static_cast<int>(i / rows);
  float* states = kForwards ? p.workspace.states : p.workspace.d_states;
  const int last = entry.first_block + entry.segments - 1;
  const auto chunk_at = [&](int step) {
    return kForwards ? entry.first_block + step : last - step;
  };
  float* outer =
      kForwards && entry.state != nullptr
          ? entry.state + (static_cast<std::ptrdiff_t>(head) * rows + row) * columns + column
          : nullptr;
  float state = outer != nullptr ? *outer : 0;
  for (int first = 0; first < entry.segments; first += kAtOnce) {
    float sums[kAtOnce];
    float decays[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      const int chunk = chunk_at(first + n);
      sums[n] = states[p.state_at(chunk, head) + i];
      decays[n] = p.workspace.decays[p.decays_at(chunk, head) + row];
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= entry.segments) break;
      states[p.state_at(chunk_at(first + n), head) + i] = state;
      state = fmaf(decays[n], state, sums[n]);
    }
  }
  if (outer != nullptr) *outer = state;
}

// o, or dv.
template <class Source, bool kForwards>
__global__ void __launch_bounds__(kDecayedTile, 3)
    chunk_columns(const __grid_constant__ DecayedParams<Source> p) {
  constexpr int kRows = 32;  // in shared memory at a time
  constexpr int kParts = kDecayedTile / kDecayedChunk;
  constexpr int kPart = kRows / kParts;
  // Forwards, a token t = `own` meets others s ≤ t as a query; backwards s = `own` meets t ≥ s as a
  // key.
  __shared__ __align__(16) float others[kDecayedChunk][kRows];
  __shared__ __align__(16) float g[kDecayedChunk][kRows];
  // q_t ⊙ b_t at [row][t], or k_s ⊙ e_s.
  __shared__ __align__(16) float decayed[kRows][kTokenStride];
  __shared__ __align__(16) float scores[kDecayedChunk][kTokenStride];  // at [other][own]
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.x), kDecayedChunk);
  const int head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int column = static_cast<int>(blockIdx.z) * kDecayedTile + thread;
  const int rows = p.source.rows;
  const float* state = (kForwards ? p.workspace.states : p.workspace.d_states) +
                       p.state_at(blockIdx.x, head) +
                       static_cast<std::ptrdiff_t>(min(column, p.source.columns - 1)) * rows;
  const auto query = [&](int t, int row) { return p.source.q(chunk.begin + t, head, row); };
  const auto key = [&](int t, int row) { return p.source.k(chunk.begin + t, head, row); };
  // This thread's scores: of one token with all others, over kPart of the rows.
  const int own = thread / kParts;
  const int first_part = thread % kParts * kPart;

  float score[kDecayedChunk] = {};
  float out[kDecayedChunk] = {};
  for (int first = 0; first < rows; first += kRows) {
    __syncthreads();
    for (int i = thread; i < kRows * kDecayedChunk; i += kDecayedTile) {
      const int t = i / kRows;
      const int row = first + i % kRows;
      const bool inside = t < chunk.tokens && row < rows;
      others[t][i % kRows] = !inside ? 0 : kForwards ? key(t, row) : query(t, row);
      g[t][i % kRows] = inside ? p.source.g(chunk.begin + t, head, row) : 1;
    }
    float x[kPart];
#pragma unroll
    for (int n = 0; n < kPart; ++n) {
      const int row = first + first_part + n;
      const bool inside = own < chunk.tokens && row < rows;
      x[n] = !inside ? 0 : kForwards ? query(own, row) : key(own, row);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDecayedChunk; ++i) {
      const int t = kForwards ? kDecayedChunk - 1 - i : i;
      if (kForwards ? t > own : t < own) continue;
#pragma unroll
      for (int n = 0; n < kPart; n += 4) {
        const float4 gates = *reinterpret_cast<const float4*>(&g[t][first_part + n]);
        const float4 four = *reinterpret_cast<const float4*>(&others[t][first_part + n]);
        const float gate[4] = {gates.x, gates.y, gates.z, gates.w};
        const float other[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // To a key the gate of a token comes before it is met, to a query afterwards.
          if (!kForwards && t > own) x[n + e] *= gate[e];
          score[t] = fmaf(other[e], x[n + e], score[t]);
          if (kForwards) x[n + e] *= gate[e];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kPart; ++n) decayed[first_part + n][own] = x[n];
    __syncthreads();
    const int inside = min(kRows, rows - first);
#pragma unroll 2
    for (int i = 0; i < inside; i += 4) {
      float s[4];
      load_four(s, state + first + i, count_columns(first + i, rows));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        each_token(decayed[i + n], [&](int t, float from) { out[t] = fmaf(from, s[n], out[t]); });
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kDecayedChunk; ++t) {
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) {
      score[t] += __shfl_xor_sync(0xffffffffU, score[t], offset);
    }
    if (thread % kParts == t % kParts) scores[t][own] = score[t];
  }
  __syncthreads();
  if (column >= p.source.columns) return;
#pragma unroll
  for (int t = 0; t < kDecayedChunk; ++t) {
    if (t >= chunk.tokens) break;
    float value;
    if constexpr (kForwards) {
      value = p.source.v(chunk.begin + t, head, column);
    } else {
      value = p.source.d_o(chunk.begin + t, head, column);
    }
    each_token(scores[t], [&](int to, float a) {
      if (kForwards ? to >= t : to <= t) out[to] = fmaf(a, value, out[to]);
    });
  }
#pragma unroll
  for (int t = 0; t < kDecayedChunk; ++t) {
    if (t >= chunk.tokens) break;
    if constexpr (kForwards) {
      p.source.store_o(chunk.begin + t, head, column, out[t]);
    } else {
      p.source.store_dv(chunk.begin + t, head, column, out[t]);
    }
  }
}

inline int decayed_tiles(int size) {
  return (size + kDecayedTile - 1) / kDecayedTile;
}

// A block each of `size` rows or columns of all heads of all chunks.
inline dim3 decayed_grid(const SequenceBatch& batch, int heads, int size) {
  return {static_cast<unsigned>(batch.blocks), static_cast<unsigned>(heads),
          static_cast<unsigned>(decayed_tiles(size))};
}

inline dim3 scan_grid(const SequenceBatch& batch, int heads, std::int64_t state) {
  return {static_cast<unsigned>((state + kScanThreads - 1) / kScanThreads),
          static_cast<unsigned>(heads), static_cast<unsigned>(batch.count)};
}

inline int decayed_chunks(int length) {
  return (length + kDecayedChunk - 1) / kDecayedChunk;
}

inline DecayedWorkspace decayed_workspace(ScratchScope& scratch, std::int64_t chunk_heads,
                                          std::int64_t rows, std::int64_t columns, bool gradients) {
  const auto states = [&] { return scratch.tensor({chunk_heads, columns, rows}).f32(); };
  return {.states = states(),
          .d_states = gradients ? states() : nullptr,
          .decays = scratch.tensor({chunk_heads, rows}).f32()};
}

// The sequences of one launch, which have decayed_chunks(length) segments each.
template <class Source>
void decayed_forward(Context& ctx, const char* op, const Source& source,
                     const SequenceBatch& batch) {
  ScratchScope scratch(ctx);
  const DecayedParams<Source> params{
      .source = source,
      .workspace =
          decayed_workspace(scratch, static_cast<std::int64_t>(batch.blocks) * source.heads,
                            source.rows, source.columns, false),
      .batch = batch};
  cudaStream_t stream = stream_of(ctx);
  const auto sums = chunk_sums<Source, false>;
  sums<<<decayed_grid(batch, source.heads, source.rows), kDecayedTile, 0, stream>>>(params);
  check_launch(op);
  const std::int64_t state = static_cast<std::int64_t>(source.rows) * source.columns;
  const auto scan = scan_chunks<Source, true>;
  scan<<<scan_grid(batch, source.heads, state), kScanThreads, 0, stream>>>(params);
  check_launch(op);
  const auto columns = chunk_columns<Source, true>;
  columns<<<decayed_grid(batch, source.heads, source.columns), kDecayedTile, 0, stream>>>(params);
  check_launch(op);
}

}  // namespace deltafox::cuda
