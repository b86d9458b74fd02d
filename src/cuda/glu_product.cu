// glu_product (glu_product.h): tiles of 128 rows of x by 128 columns of y, for which 256 rows of w
// are read.
//
// Thread blocks stay and take tiles in turn, in pairs that share the rows of w: each loads half of
// them, those of p or those of p', for both. One warp asks for tiles of 64 columns, a few ahead,
// and for the first of w before the kernel ahead has ended; two warp groups multiply 64 rows of x
// each, straight from shared memory, and store their part of p, p' and y by way of shared memory
// while the loads of the next tile are under way. Sums run over K in order.
#include <algorithm>
#include <initializer_list>

#include "cuda/glu_product.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/tile_copies.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kRows = 128;  // of a tile
constexpr int kDepth = 64;  // columns of x and w at a time: 128 bytes
constexpr int kGroups = 2;  // that multiply
constexpr int kGroupRows = kRows / kGroups;
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kPair = 2;    // blocks of a cluster
constexpr int kPanel = 64;  // columns of y that are stored at once: 128 bytes
constexpr int kPanelBytes = kGroupRows * 128;
constexpr int kRowPairs = 8;  // pairs of tiles of rows that are passed by before the next rows of x

constexpr int kColumns = 256;  // rows of w of a tile
constexpr int kOutputs = 128;  // columns of y
constexpr int kABytes = kRows * 128;
constexpr int kBBytes = kColumns * 128;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kStages = 4;
constexpr int kPanels = kOutputs / kPanel;  // that a group has in shared memory
constexpr int kOutputAt = kStages * kStageBytes;
constexpr int kBarriersAt = kOutputAt + kGroups * kPanels * kPanelBytes;
constexpr int kBytes = kBarriersAt + 2 * kStages * 8 + 1024;  // and to align
static_assert(kBytes <= 227 * 1024);

struct GluProductParams {
  CUtensorMap x;         // [T, K]
  CUtensorMap w;         // [2N, K]
  CUtensorMap gate, up;  // of [T, 2N] each a half
  CUtensorMap y;         // [T, N]
  int rows;              // T
  int outputs;           // N
  int depth;             // K
  bool early;
};

// What is stored.
enum class Stored { kOutput, kGateUp, kBoth };

// To about 20 bits: the result is rounded to bfloat16.
__device__ inline float gated(float gate, float up) {
  return __fdividef(gate, 1 + __expf(-gate)) * up;
}

// A pair's tiles: some rows of x by all of w, then the next rows.
struct Tile {
  int row;     // of x, the block's first
  int output;  // column of y

  __device__ Tile(const GluProductParams& p, int index, int rank) {
    const int pairs = (p.rows + kPair * kRows - 1) / (kPair * kRows);
    const int across = (p.outputs + kOutputs - 1) / kOutputs;
    const int first = index / (kRowPairs * across) * kRowPairs;
    const int here = min(kRowPairs, pairs - first);
    const int in_group = index - first * across;
    row = ((first + in_group % here) * kPair + rank) * kRows;
    output = in_group / here * kOutputs;
  }
};

template <Stored kStored>
__global__ void __launch_bounds__(kThreads, 1)
    glu_product_kernel(const __grid_constant__ GluProductParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ unsigned char memory[];
  unsigned char* shared = memory + (1024 - sm90::shared_address(memory) % 1024) % 1024;
  auto* full = reinterpret_cast<std::uint64_t*>(shared + kBarriersAt);
  auto* empty = full + kStages;
  const int rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(full + s, 1);
      sm90::barrier_init(empty + s, kPair * kGroups * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();

  const int pairs = (p.rows + kPair * kRows - 1) / (kPair * kRows);
  const int tiles = pairs * ((p.outputs + kOutputs - 1) / kOutputs);
  const int step = static_cast<int>(gridDim.x) / kPair;
  const int first_tile = static_cast<int>(blockIdx.x) / kPair;
  const int depths = (p.depth + kDepth - 1) / kDepth;
  int stage = 0;
  int round = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, ++round;
  };
  if (threadIdx.x >= kGroups * 128) {
    sm90::shrink_registers<40>();
    if (threadIdx.x == kGroups * 128) {
      const auto load_w = [&](const Tile& tile, int d, int to) {
        sm90::barrier_arrive_expect(full + to, kStageBytes);
        load_shared_tile(shared + to * kStageBytes + kABytes + rank * (kBBytes / 2),  // its half
                         p.w, d * kDepth, tile.output + rank * p.outputs, full + to);
      };
      const int ahead = p.early && first_tile < tiles ? min(kStages, depths) : 0;
      for (int d = 0; d < ahead; ++d) load_w(Tile(p, first_tile, rank), d, d);
      wait_for_input();
      for (int index = first_tile; index < tiles; index += step) {
        const Tile tile(p, index, rank);
        for (int d = 0; d < depths; ++d) {
          if (round > 0) sm90::barrier_wait(empty + stage, (round - 1) & 1);
          if (index != first_tile || d >= ahead) load_w(tile, d, stage);
          load_tile(shared + stage * kStageBytes, p.x, d * kDepth, tile.row, full + stage);
          advance();
        }
      }
    }
  } else {
    sm90::grow_registers<232>();
    wait_for_input();
    const int group = static_cast<int>(threadIdx.x) / 128;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const sm90::Descriptor a(shared + group * kGroupRows * 128, sm90::Swizzle::k128, 1024, 0);
    const sm90::Descriptor b(shared + kABytes, sm90::Swizzle::k128, 1024, 0);
    unsigned char* output = shared + kOutputAt + group * kPanels * kPanelBytes;
    const auto release = [&](int of) {
      if (lane < kPair) arrive_at(empty + of, lane);
    };
    float acc[kColumns / 2];
    for (int index = first_tile; index < tiles; index += step) {
      const Tile tile(p, index, rank);
      int before = 0;
      for (int d = 0; d < depths; ++d) {
        sm90::barrier_wait(full + stage, round & 1);
        sm90::wgmma_fence();
        sm90::pin(acc);
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          const int at = stage * kStageBytes + 32 * k;
          sm90::wgmma_rows(acc, a.at(at), b.at(at), d > 0 || k > 0 ? 1 : 0);
        }
        sm90::wgmma_commit();
        if (d > 0) {
          sm90::wgmma_wait<1>();
          release(before);
        }
        before = stage;
        advance();
      }
      const int row = tile.row + group * kGroupRows;
      sm90::wgmma_wait<0>();
      sm90::pin(acc);
      release(before);
      const int matrix = lane / 8;
      const int store_row = warp * 16 + matrix % 2 * 8 + lane % 8;
      constexpr int kUp = kOutputs / 2;  // registers on
      const auto store = [&](const CUtensorMap& map, const auto& value) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          unsigned char* to = output + panel * kPanelBytes;
          // What was stored from this panel last has been read.
          if (threadIdx.x % 128 == 0) {
            asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPanels - 1) : "memory");
          }
          sm90::sync_warpgroup(1 + group);
#pragma unroll
          for (int j = 0; j < kPanel / 8; j += 2) {
            std::uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = 4 * (panel * kPanel / 8 + j + i / 2) + 2 * (i % 2);
              v[i] = pack(value(at), value(at + 1));
            }
            const int chunk = (j + matrix / 2) ^ store_row % 8;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             sm90::shared_address(to + store_row * 128 + chunk * 16)),
                         "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                         : "memory");
          }
          sm90::fence_async_proxy();
          sm90::sync_warpgroup(1 + group);
          if (threadIdx.x % 128 == 0) {
            const int column = tile.output + panel * kPanel;
            if (row < p.rows && column < p.outputs) store_tile(map, column, row, to);
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
          }
        }
      };
      if constexpr (kStored != Stored::kOutput) {
        store(p.gate, [&](int at) { return acc[at]; });
        store(p.up, [&](int at) { return acc[at + kUp]; });
      }
      if constexpr (kStored != Stored::kGateUp)
        store(p.y, [&](int at) { return gated(acc[at], acc[at + kUp]); });
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();
  sync_cluster();  // the other block may still write to this one's memory
#endif
}

bool fits(Context& ctx, std::initializer_list<ConstTensorView> matrices, std::int64_t outputs) {
  for (const ConstTensorView& matrix : matrices) {
    if (matrix.data == nullptr) continue;
    if (matrix.dtype != DType::kBF16 || !has_tiles(matrix)) return false;
  }
  return ctx.stream().major() == 9 && outputs % 8 == 0;
}

template <Stored kStored>
void launch(Context& ctx, const char* op, const GluProductParams& p) {
  const auto kernel = glu_product_kernel<kStored>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  const int pairs = (p.rows + kPair * kRows - 1) / (kPair * kRows);
  const int tiles = pairs * ((p.outputs + kOutputs - 1) / kOutputs);
  const int clusters = std::min(tiles, ctx.stream().multiprocessors() / kPair);
  launch_dependent<kPair>(ctx, op, kernel, dim3(static_cast<unsigned>(clusters * kPair)), kThreads,
                          kBytes, p);
}

}  // namespace

bool glu_product(Context& ctx, const ConstTensorView& x, const ConstTensorView& w,
                 const TensorView& gate_up, const TensorView& y, bool early) {
  const std::int64_t outputs = w.shape[0] / 2;
  if (!fits(ctx, {x, w, gate_up, y}, outputs)) return false;
  GluProductParams p{};
  p.x = map_of(x, x.shape[1], kRows);
  p.w = map_of(w, w.shape[1], kColumns / 2);
  p.rows = static_cast<int>(x.shape[0]);
  p.outputs = static_cast<int>(outputs);
  p.depth = static_cast<int>(x.shape[1]);
  p.early = early;
  if (y.data != nullptr) p.y = map_of(y, outputs, kGroupRows);
  if (gate_up.data == nullptr) {
    launch<Stored::kOutput>(ctx, "linear_glu", p);
    return true;
  }
  ConstTensorView up = gate_up;
  up.data = static_cast<const bf16*>(up.data) + outputs;
  p.gate = map_of(gate_up, outputs, kGroupRows);
  p.up = map_of(up, outputs, kGroupRows);
  if (y.data == nullptr) {
    launch<Stored::kGateUp>(ctx, "linear_glu", p);
  } else {
    launch<Stored::kBoth>(ctx, "linear_glu", p);
  }
  return true;
}

}  // namespace deltafox::cuda
