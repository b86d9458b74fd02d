// y = x wᵀ of packed w (packed.cuh) for more rows of x than a step has and fewer than make it worth
// to unpack w, on sm_90.
//
// A thread block has 64 rows of x and 8 panels of w, a warp one of them. Blocks of a cluster share
// K between them, by blocks of 256 columns; x comes to shared memory a block at a time, w straight
// to registers. As in step_packed.cu integers are multiplied and the sums of a block scaled. At the
// end every thread block adds up some rows of all partial sums of its cluster, in order. Where K is
// cut depends on N, K and the card, not on the rows.
#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed.h"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64;  // of x
constexpr int kEights = kRows / 8;
constexpr int kTileRows = kWarps * kPackedRows;  // of w
constexpr int kSteps = kPackedBlock / kPackedColumns;
constexpr int kStages = 2;
// Elements between rows of x: two rows of four lanes hit all banks once.
constexpr int kStride = kPackedBlock + 32;
constexpr int kStageBytes = kRows * kStride * 2;
constexpr int kSumStride = kTileRows + 4;
constexpr int kBytes = kStages * kStageBytes;
static_assert(kRows * kSumStride * 4 <= kBytes);
constexpr int kMaxCluster = 8;

struct ProductParams {
  const bf16* x;
  PackedMatrix w;
  Elements y;
  int rows;
  int stride;  // of y
  int cluster;
  bool accumulate;
};

// 16 bytes, or zeros.
__device__ inline void copy_vector(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

template <bool kFourBits>
__global__ void __launch_bounds__(kThreads, 1)
    packed_product_kernel(const __grid_constant__ ProductParams p) {
#if __CUDA_ARCH__ >= 900  // elsewhere it is never launched
  namespace cg = cooperative_groups;
  using Form = PackedForm<kFourBits>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int tile = static_cast<int>(blockIdx.x) / p.cluster;
  const int first_row = static_cast<int>(blockIdx.y) * kRows;
  const int blocks = (p.w.columns + kPackedBlock - 1) / kPackedBlock;
  const int begin = blocks * rank / p.cluster;
  const int end = blocks * (rank + 1) / p.cluster;
  const int panel = tile * kWarps + warp;
  const bool exists = panel * kPackedRows < p.w.rows;
  const std::byte* weights = p.w.data + static_cast<std::int64_t>(panel) * p.w.panel_bytes;

  const auto load = [&](PackedOperand<kFourBits>& to, int block, int step) {
    to = {};  // x is zero there
    if (exists && block < end && block * kPackedBlock + step * kPackedColumns < p.w.columns) {
      to = load_operand<kFourBits>(weights + static_cast<std::int64_t>(block) * Form::kBlockBytes,
                                   step, lane);
    }
  };
  PackedOperand<kFourBits> ahead[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load(ahead[step], begin, step);
  wait_for_input();

  const auto stage_of = [&](int block) {
    return reinterpret_cast<bf16*>(shared + (block - begin) % kStages * kStageBytes);
  };
  const auto stage_block = [&](int block) {
    if (block < end) {
      bf16* to = stage_of(block);
      for (int v = static_cast<int>(threadIdx.x); v < kRows * kPackedBlock / 8; v += kThreads) {
        const int row = v / (kPackedBlock / 8);
        const int column = v % (kPackedBlock / 8) * 8;
        const int from = block * kPackedBlock + column;
        const bool there = first_row + row < p.rows && from < p.w.depth;
        copy_vector(
            to + row * kStride + column,
            there ? p.x + static_cast<std::int64_t>(first_row + row) * p.w.depth + from : p.x,
            there);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  stage_block(begin);
  stage_block(begin + 1);

  float c[kEights][4] = {};
  for (int block = begin; block < end; ++block) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    const bf16* x = stage_of(block) + lane / 4 * kStride + lane % 4 * 8;
    const float2 scales = ahead[0].scales;
    float sums[kEights][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const EightColumns low = ahead[step].low(step);
      const EightColumns high = ahead[step].high(step);
      load(ahead[step], block + 1, step);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        const uint4 b =
            *reinterpret_cast<const uint4*>(x + j * 8 * kStride + step * kPackedColumns);
        multiply(sums[j], low.pairs[0], high.pairs[0], low.pairs[1], high.pairs[1], b.x, b.y);
        multiply(sums[j], low.pairs[2], high.pairs[2], low.pairs[3], high.pairs[3], b.z, b.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[j][e] = fmaf(sums[j][e], e < 2 ? scales.x : scales.y, c[j][e]);
      }
    }
    __syncthreads();
    stage_block(block + kStages);
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");

  auto* partial = reinterpret_cast<float*>(shared);  // [kRows][kSumStride]
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int b = j * 8 + lane % 4 * 2 + e % 2;
      partial[b * kSumStride + warp * kPackedRows + lane / 4 + e / 2 * 8] = c[j][e];
    }
  }
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  const int n = tile * kTileRows + static_cast<int>(threadIdx.x) % kTileRows;
  const int end_row = min(kRows, p.rows - first_row);
  constexpr int kAtOnce = kThreads / kTileRows;
  for (int b = rank * kAtOnce + static_cast<int>(threadIdx.x) / kTileRows; b < end_row;
       b += p.cluster * kAtOnce) {
    if (n >= p.w.rows) break;
    const int at = b * kSumStride + static_cast<int>(threadIdx.x) % kTileRows;
    float sum = 0;
    for (int r = 0; r < p.cluster; ++r) sum += cluster.map_shared_rank(partial, r)[at];
    const std::int64_t to = static_cast<std::int64_t>(first_row + b) * p.stride + n;
    if (p.accumulate) sum += p.y.get(to);
    p.y.put(to, sum);
  }
  cluster.sync();  // others read this one's memory
#endif
}

}  // namespace

bool packed_product(Context& ctx, const LinearArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  if (ctx.stream().major() < 9 || rows > kPackedProductRows || args.w.shape[1] % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(args.x.data) % 16 != 0) {
    return false;
  }
  ProductParams p{.x = static_cast<const bf16*>(args.x.data),
                  .w = PackedMatrix(args.w),
                  .y = Elements(args.y),
                  .rows = static_cast<int>(rows),
                  .stride = static_cast<int>(args.y.shape[1]),
                  .cluster = 1,
                  .accumulate = args.accumulate};
  const int tiles = (p.w.rows + kTileRows - 1) / kTileRows;
  const int blocks = (p.w.columns + kPackedBlock - 1) / kPackedBlock;
  p.cluster = std::clamp(ctx.stream().multiprocessors() / tiles, 1, std::min(kMaxCluster, blocks));
  const auto kernel = p.w.four_bits ? packed_product_kernel<true> : packed_product_kernel<false>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(p.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles * p.cluster),
                        static_cast<unsigned>((rows + kRows - 1) / kRows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "packed_product");
  return true;
}

}  // namespace deltafox::cuda
