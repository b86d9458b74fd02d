// sum_product (sum_product.h): tiles of 128 rows of x by 192 rows of w.
//
// As glu_product.cu has it, thread blocks work in pairs, one warp asks for tiles ahead, two warp
// groups multiply 64 rows each. A warp's sums go to shared memory, from where copies add them to y
// while the next tile is multiplied: nothing waits for what y was. Each element is added to once,
// so there is one order.
//
// Pairs share rows of w, each block loading half of them for both, and stay to take tiles in turn.
// Where there are too few tiles to fill the card, the blocks of a cluster share a tile instead:
// each takes a part of K, then of the rows, whose sums it gets from the others.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sum_product.h"
#include "cuda/tile_copies.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kRows = 128;  // of a tile
constexpr int kDepth = 64;  // columns of x and w at a time: 128 bytes
constexpr int kColumns = 192;
constexpr int kGroups = 2;  // that multiply
constexpr int kGroupRows = kRows / kGroups;
constexpr int kWarps = 4 * kGroups;
constexpr int kWarpRows = kRows / kWarps;
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kPair = 2;           // blocks that share rows of w
constexpr int kPanelColumns = 32;  // of y: 128 bytes
constexpr int kPanels = kColumns / kPanelColumns;
constexpr int kPanelBytes = kWarpRows * 128;
constexpr int kRowTiles = 16;  // that are passed by before the next rows of x
constexpr int kABytes = kRows * 128;
constexpr int kBBytes = kColumns * 128;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kStages = 3;
constexpr int kPanelsAt = kStages * kStageBytes;
constexpr int kBarriersAt = kPanelsAt + kWarps * kPanels * kPanelBytes;
constexpr int kBytes = kBarriersAt + 2 * kStages * 8 + 1024;  // and to align
static_assert(kBytes <= 227 * 1024);
constexpr int kSumVectors = kColumns / 8;  // of 16 bytes, of a thread's sums

struct SumProductParams {
  CUtensorMap x;  // [T, K]
  CUtensorMap w;  // [N, K]
  CUtensorMap y;  // [T, N]
  int rows;       // T
  int outputs;    // N
  int depth;      // K
  bool early;
};

// Blocks of a cluster: pairs, or as many as share a tile.
template <int kParts>
constexpr int kCluster = kParts == 1 ? kPair : kParts;

// Tiles of a cluster, of which pairs have two, one below the other.
template <int kParts>
__host__ __device__ int tiles_of(int rows, int outputs) {
  constexpr int kDown = kParts == 1 ? kPair * kRows : kRows;
  return (rows + kDown - 1) / kDown * ((outputs + kColumns - 1) / kColumns);
}

// Some rows of x by all of w, then the next rows.
template <int kParts>
struct Tile {
  int row;     // of x, the block's first
  int output;  // column of y

  __device__ Tile(const SumProductParams& p, int index, int rank) {
    constexpr int kOfCluster = kParts == 1 ? kPair : 1;
    constexpr int kAtOnce = kRowTiles / kOfCluster;
    const int across = (p.outputs + kColumns - 1) / kColumns;
    const int down = tiles_of<kParts>(p.rows, kColumns);
    const int first = index / (kAtOnce * across) * kAtOnce;
    const int here = min(kAtOnce, down - first);
    const int in_group = index - first * across;
    row = ((first + in_group % here) * kOfCluster + (kParts == 1 ? rank : 0)) * kRows;
    output = in_group / here * kColumns;
  }
};

// y += what lies in a panel.
__device__ inline void add_panel(const CUtensorMap& map, int column, int row, const void* from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], "
      "[%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(sm90::shared_address(from))
      : "memory");
}

__device__ inline void store_to_block(void* to, int rank, const float4& v) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};\n"
      "}\n" ::"r"(sm90::shared_address(to)),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

// Adds a warp's rows to y, by way of its panels.
__device__ inline void add_rows(const SumProductParams& p, const float (&acc)[kColumns / 2],
                                int row, int output, unsigned char* panels) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The copies of the tile before have read them.
  if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int chunk = (j % 4 * 2 + lane % 4 / 2) ^ lane / 4;  // rows 8 below have the same
    unsigned char* to = panels + j / 4 * kPanelBytes + lane / 4 * 128 + chunk * 16 + lane % 2 * 8;
    *reinterpret_cast<float2*>(to) = make_float2(acc[4 * j], acc[4 * j + 1]);
    *reinterpret_cast<float2*>(to + 8 * 128) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
  }
  sm90::fence_async_proxy();
  __syncwarp();
  if (lane == 0 && row < p.rows) {
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = output + panel * kPanelColumns;
      if (column < p.outputs) add_panel(p.y, column, row, panels + panel * kPanelBytes);
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

template <int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    sum_product_kernel(const __grid_constant__ SumProductParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)   // elsewhere it is never launched
  constexpr bool kShared = kParts == 1;  // rows of w, by a pair
  extern __shared__ unsigned char memory[];
  unsigned char* shared = memory + (1024 - sm90::shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<std::uint64_t*>(shared + kBarriersAt);
  auto* empty = full + kStages;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(full + s, 1);
      sm90::barrier_init(empty + s, (kShared ? kPair : 1) * kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();

  const int tiles = tiles_of<kParts>(p.rows, p.outputs);
  const int step = static_cast<int>(gridDim.x) / kCluster<kParts>;
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster<kParts>;
  const int depths = (p.depth + kDepth - 1) / kDepth;
  const int begin = kShared ? 0 : depths * rank / kParts;
  const int end = kShared ? depths : depths * (rank + 1) / kParts;
  int stage = 0;
  int round = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, ++round;
  };
  // The compiler is to know that a warp does one or the other.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (warp >= kWarps) {
    sm90::shrink_registers<40>();
    if (warp == kWarps && lane == 0) {
      const auto load_w = [&](const Tile<kParts>& tile, int d, int to) {
        unsigned char* b = shared + to * kStageBytes + kABytes;
        sm90::barrier_arrive_expect(full + to, kStageBytes);
        if (kShared) {
          load_shared_tile(b + rank * (kBBytes / 2), p.w, d * kDepth,
                           tile.output + rank * (kColumns / 2), full + to);
        } else {
          load_tile(b, p.w, d * kDepth, tile.output, full + to);
        }
      };
      const int ahead = p.early && first_tile < tiles ? min(kStages, end - begin) : 0;
      for (int i = 0; i < ahead; ++i) load_w(Tile<kParts>(p, first_tile, rank), begin + i, i);
      wait_for_input();
      for (int index = first_tile; index < tiles; index += step) {
        const Tile<kParts> tile(p, index, rank);
        for (int d = begin; d < end; ++d) {
          if (round > 0) sm90::barrier_wait(empty + stage, (round - 1) & 1);
          if (index != first_tile || d - begin >= ahead) load_w(tile, d, stage);
          load_tile(shared + stage * kStageBytes, p.x, d * kDepth, tile.row, full + stage);
          advance();
        }
      }
    }
    __syncwarp();
    if (!kShared) {  // with the groups that multiply
      sync_cluster();
      sync_cluster();
    }
  } else {
    sm90::grow_registers<232>();
    wait_for_input();
    const sm90::Descriptor a(shared + warp / 4 * kGroupRows * 128, sm90::Swizzle::k128, 1024, 0);
    const sm90::Descriptor b(shared + kABytes, sm90::Swizzle::k128, 1024, 0);
    const auto release = [&](int of) {
      if (kShared) {
        if (lane < kPair) arrive_at(empty + of, lane);
      } else if (lane == 0) {
        sm90::barrier_arrive(empty + of);
      }
    };
    unsigned char* panels = shared + kPanelsAt + warp * kPanels * kPanelBytes;
    float acc[kColumns / 2];
    for (int index = first_tile; index < tiles; index += step) {
      const Tile<kParts> tile(p, index, rank);
      int before = 0;
      for (int d = begin; d < end; ++d) {
        sm90::barrier_wait(full + stage, round & 1);
        sm90::wgmma_fence();
        sm90::pin(acc);
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          const int at = stage * kStageBytes + 32 * k;
          sm90::wgmma_rows(acc, a.at(at), b.at(at), d > begin || k > 0 ? 1 : 0);
        }
        sm90::wgmma_commit();
        if (d > begin) {
          sm90::wgmma_wait<1>();
          release(before);
        }
        before = stage;
        advance();
      }
      sm90::wgmma_wait<0>();
      sm90::pin(acc);
      release(before);

      if constexpr (!kShared) {
        // A cluster has one tile: its stages are free once all of its blocks have multiplied. The
        // sums of a block's warps from the other blocks, in their order:
        constexpr int kOwnWarps = kWarps / kParts;
        auto* sums = reinterpret_cast<float4*>(shared) + warp % kOwnWarps * kSumVectors * 32 + lane;
        constexpr int kOfBlock = kOwnWarps * kSumVectors * 32;
        const int owner = warp / kOwnWarps;
        sync_cluster();
        if (rank != owner) {
          float4* to = sums + (rank - (rank > owner ? 1 : 0)) * kOfBlock;
#pragma unroll
          for (int i = 0; i < kSumVectors; ++i) {
            store_to_block(to + i * 32, owner,
                           make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
          }
        }
        sync_cluster();
        if (rank != owner) break;
#pragma unroll 1
        for (int other = 0; other < kParts - 1; ++other) {
#pragma unroll
          for (int i = 0; i < kSumVectors; ++i) {
            const float4 v = sums[other * kOfBlock + i * 32];
            acc[4 * i] += v.x, acc[4 * i + 1] += v.y, acc[4 * i + 2] += v.z, acc[4 * i + 3] += v.w;
          }
        }
      }
      add_rows(p, acc, tile.row + warp * kWarpRows, tile.output, panels);
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (kShared) {
    __syncwarp();
    sync_cluster();  // the other block may still write to this one's memory
  }
#endif
}

template <int kParts>
void launch(Context& ctx, const ConstTensorView& x, const ConstTensorView& w, const TensorView& y,
            bool early) {
  const std::int64_t outputs = w.shape[0];
  SumProductParams p{};
  p.x = map_of(x, x.shape[1], kRows);
  p.w = map_of(w, w.shape[1], kParts == 1 ? kColumns / 2 : kColumns);
  p.y = map_of(y, outputs, kWarpRows);
  p.rows = static_cast<int>(x.shape[0]);
  p.outputs = static_cast<int>(outputs);
  p.depth = static_cast<int>(x.shape[1]);
  p.early = early;
  const auto kernel = sum_product_kernel<kParts>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  const int tiles = tiles_of<kParts>(p.rows, p.outputs);
  const int clusters =
      kParts == 1 ? std::min(tiles, ctx.stream().multiprocessors() / kPair) : tiles;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster<kParts>, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster<kParts>));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "linear");
}

}  // namespace

bool sum_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& y, std::int64_t bucket, bool early) {
  constexpr int kMostParts = 4;
  for (const ConstTensorView& matrix : {x, w, ConstTensorView(y)}) {
    if (!has_tiles(matrix)) return false;
  }
  if (ctx.stream().major() != 9 || x.dtype != DType::kBF16 || w.dtype != DType::kBF16 ||
      y.dtype != DType::kF32 || x.shape[1] <= (kMostParts - 1) * kDepth) {
    return false;
  }
  // Parts of K that fill the card with the tiles of a whole bucket.
  const int tiles = tiles_of<2>(static_cast<int>(bucket), static_cast<int>(w.shape[0]));
  const int parts = ctx.stream().multiprocessors() / tiles;
  if (parts >= 4) {
    launch<4>(ctx, x, w, y, early);
  } else if (parts >= 2) {
    launch<2>(ctx, x, w, y, early);
  } else {
    launch<1>(ctx, x, w, y, early);
  }
  return true;
}

}  // namespace deltafox::cuda
