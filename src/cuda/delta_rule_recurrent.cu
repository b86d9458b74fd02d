// The delta rule row by row, in float32 (ops/delta_rule.h): a block owns one head of a sequence and
// 32 columns of its state, which stay in the registers of 128 threads: four columns of a sixteenth
// of the rows a thread. With r = Sᵀk the recalled values and the state before the update,
//   u = β (v − r),  o = (Sᵀq + u (k·q)) / √K,
// so one pass over the state and one barrier a row suffice.
#include <cmath>

#include "cuda/check.h"
#include "cuda/delta_rule_kernels.h"
#include "cuda/elements.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 32;  // of a block
constexpr int kRowGroups = kThreads / (kColumns / 4);

struct RecurrentParams {
  DeltaRuleProblem problem;
  float scale;
  SequenceBatch batch;
};

// Sums over the row groups of a warp: lanes of equal l % 8.
__device__ float sum_row_groups(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 8);
  return x + __shfl_xor_sync(0xffffffffU, x, 16);
}

template <typename T, int kRows>
struct Row {
  float q[kRows];
  float k[kRows];
  float v[4];
  float beta;

  __device__ void load(const DeltaRuleProblem& p, std::ptrdiff_t row, int head, int row_group,
                       int column, int columns) {
    const std::ptrdiff_t at = row * p.heads + head;
    const bool aligned = p.key_dim % 4 == 0;
    load_part(q, static_cast<const T*>(p.q) + at * p.key_dim, row_group * kRows, p.key_dim,
              aligned);
    load_part(k, static_cast<const T*>(p.k) + at * p.key_dim, row_group * kRows, p.key_dim,
              aligned);
    load_four(v, static_cast<const T*>(p.v) + at * p.value_dim + column, columns);
    beta = p.beta != nullptr ? static_cast<const float*>(p.beta)[at] : 1;
  }
};

// kSingle: sequences of one row each.
template <typename T, int kRows, bool kSingle>
__global__ void __launch_bounds__(kThreads)
    delta_rule_recurrent(const __grid_constant__ RecurrentParams p) {
  __shared__ float4 recalled_parts[2][kWarps][kColumns / 4];
  __shared__ float4 query_parts[2][kWarps][kColumns / 4];
  __shared__ float product_parts[2][kWarps];
  const DeltaRuleProblem& problem = p.problem;
  const BatchEntry& entry = p.batch.entries[blockIdx.z];
  const int head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group = lane % (kColumns / 4);
  const int column = blockIdx.x * kColumns + group * 4;
  const int row_group = threadIdx.x / (kColumns / 4);
  const int values = problem.value_dim;
  // How many of the four columns exist; whole vectors where rows keep their alignment.
  const int columns =
      values % 4 == 0 && column < values ? kVector : min(max(values - column, 0), 4);

  float* state =
      entry.state + static_cast<std::ptrdiff_t>(head) * problem.key_dim * values + column;
  float s[kRows][4];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = row_group * kRows + i;
    load_four(s[i], state + static_cast<std::ptrdiff_t>(r) * values,
              r < problem.key_dim ? columns : 0);
  }
  Row<T, kRows> next;
  next.load(problem, entry.begin, head, row_group, column, columns);
  for (int t = 0; t < (kSingle ? 1 : entry.length); ++t) {
    const Row<T, kRows> row = next;
    if (!kSingle && t + 1 < entry.length) {
      next.load(problem, entry.begin + t + 1, head, row_group, column, columns);
    }
    if (!kSingle && t + kTokensAhead < entry.length) {
      const std::ptrdiff_t at =
          static_cast<std::ptrdiff_t>(entry.begin + t + kTokensAhead) * problem.heads + head;
      if (row_group * kRows < problem.key_dim) {
        prefetch(static_cast<const T*>(problem.q) + at * problem.key_dim + row_group * kRows);
        prefetch(static_cast<const T*>(problem.k) + at * problem.key_dim + row_group * kRows);
      }
      if (column < values) prefetch(static_cast<const T*>(problem.v) + at * values + column);
    }
    float recalled[4] = {};
    float queried[4] = {};
    float product = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      product += row.k[i] * row.q[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        recalled[j] += s[i][j] * row.k[i];
        queried[j] += s[i][j] * row.q[i];
      }
    }
    product = sum_row_groups(product);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      recalled[j] = sum_row_groups(recalled[j]);
      queried[j] = sum_row_groups(queried[j]);
    }
    const int buffer = t % 2;
    if (lane < kColumns / 4) {
      recalled_parts[buffer][warp][group] =
          make_float4(recalled[0], recalled[1], recalled[2], recalled[3]);
      query_parts[buffer][warp][group] =
          make_float4(queried[0], queried[1], queried[2], queried[3]);
      if (lane == 0) product_parts[buffer][warp] = product;
    }
    __syncthreads();
    product = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) recalled[j] = queried[j] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      add_four(recalled, recalled_parts[buffer][w][group]);
      add_four(queried, query_parts[buffer][w][group]);
      product += product_parts[buffer][w];
    }
    float o[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float u = row.beta * (row.v[j] - recalled[j]);
      o[j] = (queried[j] + u * product) * p.scale;
#pragma unroll
      for (int i = 0; i < kRows; ++i) s[i][j] += row.k[i] * u;
    }
    if (row_group == 0) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(entry.begin + t) * problem.heads + head;
      store_four(static_cast<T*>(problem.o) + at * values + column, o, columns);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = row_group * kRows + i;
    if (r < problem.key_dim)
      store_four(state + static_cast<std::ptrdiff_t>(r) * values, s[i], columns);
  }
}

template <typename T, bool kSingle>
void launch(const RecurrentParams& params, cudaStream_t stream) {
  const dim3 grid((params.problem.value_dim + kColumns - 1) / kColumns, params.problem.heads,
                  params.batch.count);
  const int keys = params.problem.key_dim;
  if (keys <= 4 * kRowGroups) {
    delta_rule_recurrent<T, 4, kSingle><<<grid, kThreads, 0, stream>>>(params);
  } else if (keys <= 8 * kRowGroups) {
    delta_rule_recurrent<T, 8, kSingle><<<grid, kThreads, 0, stream>>>(params);
  } else {
    delta_rule_recurrent<T, 16, kSingle><<<grid, kThreads, 0, stream>>>(params);
  }
  check_launch("delta_rule_recurrent");
}

}  // namespace

void launch_delta_rule_recurrent(const DeltaRuleProblem& problem, const SequenceBatch& batch,
                                 bool single_rows, cudaStream_t stream) {
  const RecurrentParams params{.problem = problem,
                               .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
                               .batch = batch};
  if (problem.is_bf16) {
    single_rows ? launch<bf16, true>(params, stream) : launch<bf16, false>(params, stream);
  } else {
    single_rows ? launch<float, true>(params, stream) : launch<float, false>(params, stream);
  }
}

}  // namespace deltafox::cuda
