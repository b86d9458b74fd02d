// sum_product (sum_product.h): tiles of 128 rows of x by kColumns rows of w.
//
// As glu_product.cu has it, thread blocks work in pairs, one warp asks for tiles ahead, two warp
// groups multiply 64 rows each. Their sums go to shared memory in panels of 32 columns, from where
// copies add them to y: nothing waits for what y was. Each element is added to once, so there is
// one order.
//
// Pairs share rows of w, each block loading half of them for both, and stay to take tiles in turn.
// Where there are too few tiles to fill the card, a pair shares a tile instead: each block takes
// half of K, gives the other its sums of one warp group's rows and adds up those of its own.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sum_product.h"
#include "cuda/tile_copies.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kRows = 128;  // of a tile
constexpr int kDepth = 64;  // columns of x and w at a time: 128 bytes
constexpr int kGroups = 2;  // that multiply
constexpr int kGroupRows = kRows / kGroups;
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kPair = 2;           // blocks of a cluster
constexpr int kPanelColumns = 32;  // of y: 128 bytes
constexpr int kPanelBytes = kGroupRows * 128;
constexpr int kPanels = 2;    // of a group, in turns
constexpr int kRowPairs = 8;  // pairs of tiles of rows that are passed by before the next rows of x

struct SumProductParams {
  CUtensorMap x;  // [T, K]
  CUtensorMap w;  // [N, K]
  CUtensorMap y;  // [T, N]
  int rows;       // T
  int outputs;    // N
  int depth;      // K
  bool early;
};

template <int kColumns>
struct Layout {
  static constexpr int kABytes = kRows * 128;
  static constexpr int kBBytes = kColumns * 128;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kStages =
      std::min(6, (227 * 1024 - 1280 - kGroups * kPanels * kPanelBytes) / kStageBytes);
  static constexpr int kPanelsAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kPanelsAt + kGroups * kPanels * kPanelBytes;
  static constexpr int kBytes = kBarriersAt + 2 * kStages * 8 + 1024;  // and to align
  static_assert(kBytes <= 227 * 1024);
};

// Pairs of tiles of rows, or, where a pair has one, tiles.
template <bool kSplit>
__host__ __device__ int row_tiles(int rows) {
  constexpr int kOfPair = kSplit ? kRows : kPair * kRows;
  return (rows + kOfPair - 1) / kOfPair;
}

// A pair's tiles: some rows of x by all of w, then the next rows.
template <int kColumns, bool kSplit>
struct Tile {
  int row;     // of x, the block's first
  int output;  // column of y

  __device__ Tile(const SumProductParams& p, int index, int rank) {
    const int down = row_tiles<kSplit>(p.rows);
    const int across = (p.outputs + kColumns - 1) / kColumns;
    const int first = index / (kRowPairs * across) * kRowPairs;
    const int here = min(kRowPairs, down - first);
    const int in_group = index - first * across;
    row = (first + in_group % here) * kRows;
    if (!kSplit) row = row * kPair + rank * kRows;
    output = in_group / here * kColumns;
  }
};

// y += what lies in a panel of 64 rows.
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

// Adds a warp group's 64 rows to y, by way of its panels.
template <int kColumns>
__device__ void add_rows(const SumProductParams& p, const float (&acc)[kColumns / 2], int row,
                         int output, unsigned char* panels, int group) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % 32;
  const int panel_row = thread / 32 * 16 + lane / 4;  // and 8 below
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    unsigned char* to = panels + panel % kPanels * kPanelBytes;
    // The copy before the last has read this panel.
    if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    sm90::sync_warpgroup(1 + group);
#pragma unroll
    for (int j = 0; j < kPanelColumns / 8; ++j) {
      const int at = (panel * (kPanelColumns / 8) + j) * 4;
      const int chunk = (2 * j + lane % 4 / 2) ^ lane / 4;  // rows 8 below have the same
      unsigned char* element = to + panel_row * 128 + chunk * 16 + lane % 2 * 8;
      *reinterpret_cast<float2*>(element) = make_float2(acc[at], acc[at + 1]);
      *reinterpret_cast<float2*>(element + 8 * 128) = make_float2(acc[at + 2], acc[at + 3]);
    }
    sm90::fence_async_proxy();
    sm90::sync_warpgroup(1 + group);
    if (thread == 0) {
      const int column = output + panel * kPanelColumns;
      if (row < p.rows && column < p.outputs) add_panel(p.y, column, row, to);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

template <int kColumns, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1)
    sum_product_kernel(const __grid_constant__ SumProductParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  using L = Layout<kColumns>;
  using TileOf = Tile<kColumns, kSplit>;
  extern __shared__ unsigned char memory[];
  unsigned char* shared = memory + (1024 - sm90::shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<std::uint64_t*>(shared + L::kBarriersAt);
  auto* empty = full + L::kStages;
  const int rank = static_cast<int>(cluster_rank());
  // Whose stages a warp gives back: w is loaded for both.
  constexpr int kReaders = kSplit ? 1 : kPair;
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::kStages; ++s) {
      sm90::barrier_init(full + s, 1);
      sm90::barrier_init(empty + s, kReaders * kGroups * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();

  const int tiles = row_tiles<kSplit>(p.rows) * ((p.outputs + kColumns - 1) / kColumns);
  const int step = static_cast<int>(gridDim.x) / kPair;
  const int first_tile = static_cast<int>(blockIdx.x) / kPair;
  const int all_depths = (p.depth + kDepth - 1) / kDepth;
  const int half = (all_depths + 1) / 2;
  const int begin = kSplit && rank == 1 ? half : 0;
  const int end = kSplit && rank == 0 ? half : all_depths;
  int stage = 0;
  int round = 0;
  const auto advance = [&] {
    if (++stage == L::kStages) stage = 0, ++round;
  };
  // The compiler is to know that a warp does one or the other.
  const int group = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 128, 0);
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned char* panels = shared + L::kPanelsAt + group * kPanels * kPanelBytes;
  if (group == kGroups) {
    sm90::shrink_registers<40>();
    if (warp == 0 && lane == 0) {
      const auto load_w = [&](const TileOf& tile, int d, int to) {
        unsigned char* b = shared + to * L::kStageBytes + L::kABytes;
        sm90::barrier_arrive_expect(full + to, L::kStageBytes);
        if (kSplit) {
          load_tile(b, p.w, d * kDepth, tile.output, full + to);
        } else {
          load_shared_tile(b + rank * (L::kBBytes / 2), p.w, d * kDepth,
                           tile.output + rank * (kColumns / 2), full + to);
        }
      };
      const int ahead = p.early && first_tile < tiles ? min(L::kStages, end - begin) : 0;
      for (int i = 0; i < ahead; ++i) load_w(TileOf(p, first_tile, rank), begin + i, i);
      wait_for_input();
      for (int index = first_tile; index < tiles; index += step) {
        const TileOf tile(p, index, rank);
        for (int d = begin; d < end; ++d) {
          if (round > 0) sm90::barrier_wait(empty + stage, (round - 1) & 1);
          if (index != first_tile || d - begin >= ahead) load_w(tile, d, stage);
          load_tile(shared + stage * L::kStageBytes, p.x, d * kDepth, tile.row, full + stage);
          advance();
        }
      }
    }
    __syncwarp();
    if (kSplit) {  // with the groups that multiply
      sync_cluster();
      sync_cluster();
    }
  } else {
    sm90::grow_registers<232>();
    wait_for_input();
    const sm90::Descriptor a(shared + group * kGroupRows * 128, sm90::Swizzle::k128, 1024, 0);
    const sm90::Descriptor b(shared + L::kABytes, sm90::Swizzle::k128, 1024, 0);
    const auto release = [&](int of) {
      if (kSplit) {
        if (lane == 0) sm90::barrier_arrive(empty + of);
      } else if (lane < kPair) {
        arrive_at(empty + of, lane);
      }
    };
    float acc[kColumns / 2];
    for (int index = first_tile; index < tiles; index += step) {
      const TileOf tile(p, index, rank);
      int before = 0;
      for (int d = begin; d < end; ++d) {
        sm90::barrier_wait(full + stage, round & 1);
        sm90::wgmma_fence();
        sm90::pin(acc);
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          const int at = stage * L::kStageBytes + 32 * k;
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

      const int row = tile.row + group * kGroupRows;
      if constexpr (kSplit) {
        // A pair has one tile: its stages are free once both blocks have multiplied.
        auto* sums = reinterpret_cast<float4*>(shared) + threadIdx.x % 128;
        sync_cluster();
        if (rank != group) {
#pragma unroll
          for (int i = 0; i < kColumns / 8; ++i) {
            store_to_block(sums + i * 128, group,
                           make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
          }
        }
        sync_cluster();
        if (rank != group) break;
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) {
          const float4 other = sums[i * 128];
          acc[4 * i] += other.x, acc[4 * i + 1] += other.y;
          acc[4 * i + 2] += other.z, acc[4 * i + 3] += other.w;
        }
      }
      add_rows<kColumns>(p, acc, row, tile.output, panels, group);
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (!kSplit) {
    __syncwarp();
    sync_cluster();  // the other block may still write to this one's memory
  }
#endif
}

template <int kColumns, bool kSplit>
void launch(Context& ctx, const ConstTensorView& x, const ConstTensorView& w, const TensorView& y,
            bool early) {
  using L = Layout<kColumns>;
  const std::int64_t outputs = w.shape[0];
  SumProductParams p{};
  p.x = map_of(x, x.shape[1], kRows);
  p.w = map_of(w, w.shape[1], kSplit ? kColumns : kColumns / 2);
  p.y = map_of(y, outputs, kGroupRows);
  p.rows = static_cast<int>(x.shape[0]);
  p.outputs = static_cast<int>(outputs);
  p.depth = static_cast<int>(x.shape[1]);
  p.early = early;
  const auto kernel = sum_product_kernel<kColumns, kSplit>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes),
        "cudaFuncSetAttribute");
  const int tiles = row_tiles<kSplit>(p.rows) * ((p.outputs + kColumns - 1) / kColumns);
  const int clusters = kSplit ? tiles : std::min(tiles, ctx.stream().multiprocessors() / kPair);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kPair, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kPair));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), "linear");
}

}  // namespace

bool sum_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& y, std::int64_t bucket, bool early) {
  constexpr std::int64_t kSplitBucket = 512;    // fills half of the card with whole tiles
  constexpr std::int64_t kNarrowBucket = 1024;  // with wide ones
  for (const ConstTensorView& matrix : {x, w, ConstTensorView(y)}) {
    if (!has_tiles(matrix)) return false;
  }
  if (ctx.stream().major() != 9 || x.dtype != DType::kBF16 || w.dtype != DType::kBF16 ||
      y.dtype != DType::kF32 || x.shape[1] <= kDepth) {
    return false;
  }
  if (bucket <= kSplitBucket) {
    launch<96, true>(ctx, x, w, y, early);
  } else if (bucket <= kNarrowBucket) {
    launch<96, false>(ctx, x, w, y, early);
  } else {
    launch<192, false>(ctx, x, w, y, early);
  }
  return true;
}

}  // namespace deltafox::cuda
