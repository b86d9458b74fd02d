// S ← diag(g) S + k vᵀ, o = Sᵀ q row by row, in float32: what GLA and Mamba-2's state space share.
// A block owns one head of a sequence and 32 columns of its state, which stay in the registers of
// 128 threads: four columns of a sixteenth of the rows a thread. Outputs are summed over the rows
// in batches of four tokens, one barrier each.
//
// A Source says where a head's rows lie:
//   struct Row { q[kRows], k[kRows], g(i), v[4] } and load(token, head, row_group, column,
//   columns), finish(token, head, column, sum): the element of the output.
#pragma once

#include "cuda/check.h"
#include "cuda/decayed_kernels.h"
#include "cuda/elements.cuh"
#include "cuda/launch.cuh"
#include "cuda/sequence_batch.h"

namespace deltafox::cuda {

constexpr int kRecurrenceThreads = 128;
constexpr int kRecurrenceWarps = kRecurrenceThreads / 32;
constexpr int kRecurrenceColumns = 32;  // of a block
constexpr int kRowGroups = kRecurrenceThreads / (kRecurrenceColumns / 4);
static_assert(kLargestStateRows == 16 * kRowGroups);

// Sums over the row groups of a warp: lanes of equal l % 8.
__device__ inline float sum_row_groups(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 8);
  return x + __shfl_xor_sync(0xffffffffU, x, 16);
}

// A thread's part of the state [rows, columns] of one head.
template <int kRows>
struct StateColumns {
  float s[kRows][4];

  __device__ void load(const float* state, int rows, int columns, int row_group, int column) {
    const int count = count_columns(column, columns);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row_group * kRows + i;
      load_four(s[i], state + static_cast<std::ptrdiff_t>(r) * columns + column,
                r < rows ? count : 0);
    }
  }
  __device__ void store(float* state, int rows, int columns, int row_group, int column) const {
    const int count = count_columns(column, columns);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row_group * kRows + i;
      if (r < rows) {
        store_four(state + static_cast<std::ptrdiff_t>(r) * columns + column, s[i], count);
      }
    }
  }
};

template <class Source, int kRows>
__global__ void __launch_bounds__(kRecurrenceThreads)
    decayed_recurrence(const __grid_constant__ Source source,
                       const __grid_constant__ SequenceBatch batch) {
  constexpr int kTokens = 4;  // of one barrier
  __shared__ float parts[2][kTokens][kRecurrenceWarps][kRecurrenceColumns];
  const BatchEntry& entry = batch.entries[blockIdx.z];
  const int head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = lane % (kRecurrenceColumns / 4);
  const int first_column = blockIdx.x * kRecurrenceColumns;
  const int column = first_column + group * 4;
  const int row_group = threadIdx.x / (kRecurrenceColumns / 4);
  const int rows = source.rows;
  const int columns = source.columns;
  float* state = entry.state + static_cast<std::ptrdiff_t>(head) * rows * columns;

  wait_for_input();
  StateColumns<kRows> s;
  s.load(state, rows, columns, row_group, column);
  typename Source::template Row<kRows> next;
  next.load(source, entry.begin, head, row_group, column);
  for (int t = 0; t < entry.length; t += kTokens) {
    const int buffer = t / kTokens % 2;
    const int tokens = min(kTokens, entry.length - t);
    for (int i = 0; i < tokens; ++i) {
      const typename Source::template Row<kRows> row = next;
      if (t + i + 1 < entry.length) {
        next.load(source, entry.begin + t + i + 1, head, row_group, column);
      }
      if (t + i + kTokensAhead < entry.length) {
        source.prefetch_token(entry.begin + t + i + kTokensAhead, head, row_group * kRows, column);
      }
      float o[4] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s.s[r][j] = row.decay(r) * s.s[r][j] + row.k[r] * row.v[j];
          o[j] += s.s[r][j] * row.q[r];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) o[j] = sum_row_groups(o[j]);
      if (lane < kRecurrenceColumns / 4) {
        *reinterpret_cast<float4*>(&parts[buffer][i][warp][4 * group]) =
            make_float4(o[0], o[1], o[2], o[3]);
      }
    }
    __syncthreads();
    // One warp a token, one lane a column.
    if (warp < tokens && first_column + lane < columns) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kRecurrenceWarps; ++w) sum += parts[buffer][warp][w][lane];
      source.finish(entry.begin + t + warp, head, first_column + lane, sum);
    }
  }
  s.store(state, rows, columns, row_group, column);
}

template <class Source>
void launch_decayed_recurrence(Context& ctx, const Source& source, int heads,
                               const SequenceBatch& batch) {
  const dim3 grid((source.columns + kRecurrenceColumns - 1) / kRecurrenceColumns, heads,
                  batch.count);
  const auto kernel = source.rows <= 4 * kRowGroups   ? decayed_recurrence<Source, 4>
                      : source.rows <= 8 * kRowGroups ? decayed_recurrence<Source, 8>
                                                      : decayed_recurrence<Source, 16>;
  launch_dependent(ctx, "decayed_recurrence", kernel, grid, kRecurrenceThreads, 0, source, batch);
}

}  // namespace deltafox::cuda
