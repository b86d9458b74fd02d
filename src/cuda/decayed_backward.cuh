// The gradients of S ← diag(g) S + k vᵀ, o = Sᵀ q: what decayed_chunks.cuh, whose notation this
// has, leaves to do. row_gradients has a thread a row i of the state. Of the state before token t
// it needs no more than its products with what comes later, f_t(u) = Σ_j S_t,ij do_uj and f_t(*) =
// Σ_j S_t,ij dS_ij. With w_us = do_u · v_s, x_s = (dS v_s)_i, tokens from the first to the last:
//   dg_t = e_t f_t(*) + Σ_{u≥t} D_ut q_u f_t(u),  dk_t = e_t x_t + Σ_{u≥t} D_ut q_u w_ut,
//   f_{t+1}(u) = g_t f_t(u) + k_t w_ut,  f_{t+1}(*) = g_t f_t(*) + k_t x_t,  dq_t = f_{t+1}(t)
//
// Of a Source it needs store_dq, store_dk (token, head, row, d); and store_dg(token, head, row, dg)
// or, where all rows share a gate (kOneGate), store_dg(token, head, tile, dg) for the sum over each
// tile of rows.
#pragma once

#include "cuda/decayed_chunks.cuh"

namespace deltafox::cuda {

template <class Source>
__global__ void __launch_bounds__(kDecayedTile, 2)
    row_gradients(const __grid_constant__ DecayedParams<Source> p) {
  constexpr int kParts = kDecayedTile / kDecayedChunk;  // threads of a token
  constexpr int kPart = kDecayedChunk / kParts;
  constexpr int kGateStride = kDecayedTile + 1;
  __shared__ __align__(16) union {
    struct {
      ValueTile v, d_o;
    } tiles;
    float dg[kDecayedChunk][kGateStride];  // where all rows share a gate
  } memory;
  __shared__ __align__(16) float w[kDecayedChunk][kTokenStride];  // w_us at [s][u]
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.x), kDecayedChunk);
  const int head = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.z) * kDecayedTile + thread;
  const int rows = p.source.rows;
  const std::ptrdiff_t state = p.state_at(blockIdx.x, head) + min(row, rows - 1);

  float f[kDecayedChunk] = {};
  float x[kDecayedChunk] = {};
  float f_end = 0;  // f_t(*)
  float products[kPart] = {};
  const int from = thread / kParts;              // s of this thread's products
  const int first_to = thread % kParts * kPart;  // u
  for (int first = 0; first < p.source.columns; first += kValueColumns) {
    __syncthreads();
    load_value_tile(memory.tiles.v, p.source, chunk, first, [&](std::ptrdiff_t token, int column) {
      return p.source.v(token, head, column);
    });
    load_value_tile(
        memory.tiles.d_o, p.source, chunk, first,
        [&](std::ptrdiff_t token, int column) { return p.source.d_o(token, head, column); });
    __syncthreads();
    const int columns = min(kValueColumns, p.source.columns - first);
#pragma unroll 4
    for (int j = 0; j < columns; ++j) {
      const std::ptrdiff_t at = state + static_cast<std::ptrdiff_t>(first + j) * rows;
      const float s = p.workspace.states[at];
      const float ds = p.workspace.d_states[at];
      each_token(memory.tiles.d_o[j], [&](int t, float d) { f[t] = fmaf(s, d, f[t]); });
      each_token(memory.tiles.v[j], [&](int t, float value) { x[t] = fmaf(ds, value, x[t]); });
      f_end = fmaf(s, ds, f_end);
    }
    for (int j = 0; j < columns; ++j) {
      const float value = memory.tiles.v[j][from];
#pragma unroll
      for (int n = 0; n < kPart; ++n) {
        products[n] = fmaf(value, memory.tiles.d_o[j][first_to + n], products[n]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kPart; ++n) w[from][first_to + n] = products[n];
  RowOfChunk own;
  own.load(p.source, chunk, head, row);
  __syncthreads();  // also behind all that reads the tiles

#pragma unroll
  for (int t = 0; t < kDecayedChunk; ++t) {
    if (t >= chunk.tokens) break;
    float decay = 1;  // D_ut
    float dg = 0;
    float dk = 0;
    each_token(w[t], [&](int u, float w_ut) {
      if (u < t) return;
      if (u > t) decay *= own.g[u];
      const float query = decay * own.q[u];
      dg = fmaf(query, f[u], dg);
      dk = fmaf(query, w_ut, dk);
      f[u] = fmaf(own.k[t], w_ut, own.g[t] * f[u]);
    });
    dg = fmaf(decay, f_end, dg);
    dk = fmaf(decay, x[t], dk);
    f_end = fmaf(own.k[t], x[t], own.g[t] * f_end);
    if (row < rows) {
      p.source.store_dq(chunk.begin + t, head, row, f[t]);
      p.source.store_dk(chunk.begin + t, head, row, dk);
    }
    if constexpr (Source::kOneGate) {
      memory.dg[t][thread] = row < rows ? dg : 0;
    } else if (row < rows) {
      p.source.store_dg(chunk.begin + t, head, row, dg);
    }
  }
  if constexpr (Source::kOneGate) {
    __syncthreads();
    float sum = 0;
    if (from < chunk.tokens) {
      for (int i = thread % kParts; i < kDecayedTile; i += kParts) sum += memory.dg[from][i];
    }
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffU, sum, offset);
    }
    if (thread % kParts == 0 && from < chunk.tokens) {
      p.source.store_dg(chunk.begin + from, head, static_cast<int>(blockIdx.z), sum);
    }
  }
}

// Of whole sequences, from zero states.
template <class Source>
void decayed_backward(Context& ctx, const char* op, const Source& source,
                      const Sequences& sequences) {
  for_each_batch(sequences, {}, decayed_chunks, [&](const SequenceBatch& batch) {
    ScratchScope scratch(ctx);
    const DecayedParams<Source> params{
        .source = source,
        .workspace =
            decayed_workspace(scratch, static_cast<std::int64_t>(batch.blocks) * source.heads,
                              source.rows, source.columns, true),
        .batch = batch};
    cudaStream_t stream = stream_of(ctx);
    const dim3 by_rows = decayed_grid(batch, source.heads, source.rows);
    const auto sums = chunk_sums<Source, true>;
    sums<<<by_rows, kDecayedTile, 0, stream>>>(params);
    check_launch(op);
    const std::int64_t state = static_cast<std::int64_t>(source.rows) * source.columns;
    for (const auto scan : {scan_chunks<Source, true>, scan_chunks<Source, false>}) {
      scan<<<scan_grid(batch, source.heads, state), kScanThreads, 0, stream>>>(params);
      check_launch(op);
    }
    row_gradients<<<by_rows, kDecayedTile, 0, stream>>>(params);
    check_launch(op);
    const auto columns = chunk_columns<Source, false>;
    columns<<<decayed_grid(batch, source.heads, source.columns), kDecayedTile, 0, stream>>>(params);
    check_launch(op);
  });
}

}  // namespace deltafox::cuda
