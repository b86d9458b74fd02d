// Bound by memory. A block transposes one head's keys of one page. Running sums of log gates and
// running maxima of key norms are scans along the tokens of a sequence, one block a head; the sums
// in double precision, kept as two floats.
#include <cub/block/block_scan.cuh>

#include "cuda/kv_append_kernels.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
// Of scans.
constexpr int kScanThreads = 512;
constexpr int kPerThread = 8;

template <typename T, int kDim>
__global__ __launch_bounds__(kThreads) void append_rows(AppendParams params,
                                                        const AppendTile* tiles) {
  constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  __shared__ T keys[kPageTokens][kDim + 4 / sizeof(T)];
  const AppendTile tile = tiles[blockIdx.x];
  const KvSequence sequence = params.sequences[tile.sequence];
  const int g = static_cast<int>(blockIdx.y);
  const int dim = params.layout.dim;
  const int page_begin = tile.page * kPageTokens;
  const int first = max(0, sequence.position() - page_begin);
  const int end = min(kPageTokens, sequence.length - page_begin);
  std::byte* page = sequence.page(tile.page);
  const auto offset = [&](int t) {
    const std::int64_t row = sequence.row + page_begin + t - sequence.position();
    return (row * params.layout.kv_heads + g) * dim;
  };
  std::byte* values = page + params.layout.values(g);
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * kDim / kSize; i += kThreads) {
    const int t = i / (kDim / kSize);
    const int c = i % (kDim / kSize);
    if (t < first || t >= end) continue;
    const T* k = static_cast<const T*>(params.k) + offset(t) + c * kSize;
    const T* v = static_cast<const T*>(params.v) + offset(t) + c * kSize;
    alignas(16) T from_k[kSize];
    alignas(16) T from_v[kSize];
    if (dim == kDim) {
      *reinterpret_cast<uint4*>(from_k) = *reinterpret_cast<const uint4*>(k);
      *reinterpret_cast<uint4*>(from_v) = *reinterpret_cast<const uint4*>(v);
    } else {
      for (int j = 0; j < kSize; ++j) {
        const bool inside = c * kSize + j < dim;
        from_k[j] = inside ? k[j] : static_cast<T>(0.0F);
        from_v[j] = inside ? v[j] : static_cast<T>(0.0F);
      }
    }
    for (int j = 0; j < kSize; ++j) keys[t][c * kSize + j] = from_k[j];
    *reinterpret_cast<uint4*>(values + value_chunk<T, kDim>(t, c)) =
        *reinterpret_cast<const uint4*>(from_v);
  }
  __syncthreads();
  std::byte* to = page + params.layout.keys(g);
  for (int i = static_cast<int>(threadIdx.x); i < kPageTokens * kDim / kSize; i += kThreads) {
    const int d = i / (kPageTokens / kSize);
    const int c = i % (kPageTokens / kSize);
    alignas(16) T chunk[kSize];
    T* at = reinterpret_cast<T*>(to + key_chunk<T>(d, c));
    if (c * kSize >= first && (c + 1) * kSize <= end) {
      for (int j = 0; j < kSize; ++j) chunk[j] = keys[c * kSize + j][d];
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(chunk);
    } else {
      for (int j = 0; j < kSize; ++j) {
        const int t = c * kSize + j;
        if (t >= first && t < end) at[j] = keys[t][d];
      }
    }
  }
  if (!params.layout.has_norms) return;
  const int t = static_cast<int>(threadIdx.x);
  if (t < first || t >= end) return;
  float squares = 0;
  for (int d = 0; d < dim; ++d) {
    const auto x = static_cast<float>(keys[t][d]);
    squares += x * x;
  }
  // The key's own; the scan makes it the greatest so far.
  reinterpret_cast<float*>(page + params.layout.norms(g))[t] = sqrtf(squares);
}

struct Greatest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct SplitSum {
  float high;
  float low;
  __device__ explicit SplitSum(double sum)
      : high(static_cast<float>(sum)), low(static_cast<float>(sum - static_cast<double>(high))) {}
};

__device__ inline float& float_at(std::byte* page, std::int64_t offset, int token) {
  return reinterpret_cast<float*>(page + offset)[token];
}

// Blocks of gates come first, then those of norms.
__global__ __launch_bounds__(kScanThreads) void scan_rows(AppendParams params) {
  using Sums = cub::BlockScan<double, kScanThreads>;
  using Maxima = cub::BlockScan<float, kScanThreads>;
  __shared__ union {
    typename Sums::TempStorage sums;
    typename Maxima::TempStorage maxima;
  } storage;
  const KvSequence sequence = params.sequences[blockIdx.y];
  const KvPageLayout& layout = params.layout;
  const int first = sequence.position();
  const int thread = static_cast<int>(threadIdx.x);
  const auto page = [&](int position) { return sequence.page(position / kPageTokens); };
  if (sequence.rows == 0) return;

  if (static_cast<int>(blockIdx.x) < layout.gate_heads) {
    const int h = static_cast<int>(blockIdx.x);
    double before = 0;
    if (first > 0) {
      before = static_cast<double>(
                   float_at(page(first - 1), layout.gates(h), (first - 1) % kPageTokens)) +
               float_at(page(first - 1), layout.low_gates(h), (first - 1) % kPageTokens);
    }
    for (int start = 0; start < sequence.rows; start += kScanThreads * kPerThread) {
      double sums[kPerThread];
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int r = start + thread * kPerThread + i;
        sums[i] =
            r < sequence.rows
                ? params.log_gates[static_cast<std::int64_t>(sequence.row + r) * layout.gate_heads +
                                   h]
                : 0;
      }
      double all = 0;
      Sums(storage.sums).InclusiveSum(sums, sums, all);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int r = start + thread * kPerThread + i;
        if (r >= sequence.rows) break;
        const int position = first + r;
        const SplitSum sum(before + sums[i]);
        float_at(page(position), layout.gates(h), position % kPageTokens) = sum.high;
        float_at(page(position), layout.low_gates(h), position % kPageTokens) = sum.low;
      }
      before += all;
      __syncthreads();
    }
    return;
  }
  const int g = static_cast<int>(blockIdx.x) - layout.gate_heads;
  float before =
      first > 0 ? float_at(page(first - 1), layout.norms(g), (first - 1) % kPageTokens) : 0;
  for (int start = 0; start < sequence.rows; start += kScanThreads * kPerThread) {
    float norms[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int position = first + start + thread * kPerThread + i;
      norms[i] = position < sequence.length
                     ? float_at(page(position), layout.norms(g), position % kPageTokens)
                     : 0;
    }
    float all = 0;
    Maxima(storage.maxima).InclusiveScan(norms, norms, Greatest(), all);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int position = first + start + thread * kPerThread + i;
      if (position >= sequence.length) break;
      float_at(page(position), layout.norms(g), position % kPageTokens) = fmaxf(before, norms[i]);
    }
    before = fmaxf(before, all);
    __syncthreads();
  }
}

// One block a sequence; its row becomes the last position.
template <typename T, int kDim>
__global__ __launch_bounds__(kThreads) void append_single(AppendParams params) {
  constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  KvSequence sequence = params.sequences[blockIdx.x];
  sequence.advance(params.recorded_runs);
  const KvPageLayout& layout = params.layout;
  const int position = sequence.length - 1;
  const int t = position % kPageTokens;
  std::byte* page = sequence.page(position / kPageTokens);
  const std::byte* previous = position > 0 ? sequence.page((position - 1) / kPageTokens) : nullptr;
  const int before = (position - 1) % kPageTokens;
  const std::int64_t row = static_cast<std::int64_t>(sequence.row) * layout.kv_heads * layout.dim;
  const T* k = static_cast<const T*>(params.k) + row;
  const T* v = static_cast<const T*>(params.v) + row;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < layout.kv_heads * layout.dim; i += kThreads) {
    const int g = i / layout.dim;
    const int d = i % layout.dim;
    reinterpret_cast<T*>(page + layout.keys(g) + key_chunk<T>(d, t / kSize))[t % kSize] = k[i];
    reinterpret_cast<T*>(page + layout.values(g) + value_chunk<T, kDim>(t, d / kSize))[d % kSize] =
        v[i];
  }
  for (int h = thread; h < layout.gate_heads; h += kThreads) {
    double sum = 0;
    if (previous != nullptr) {
      sum =
          static_cast<double>(reinterpret_cast<const float*>(previous + layout.gates(h))[before]) +
          reinterpret_cast<const float*>(previous + layout.low_gates(h))[before];
    }
    sum += params.log_gates[static_cast<std::int64_t>(sequence.row) * layout.gate_heads + h];
    const SplitSum split(sum);
    float_at(page, layout.gates(h), t) = split.high;
    float_at(page, layout.low_gates(h), t) = split.low;
  }
  if (!layout.has_norms) return;
  for (int g = thread; g < layout.kv_heads; g += kThreads) {
    float squares = 0;
    for (int d = 0; d < layout.dim; ++d) {
      const auto x = static_cast<float>(k[g * layout.dim + d]);
      squares += x * x;
    }
    const float greatest = previous != nullptr
                               ? reinterpret_cast<const float*>(previous + layout.norms(g))[before]
                               : 0;
    float_at(page, layout.norms(g), t) = fmaxf(greatest, sqrtf(squares));
  }
}

template <typename T, int kDim>
void launch(const AppendParams& params, const AppendTile* tiles, int tile_count,
            cudaStream_t stream) {
  if (tiles == nullptr) {
    append_single<T, kDim><<<params.sequence_count, kThreads, 0, stream>>>(params);
    return;
  }
  const dim3 grid(static_cast<unsigned>(tile_count), static_cast<unsigned>(params.layout.kv_heads));
  append_rows<T, kDim><<<grid, kThreads, 0, stream>>>(params, tiles);
  const int scans =
      params.layout.gate_heads + (params.layout.has_norms ? params.layout.kv_heads : 0);
  if (scans == 0) return;
  const dim3 heads(static_cast<unsigned>(scans), static_cast<unsigned>(params.sequence_count));
  scan_rows<<<heads, kScanThreads, 0, stream>>>(params);
}

template <typename T>
void launch(const AppendParams& params, const AppendTile* tiles, int tile_count,
            cudaStream_t stream) {
  switch (padded_dim(params.layout.dim)) {
    case 32:
      return launch<T, 32>(params, tiles, tile_count, stream);
    case 64:
      return launch<T, 64>(params, tiles, tile_count, stream);
    default:
      return launch<T, 128>(params, tiles, tile_count, stream);
  }
}

}  // namespace

void launch_kv_append(const AppendParams& params, const AppendTile* tiles, int tile_count,
                      bool bf16, cudaStream_t stream) {
  if (bf16) {
    launch<__nv_bfloat16>(params, tiles, tile_count, stream);
  } else {
    launch<float>(params, tiles, tile_count, stream);
  }
}

void launch_kv_append_single(const AppendParams& params, bool bf16, cudaStream_t stream) {
  launch_kv_append(params, nullptr, 0, bf16, stream);
}

}  // namespace deltafox::cuda
