// Forgetting attention of float32: products on the ordinary units, for exactness, not for speed.
// A thread block of 256 attends for a tile of 64 queries; each thread holds the scores of 4×4
// queries and keys, and of 4 queries kDim / 16 dimensions of the output.
#include "cuda/attention_kernels.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;
constexpr int kStride = kRows + 4;  // of transposed rows; a multiple of 16 bytes
constexpr float kMinusInfinity = -INFINITY;

template <int kDim>
struct Shared {
  alignas(16) float queries[kDim][kStride];         // transposed
  alignas(16) float keys[kDim][kPageTokens];        // as in the page
  alignas(16) float values[kPageTokens][kDim];      // as in the page
  alignas(16) float weights[kPageTokens][kStride];  // transposed
};

__device__ inline float max_of_16(float x) {
  for (int lane = 8; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0U, x, lane));
  return x;
}
__device__ inline float sum_of_16(float x) {
  for (int lane = 8; lane > 0; lane /= 2) x += __shfl_xor_sync(~0U, x, lane);
  return x;
}

template <int kDim>
__global__ __launch_bounds__(kThreads) void attend(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared<kDim>*>(memory);
  constexpr int kColumns = kDim / 16;  // of the output, strided by 16
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread / 16 * 4;  // the first of this thread's four
  const int column = thread % 16;
  int tile_index = 0;
  int head = 0;
  params.tile_of(static_cast<int>(blockIdx.x), tile_index, head);
  const AttentionTile tile = params.tiles[tile_index];
  const KvSequence sequence = params.sequences[tile.sequence];
  const int dim = params.layout.dim;
  const int g = params.kv_head(head);
  const bool gated = params.layout.gate_heads > 0;

  for (int i = thread; i < kRows * kDim; i += kThreads) {
    const int r = i / kDim;
    const int d = i % kDim;
    float x = 0;
    if (r < tile.count && d < dim) {
      x = static_cast<const float*>(
              params.q)[(static_cast<std::int64_t>(tile.row + r) * params.heads + head) * dim + d] *
          params.scale;
    }
    shared.queries[d][r] = x;
  }
  int begin[4];
  float max[4];
  float sum[4];
  float o[4][kColumns];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    begin[r] =
        row + r < tile.count
            ? params.begins[static_cast<std::int64_t>(head) * params.tokens + tile.row + row + r]
            : 0;
    max[r] = kMinusInfinity;
    sum[r] = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) o[r][c] = 0;
  }

  const int first = params.ranges[tile_index * params.heads + head].first / kPageTokens;
  for (int p = (tile.position + tile.count - 1) / kPageTokens; p >= first; --p) {
    const std::byte* page = sequence.page(p);
    __syncthreads();
    const auto* keys = reinterpret_cast<const float4*>(page + params.layout.keys(g));
    const auto* values = reinterpret_cast<const float4*>(page + params.layout.values(g));
    for (int i = thread; i < kDim * kPageTokens / 4; i += kThreads) {
      reinterpret_cast<float4*>(shared.keys)[i] = keys[i];
      reinterpret_cast<float4*>(shared.values)[i] = values[i];
    }
    __syncthreads();

    float s[4][4] = {};
    for (int d = 0; d < kDim; ++d) {
      const float4 q = *reinterpret_cast<const float4*>(&shared.queries[d][row]);
      const float rows[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float k = shared.keys[d][column + 16 * c];
#pragma unroll
        for (int r = 0; r < 4; ++r) s[r][c] += rows[r] * k;
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int position = tile.position + row + r;
      float greatest = max[r];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = p * kPageTokens + column + 16 * c;
        if (key > position || key < begin[r] || row + r >= tile.count) {
          s[r][c] = kMinusInfinity;
        } else if (gated) {
          s[r][c] += decay_between(sequence.page(position / kPageTokens), page, params.layout, head,
                                   position % kPageTokens, column + 16 * c);
        }
        greatest = fmaxf(greatest, s[r][c]);
      }
      greatest = max_of_16(greatest);
      // Rows that have seen no key yet stay at zero.
      const float shift = greatest == kMinusInfinity ? 0.0F : greatest;
      const float factor = expf(max[r] - shift);
      max[r] = greatest;
      float weights = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float weight = expf(s[r][c] - shift);
        weights += weight;
        shared.weights[column + 16 * c][row + r] = weight;
      }
      sum[r] = sum[r] * factor + sum_of_16(weights);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) o[r][c] *= factor;
    }
    // The sixteen threads of a row lie in one warp.
    __syncwarp();
    for (int j = 0; j < kPageTokens; ++j) {
      const float4 w = *reinterpret_cast<const float4*>(&shared.weights[j][row]);
      const float rows[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float v = shared.values[j][column + 16 * c];
#pragma unroll
        for (int r = 0; r < 4; ++r) o[r][c] += rows[r] * v;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (row + r >= tile.count) continue;
    if (column == 0 && params.lse != nullptr) {
      params.lse[static_cast<std::int64_t>(tile.row + row + r) * params.heads + head] =
          max[r] + logf(sum[r]);
    }
    float* to = static_cast<float*>(params.o) +
                (static_cast<std::int64_t>(tile.row + row + r) * params.heads + head) * dim;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column + 16 * c < dim) to[column + 16 * c] = o[r][c] / sum[r];
    }
  }
}

template <int kDim>
void launch(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kDim>);
  cudaFuncSetAttribute(attend<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  attend<kDim><<<params.tile_count * params.heads, kThreads, kBytes, stream>>>(params);
}

}  // namespace

void launch_attention_f32(const AttentionParams& params, cudaStream_t stream) {
  switch (padded_dim(params.layout.dim)) {
    case 32:
      return launch<32>(params, stream);
    case 64:
      return launch<64>(params, stream);
    default:
      return launch<128>(params, stream);
  }
}

}  // namespace deltafox::cuda
