// The steps of step.cu as the phases of one kernel, one thread block a multiprocessor.
//
// A step is bound by reading the weights, which do not depend on what is computed: so one warp of
// each block does nothing but ask for the block's rows of w, phase after phase, as far ahead as
// shared memory has room (a ring of pieces, each filled by one copy), and the memory is busy while
// the other warps wait for each other. Those share K between them: a warp has x of its columns in
// registers as operands of the tensor cores for the whole phase, w comes from the ring. Between two
// phases all blocks wait for all.
//
// Blocks take the same number of rows of a part of a phase, the last ones what is left, in tiles of
// up to 16 rows. Products are 16 rows of w by 8 rows of x; which elements are called k = 0, 1, ...
// does not matter to a sum as long as w and x have them in the same places, so a lane reads 16
// bytes of each at once. Sums are those of a warp's columns in order, then of the warps in order:
// they depend neither on B nor on the card.
//
// A piece of bfloat16 weights is some columns of a tile as [columns / 256][rows][256], with the 16
// bytes of each 128 in the order of 128-byte swizzles: neighbouring rows have theirs in the other
// half of the banks. Rows that the matrix does not have are zeros there.
//
// Packed weights (packed.cuh) come in whole panels of 16 rows, which are tiles. Blocks get them in
// turn, over all parts of a program: that evens out who has one more in a part. A piece is the
// bytes of some blocks of a panel.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/rows.cuh"
#include "cuda/sm90.cuh"
#include "cuda/step_program.h"
#include "cuda/tile_copies.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kWorkers = kWarps * 32;
constexpr int kThreads = kWorkers + 128;  // registers are dealt out to four warps at a time
constexpr int kTileRows = 16;
constexpr int kBlockColumns = 32 * kWarps;  // 32 of each warp
constexpr int kMaxBlocks = 16;
constexpr int kMaxColumns = kMaxBlocks * kBlockColumns;
constexpr int kPieceBlocks = 8;  // at most, of bfloat16 weights
// Of an x of float32, in programs of bfloat16 weights and in all others.
constexpr int kF32Blocks = 8;
constexpr int kWideF32Blocks = 12;
// The ring's unit: a block of a row.
constexpr int kStripBytes = kBlockColumns * 2;
constexpr int kPieces = 32;  // in the ring at most
// Strips that are under way at most, if not of one piece: more would wait in queues, and what
// blocks tell each other behind them.
constexpr int kStripsUnderWay = 6 * kTileRows;
constexpr int kDim = static_cast<int>(kStepHeadDim);
constexpr int kUnitColumns = 16;  // of a head's state
constexpr int kUnits = 4;         // of a half of the workers, at once
constexpr int kPhaseVectors = sizeof(StepPhase) / 16;
static_assert(kTileRows == kPackedRows && kBlockColumns == kPackedBlock);
static_assert(2 * kPieceBlocks == kMaxBlocks);

struct Counters {
  unsigned arrived;
  unsigned exited;
};

// A block's part of a phase.
struct Slice {
  int first;  // row
  int rows;
  int tiles;
};

// Of a tile's sums: stores of a warp's fragment hit all banks once.
constexpr int kSumStride = kTileRows + 4;

struct DeltaScratch {
  float q[kUnits][kDim];
  float k[kUnits][kDim];
  float sums_q[kUnits][4][kUnitColumns];
  float sums_k[kUnits][4][kUnitColumns];
  float dots[kUnits][4][4];
};

template <int kValue>
using Int = std::integral_constant<int, kValue>;

constexpr int kGroupTiles = 4;  // whose sums are taken at once
constexpr int kPhases = 3;  // in shared memory: that of the slowest warp, the fastest's, the next

// kHalves: of up to eight sequences. kAny: weights may be packed, x of float32 wide.
template <int kHalves, bool kAny>
struct Shared {
  static constexpr int kMaxF32Columns = (kAny ? kWideF32Blocks : kF32Blocks) * kBlockColumns;
  static constexpr int kStrips = (kHalves == 1 ? 384 : 342) - (kAny ? 12 : 0);
  alignas(1024) unsigned char ring[kStrips * kStripBytes];
  union {
    float sums[kGroupTiles][kWarps][8 * kHalves][kSumStride];
    DeltaScratch delta[2];
  };
  alignas(16) float norm[kMaxF32Columns];  // its weights; a warp writes what it reads
  float group_squares[kMaxF32Columns / 32][8 * kHalves];
  float warp_squares[kWarps][8 * kHalves];
  StepPhase phases[kPhases];          // of the workers
  Slice slices[kPhases][kStepParts];  // of their parts
  StepPhase coming[2];                // of the warp that asks for weights
  std::uint64_t full[kPieces];
  std::uint64_t empty[kPieces];
};

__device__ inline int tiles_of(const StepPart& part, const Slice& slice) {
  return part.epilogue == StepEpilogue::kGlu ? 2 * slice.tiles : slice.tiles;
}

__device__ inline Slice slice_of(const StepPart& part) {
  if (is_packed(part.form)) {
    const auto blocks = static_cast<int>(gridDim.x);
    int first = static_cast<int>(blockIdx.x) - part.turn;
    if (first < 0) first += blocks;
    const int panels = (part.rows + kTileRows - 1) / kTileRows;
    const int own = first < panels ? (panels - first + blocks - 1) / blocks : 0;
    return {first * kTileRows, own * kTileRows, own};
  }
  const int first = static_cast<int>(blockIdx.x) * part.share;
  const int rows = max(min(part.share, part.rows - first), 0);
  return {first, rows, (rows + part.tile_rows - 1) / part.tile_rows};
}

// Rows of tile `tile` of a part: with kGlu tiles 2j and 2j + 1 are rows of p and the same of p'.
__device__ inline Slice rows_of_tile(const StepPart& part, const Slice& slice, int tile) {
  const bool glu = part.epilogue == StepEpilogue::kGlu;
  const int begin = (glu ? tile / 2 : tile) * part.tile_rows;
  const int behind = glu && tile % 2 == 1 ? part.rows : 0;  // the rows of p
  if (is_packed(part.form)) {
    const int first = slice.first + begin * static_cast<int>(gridDim.x);
    return {first + behind, min(kTileRows, part.rows - first), 1};
  }
  return {slice.first + begin + behind, min(static_cast<int>(part.tile_rows), slice.rows - begin),
          1};
}

__device__ inline int packed_block_bytes(DType form) {
  return form == DType::kQ4 ? PackedForm<true>::kBlockBytes : PackedForm<false>::kBlockBytes;
}
__device__ constexpr int packed_piece_blocks(DType form) {  // at most
  return form == DType::kQ4 ? kMaxBlocks : kMaxBlocks / 2;
}

__device__ inline int strips_of(int bytes) {
  return (bytes + kStripBytes - 1) / kStripBytes;
}

// Where the next piece begins, unless what is left of the ring is too short for it.
struct Place {
  int piece = 0;
  int strip = 0;

  // Takes room for a piece of so many strips, and says where it begins.
  template <int kStrips>
  __device__ int take(int strips) {
    const int begin = strip + strips > kStrips ? 0 : strip;
    strip = begin + strips;
    ++piece;
    return begin;
  }
  __device__ int slot() const { return piece % kPieces; }
  __device__ int parity() const { return piece / kPieces & 1; }
};

// Weights are read once in a step, what is computed several times.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, std::uint64_t* barrier,
                                  std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(sm90::shared_address(to)),
      "l"(from), "r"(bytes), "r"(sm90::shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ inline void copy_tile(void* to, const CUtensorMap* map, int row, int block,
                                 std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::"
      "cache_hint [%0], [%1, {%2, %2, %3, %4}], [%5], %6;" ::"r"(sm90::shared_address(to)),
      "l"(map), "r"(0), "r"(row), "r"(block), "r"(sm90::shared_address(barrier)), "l"(policy)
      : "memory");
}

// The host wrote the maps to memory. A fence waits for copies that are under way, so all come
// first.
__device__ inline void acquire_maps(const CUtensorMap* maps, int count) {
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(maps + i)
                 : "memory");
  }
  __syncwarp();
}

template <int kHalves, bool kAny>
__device__ void stream_weights(const StepPhase* phases, int count, const CUtensorMap* maps,
                               int map_count, Shared<kHalves, kAny>& shared) {
  constexpr int kStrips = Shared<kHalves, kAny>::kStrips;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  Place place;
  int oldest = 0;             // piece in the ring
  int free_strips = kStrips;  // of it
  int arriving = 0;           // piece that was not seen to be there
  int under_way = 0;          // strips from there on
  int strips_of_slot = 0;     // lane l knows those of slot l
  const auto fetch = [&](int index) {
    uint4 v{};
    if (index < count && lane < kPhaseVectors) {
      v = __ldg(reinterpret_cast<const uint4*>(phases + index) + lane);
    }
    return v;
  };
  static_assert(kPhaseVectors <= 32);
  uint4 next = fetch(0);
  acquire_maps(maps, map_count);
  // To shared memory, before it is its turn: its maps are to be at hand then.
  const auto keep = [&](int index) {
    if (index >= count) return;
    StepPhase& phase = shared.coming[index % 2];
    __syncwarp();  // what was there is not read any more
    if (lane < kPhaseVectors) reinterpret_cast<uint4*>(&phase)[lane] = next;
    __syncwarp();
    next = fetch(index + 1);
    if (lane < phase.count && !is_packed(phase.parts[lane].form)) {
      asm volatile("prefetch.tensormap [%0];" ::"l"(maps + phase.parts[lane].map) : "memory");
    }
  };
  keep(0);
  for (int index = 0; index < count; ++index) {
    keep(index + 1);
    const StepPhase& phase = shared.coming[index % 2];
    const int blocks = phase.k / kBlockColumns;
    for (int p = 0; p < phase.count; ++p) {
      const StepPart& part = phase.parts[p];
      const DType form = kAny ? part.form : DType::kBF16;
      const Slice slice = slice_of(part);
      const int tiles = tiles_of(part, slice);
      const int piece_blocks =
          is_packed(form) ? packed_piece_blocks(form) : min(kPieceBlocks, blocks);
      for (int tile = 0; tile < tiles; ++tile) {
        const Slice rows = rows_of_tile(part, slice, tile);
        for (int block = 0; block < blocks; block += piece_blocks) {
          const int bytes = is_packed(form)
                                ? min(piece_blocks, blocks - block) * packed_block_bytes(form)
                                : part.tile_rows * piece_blocks * kStripBytes;
          const int strips = strips_of(bytes);
          // With those that stay empty where the ring ends.
          const int taken = strips + (place.strip + strips > kStrips ? kStrips - place.strip : 0);
          while (free_strips < taken || place.piece - oldest == kPieces) {
            const int slot = oldest % kPieces;
            sm90::barrier_wait(&shared.empty[slot], oldest / kPieces & 1);
            const int freed = __shfl_sync(0xffffffff, strips_of_slot, slot);
            free_strips += freed;
            if (arriving == oldest) {  // what was used was there
              under_way -= freed;
              ++arriving;
            }
            ++oldest;
          }
          free_strips -= taken;
          while (under_way > 0 && under_way + taken > kStripsUnderWay) {
            const int slot = arriving % kPieces;
            sm90::barrier_wait(&shared.full[slot], arriving / kPieces & 1);
            under_way -= __shfl_sync(0xffffffff, strips_of_slot, slot);
            ++arriving;
          }
          under_way += taken;
          const int slot = place.slot();
          if (lane == slot) strips_of_slot = taken;
          unsigned char* to = shared.ring + place.template take<kStrips>(strips) * kStripBytes;
          if (lane == 0) {
            std::uint64_t* barrier = &shared.full[slot];
            sm90::barrier_arrive_expect(barrier, bytes);
            if (is_packed(form)) {
              const std::int64_t before =
                  static_cast<std::int64_t>(rows.first / kPackedRows) * blocks + block;
              copy_bytes(to,
                         static_cast<const std::byte*>(part.w) + before * packed_block_bytes(form),
                         bytes, barrier, policy);
            } else {
              copy_tile(to, maps + part.map, rows.first, block, barrier, policy);
            }
          }
          __syncwarp();
        }
      }
    }
  }
}

__device__ inline void sync_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory");
}

__device__ inline std::uint32_t pack(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const std::uint32_t&>(both);
}

// Barriers of a block between the workers and the warp that tells the other blocks what they have
// finished: it waits for these while the workers prepare the next phase.
constexpr int kFinished = 4;
constexpr int kReleased = 5;

__device__ inline void meet_blocks(int count, Counters* counters) {
  const bool first = threadIdx.x % 32 == 0;
  for (int index = 1; index <= count; ++index) {
    asm volatile("bar.sync %0, %1;" ::"n"(kFinished), "n"(kWorkers + 32) : "memory");
    if (index == count) break;
    if (first) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&counters->arrived) : "memory");
      const unsigned all = static_cast<unsigned>(index) * gridDim.x;
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(&counters->arrived)
                     : "memory");
      } while (arrived < all);
    }
    __syncwarp();
    asm volatile("bar.arrive %0, %1;" ::"n"(kReleased), "n"(kWorkers + 32) : "memory");
  }
  if (first && atomicAdd(&counters->exited, 1) == gridDim.x - 1) {
    // All blocks have passed the last barrier.
    counters->arrived = 0;
    counters->exited = 0;
  }
}

template <int kHalves, bool kAny>
class Worker {
 public:
  __device__ Worker(const StepPhase* phases, int count, int batch, Shared<kHalves, kAny>& shared)
      : phases_(phases), count_(count), batch_(batch), shared_(shared) {}

  __device__ void run() {
    prefetch_phase(0);
    keep_phase(0);
    sync_workers();
    for (int index = 0; index < count_; ++index) {
      const StepPhase& phase = shared_.phases[index % kPhases];
      prefetch_phase(index + 1);
      if (phase.heads > 0) {
        delta(phase, index);
      } else {
        linear(phase, shared_.slices[index % kPhases], index);
        tell_finished();
      }
    }
  }

 private:
  static constexpr int kOutputs = 2 * kHalves;  // of a thread, of a group of tiles

  // x of the warp's columns, a block a vector.
  using Operands = uint4[kHalves][kMaxBlocks];

  // One of a group's outputs that the thread finishes.
  struct Output {
    int part;  // −1: none
    int row;   // of the part
    int tile;  // of the group
    int row_of_tile;
    int b;
    float4* conv_state;  // with kConvSilu
  };

  __device__ void prefetch_phase(int index) {
    if (index >= count_) return;
    if (thread_ < kPhaseVectors) {
      next_vector_ = __ldg(reinterpret_cast<const uint4*>(phases_ + index) + thread_);
    } else if (thread_ >= 32 && thread_ < 32 + kStepParts) {
      const StepPart& part = phases_[index].parts[thread_ - 32];
      next_part_.rows = __ldg(&part.rows);
      next_part_.turn = __ldg(&part.turn);
      next_part_.share = __ldg(&part.share);
      next_part_.tile_rows = __ldg(&part.tile_rows);
      next_part_.form =
          static_cast<DType>(__ldg(reinterpret_cast<const std::uint8_t*>(&part.form)));
    }
  }
  __device__ void keep_phase(int index) {
    if (index >= count_) return;
    if (thread_ < kPhaseVectors) {
      reinterpret_cast<uint4*>(&shared_.phases[index % kPhases])[thread_] = next_vector_;
    } else if (thread_ >= 32 && thread_ < 32 + kStepParts) {
      shared_.slices[index % kPhases][thread_ - 32] = slice_of(next_part_);
    }
  }

  // What other blocks wait for is written.
  __device__ static void tell_finished() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kFinished), "n"(kWorkers + 32) : "memory");
  }

  // For what the phase before left behind.
  __device__ void wait_for_blocks(int index) {
    keep_phase(index + 1);
    if (index == 0) {
      sync_workers();
    } else {
      asm volatile("bar.sync %0, %1;" ::"n"(kReleased), "n"(kWorkers + 32) : "memory");
    }
  }

  // ---- step_linear ----

  __device__ Output find_output(const StepPhase& phase, const Slice* slices, int first_tile,
                                int tiles, int j) const {
    Output out{};
    out.part = -1;
    const bool glu = phase.parts[0].epilogue == StepEpilogue::kGlu;
    const int i = thread_ + j * kWorkers;
    const int of_tile = i / kTileRows;
    out.row_of_tile = i % kTileRows;
    out.tile = of_tile / batch_;
    out.b = of_tile - out.tile * batch_;
    if (glu) out.tile *= 2;
    int tile = first_tile + out.tile;
    if (out.tile >= kGroupTiles || tile >= tiles) return out;
    int p = 0;
    int in_part = tiles_of(phase.parts[0], slices[0]);
    while (tile >= in_part) {
      tile -= in_part;
      ++p;
      in_part = tiles_of(phase.parts[p], slices[p]);
    }
    const StepPart& part = phase.parts[p];
    const Slice rows = rows_of_tile(part, slices[p], tile);
    if (out.row_of_tile >= rows.rows) return out;
    out.part = p;
    out.row = rows.first + out.row_of_tile;
    if (part.epilogue == StepEpilogue::kConvSilu) {
      out.conv_state = part.conv_states[out.b] + out.row;
      prefetch(out.conv_state);
    }
    return out;
  }

  __device__ static std::int64_t index_of(const StepPart& part, const Output& out) {
    return static_cast<std::int64_t>(out.b) * part.stride + out.row;
  }

  __device__ void linear(const StepPhase& phase, const Slice* slices, int index) {
    int tiles = 0;
    for (int p = 0; p < phase.count; ++p) tiles += tiles_of(phase.parts[p], slices[p]);
    stage_norm(phase);
    Output outputs[kOutputs];
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) outputs[j] = find_output(phase, slices, 0, tiles, j);
    wait_for_blocks(index);
    Operands x;  // of sequences behind the last: anything, their sums are not used
    load_input(phase, x);
    for (int first_tile = 0; first_tile < tiles; first_tile += kGroupTiles) {
      float4 old[kOutputs];  // state of the convolution, or in x what is added to
      float4 taps[kOutputs];
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        if (first_tile > 0) outputs[j] = find_output(phase, slices, first_tile, tiles, j);
        const Output& out = outputs[j];
        if (out.part < 0) continue;
        const StepPart& part = phase.parts[out.part];
        if (part.epilogue == StepEpilogue::kAdd) {
          old[j].x = __ldcg(static_cast<const float*>(part.y) + index_of(part, out));
        } else if (part.epilogue == StepEpilogue::kConvSilu) {
          old[j] = __ldcs(out.conv_state);
          taps[j] = __ldg(part.conv + out.row);
        }
      }
      multiply_tiles(phase, slices, x, first_tile, min(tiles, first_tile + kGroupTiles));
      sync_workers();
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        if (outputs[j].part >= 0) finish(phase, outputs[j], old[j], taps[j]);
      }
      if (first_tile + kGroupTiles < tiles) sync_workers();
    }
  }

  // Weights of the norm of the warp's columns come to where they are at hand when x is there.
  __device__ void stage_norm(const StepPhase& phase) {
    if (phase.norm_width == 0) return;
    constexpr int kTurns = Shared<kHalves, kAny>::kMaxF32Columns / (4 * kBlockColumns);
    float4 weights[kTurns]{};
    const auto column_of = [&](int turn) {
      return (turn * 4 + lane_ / 8) * kBlockColumns + warp_ * 32 + lane_ % 8 * 4;
    };
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int column = column_of(turn);
      if (column >= phase.k) continue;
      weights[turn] = __ldg(reinterpret_cast<const float4*>(
          phase.norm + (phase.norm_width == phase.k ? column : column % kDim)));
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      *reinterpret_cast<float4*>(shared_.norm + column_of(turn)) = weights[turn];
    }
    __syncwarp();
  }

  // x of the warp's columns, as operands; times the norm's weight, and in groups times its scale.
  // That of whole rows is left to the sums. The first-level cache was emptied when the blocks met;
  // it brings what both of a lane's loads share from the second once.
  __device__ void load_input(const StepPhase& phase, Operands& x) {
    const int blocks = phase.k / kBlockColumns;
    const int first_column = warp_ * 32 + lane_ % 4 * 8;
    if (phase.x_is_bf16) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int b = h * 8 + lane_ / 4;
        const bf16* row = static_cast<const bf16*>(phase.x) +
                          static_cast<std::int64_t>(b) * phase.k + first_column;
#pragma unroll
        for (int i = 0; i < kMaxBlocks; ++i) {
          if (i < blocks && b < batch_) {
            x[h][i] = *reinterpret_cast<const uint4*>(row + i * kBlockColumns);
          }
        }
      }
      return;
    }
    constexpr int kAtOnce = kF32Blocks / kHalves;  // blocks whose values are in registers
    constexpr int kMost = Shared<kHalves, kAny>::kMaxF32Columns / kBlockColumns;
    const bool whole = phase.norm_width == phase.k;
    const bool groups = !whole && phase.norm_width == kDim;
    float squares[kHalves]{};
#pragma unroll
    for (int first = 0; first < kMost; first += kAtOnce) {
      if (first >= blocks) break;
      float v[kHalves][kAtOnce][8];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int b = h * 8 + lane_ / 4;
        const float* row = static_cast<const float*>(phase.x) +
                           static_cast<std::int64_t>(b) * phase.k + first_column;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float4 low{};
          float4 high{};
          if (first + i < blocks && b < batch_) {
            const auto* from = reinterpret_cast<const float4*>(row + (first + i) * kBlockColumns);
            low = *from;
            high = from[1];
          }
          v[h][i][0] = low.x, v[h][i][1] = low.y, v[h][i][2] = low.z, v[h][i][3] = low.w;
          v[h][i][4] = high.x, v[h][i][5] = high.y, v[h][i][6] = high.z, v[h][i][7] = high.w;
        }
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= blocks) break;
          const float of_block = sum_of_squares(v[h][i]);
          squares[h] += of_block;
          if (groups) {
            const float sum = over_four_lanes(of_block);
            if (lane_ % 4 == 0) {
              shared_.group_squares[(first + i) * kWarps + warp_][h * 8 + lane_ / 4] = sum;
            }
          }
        }
      }
      if (groups) sync_workers();
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= blocks) break;
          if (phase.norm_width > 0) {
            float scale = 1;
            if (groups) {
              const int b = h * 8 + lane_ / 4;
              const int group = ((first + i) * kWarps + warp_) / 4 * 4;
              const float sum =
                  (shared_.group_squares[group][b] + shared_.group_squares[group + 1][b]) +
                  (shared_.group_squares[group + 2][b] + shared_.group_squares[group + 3][b]);
              scale = rsqrtf(sum / static_cast<float>(kDim) + phase.norm_eps);
            }
            const auto* norm = reinterpret_cast<const float4*>(
                shared_.norm + (first + i) * kBlockColumns + first_column);
            const float4 low = norm[0];
            const float4 high = norm[1];
            v[h][i][0] *= scale * low.x, v[h][i][1] *= scale * low.y;
            v[h][i][2] *= scale * low.z, v[h][i][3] *= scale * low.w;
            v[h][i][4] *= scale * high.x, v[h][i][5] *= scale * high.y;
            v[h][i][6] *= scale * high.z, v[h][i][7] *= scale * high.w;
          }
          x[h][first + i] = make_uint4(pack(v[h][i][0], v[h][i][1]), pack(v[h][i][2], v[h][i][3]),
                                       pack(v[h][i][4], v[h][i][5]), pack(v[h][i][6], v[h][i][7]));
        }
      }
    }
    if (whole) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const float sum = over_four_lanes(squares[h]);
        if (lane_ % 4 == 0) shared_.warp_squares[warp_][h * 8 + lane_ / 4] = sum;
      }
    }
  }

  __device__ static float sum_of_squares(const float (&v)[8]) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) sum = fmaf(v[e], v[e], sum);
    return sum;
  }
  __device__ static float over_four_lanes(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
  }

  __device__ void multiply_tiles(const StepPhase& phase, const Slice* slices, const Operands& x,
                                 int first_tile, int end_tile) {
    int part = 0;
    int tile = first_tile;  // of the part
    int in_part = tiles_of(phase.parts[0], slices[0]);
    for (int t = first_tile; t < end_tile; ++t, ++tile) {
      while (tile >= in_part) {
        tile -= in_part;
        ++part;
        in_part = tiles_of(phase.parts[part], slices[part]);
      }
      if constexpr (kAny) {
        const DType form = phase.parts[part].form;
        if (is_packed(form)) {
          float c[kHalves][4] = {};
          form == DType::kQ4 ? multiply_panel<true>(phase.k, x, c)
                             : multiply_panel<false>(phase.k, x, c);
          keep_sums(t - first_tile, c);
          continue;
        }
      }
      const int rows = rows_of_tile(phase.parts[part], slices[part], tile).rows;
      const int tile_rows = phase.parts[part].tile_rows;
      const int blocks = phase.k / kBlockColumns;
      float c[2][kHalves][4] = {};  // two chains of sums, of alternate blocks
      // Blocks from `first` on: `most` of them, or if not `whole` as many as there are.
      const auto multiply_piece = [&](auto first, auto most, auto whole) {
        constexpr int kFirst = decltype(first)::value;
        constexpr int kMost = decltype(most)::value;
        constexpr bool kWhole = decltype(whole)::value;
        const int slot = place_.slot();
        const int parity = place_.parity();
        const PieceRows w = take_piece(rows, tile_rows, min(kPieceBlocks, blocks));
        sm90::barrier_wait(&shared_.full[slot], parity);
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          if (!kWhole && kFirst + i >= blocks) break;
          multiply_block(c[i % 2], w, x, kFirst, i);
        }
        sm90::barrier_arrive(&shared_.empty[slot]);
      };
      using Whole = std::true_type;
      using Begun = std::false_type;
      using Full = Int<kPieceBlocks>;
      if (blocks == 6) {
        multiply_piece(Int<0>(), Int<6>(), Whole());
      } else if (blocks < kPieceBlocks) {
        multiply_piece(Int<0>(), Full(), Begun());
      } else {
        multiply_piece(Int<0>(), Full(), Whole());
        if (blocks == 2 * kPieceBlocks) {
          multiply_piece(Full(), Full(), Whole());
        } else if (blocks > kPieceBlocks) {
          multiply_piece(Full(), Full(), Begun());
        }
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[0][h][e] += c[1][h][e];
      }
      keep_sums(t - first_tile, c[0]);
    }
  }

  // Where a lane's 16 bytes of its two rows are in a piece of bfloat16 weights: of even blocks, and
  // of odd ones.
  struct PieceRows {
    const unsigned char* low[2];
    const unsigned char* high[2];
    int two_blocks;  // bytes
  };

  __device__ PieceRows take_piece(int rows, int tile_rows, int piece_blocks) {
    const int begin =
        place_.template take<Shared<kHalves, kAny>::kStrips>(tile_rows * piece_blocks);
    // Rows behind the last are the last; their sums are not used.
    const int low = begin + min(lane_ / 4, rows - 1);
    const int high = begin + min(lane_ / 4 + 8, rows - 1);
    const auto at = [&](int strip) {
      const int offset = strip * kStripBytes + warp_ * 64 + lane_ % 4 * 16;
      return shared_.ring + (offset ^ (offset >> 3 & 0x70));
    };
    return {{at(low), at(low + tile_rows)},
            {at(high), at(high + tile_rows)},
            2 * tile_rows * kStripBytes};
  }

  __device__ void keep_sums(int tile, const float (&c)[kHalves][4]) const {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      auto& sums = shared_.sums[tile][warp_];
      const int b = h * 8 + lane_ % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[b + e % 2][lane_ / 4 + e / 2 * 8] = c[h][e];
    }
  }

  // The sums of a packed tile: those of each block, of integers, times the scales of its rows.
  template <bool kFourBits>
  __device__ void multiply_panel(int k, const Operands& x, float (&c)[kHalves][4]) {
    constexpr int kBlocks = packed_piece_blocks(kFourBits ? DType::kQ4 : DType::kQ8);
#pragma unroll
    for (int first = 0; first < kMaxBlocks; first += kBlocks) {
      const int blocks = min(kBlocks, k / kBlockColumns - first);
      if (blocks <= 0) break;
      const int slot = place_.slot();
      const int parity = place_.parity();
      const unsigned char* piece =
          shared_.ring + kStripBytes * place_.template take<Shared<kHalves, kAny>::kStrips>(
                                           strips_of(blocks * PackedForm<kFourBits>::kBlockBytes));
      sm90::barrier_wait(&shared_.full[slot], parity);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (i >= blocks) break;
        add_packed(
            operand_at<kFourBits>(piece, i), warp_, [&](int h) { return x[h][first + i]; }, c);
      }
      sm90::barrier_arrive(&shared_.empty[slot]);
    }
  }

  // What the lane has of block `i` of a piece.
  template <bool kFourBits>
  __device__ PackedOperand<kFourBits> operand_at(const unsigned char* piece, int i) const {
    using Form = PackedForm<kFourBits>;
    const unsigned char* block = piece + i * Form::kBlockBytes;
    const unsigned char* values =
        block + Form::kHeadBytes + warp_ * Form::kStepBytes + lane_ * Form::kLaneBytes;
    PackedOperand<kFourBits> operand;
    operand.scales = *reinterpret_cast<const float2*>(block + lane_ / 4 * 8);
    if constexpr (kFourBits) {
      operand.values = *reinterpret_cast<const uint2*>(values);
      operand.factors = *reinterpret_cast<const std::uint16_t*>(block + kScaleBytes +
                                                                warp_ / 2 * 16 + lane_ / 4 * 2);
    } else {
      operand.values = *reinterpret_cast<const uint4*>(values);
    }
    return operand;
  }

  // c += w xᵀ of block `i` of a piece whose first is `first`. Without a branch in between, w of all
  // blocks is under way at once.
  __device__ static void multiply_block(float (&c)[kHalves][4], const PieceRows& w,
                                        const Operands& x, int first, int i) {
    const int offset = i / 2 * w.two_blocks;
    const uint4 low = *reinterpret_cast<const uint4*>(w.low[i % 2] + offset);
    const uint4 high = *reinterpret_cast<const uint4*>(w.high[i % 2] + offset);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const uint4& b = x[h][first + i];
      multiply(c[h], low.x, high.x, low.y, high.y, b.x, b.y);
      multiply(c[h], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }

  __device__ float sum_of(int tile, const Output& out) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared_.sums[tile][w][out.b][out.row_of_tile];
    return sum;
  }

  __device__ void finish(const StepPhase& phase, const Output& out, const float4& old,
                         const float4& taps) const {
    const StepPart& part = phase.parts[out.part];
    float sum = sum_of(out.tile, out);
    float scale = 1;
    if (phase.norm_width == phase.k) {
      float squares = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) squares += shared_.warp_squares[w][out.b];
      scale = rsqrtf(squares / static_cast<float>(phase.k) + phase.norm_eps);
      sum *= scale;
    }
    switch (part.epilogue) {
      case StepEpilogue::kStore:
        break;
      case StepEpilogue::kAdd:
        sum += old.x;
        break;
      case StepEpilogue::kSigmoid:
        sum = sigmoid(sum);
        break;
      case StepEpilogue::kGlu:
        sum = sum * sigmoid(sum) * (sum_of(out.tile + 1, out) * scale);
        break;
      case StepEpilogue::kConvSilu:
        *out.conv_state = make_float4(old.y, old.z, old.w, sum);
        sum = fmaf(taps.w, sum, fmaf(taps.z, old.w, fmaf(taps.y, old.z, taps.x * old.y)));
        if (part.conv_bias != nullptr) sum += __ldg(part.conv_bias + out.row);
        sum *= sigmoid(sum);
        break;
    }
    const std::int64_t at = index_of(part, out);
    if (part.y_is_bf16) {
      static_cast<bf16*>(part.y)[at] = __float2bfloat16(sum);
    } else {
      static_cast<float*>(part.y)[at] = sum;
    }
  }

  // ---- delta_rule_step: units of 16 columns of a head's state, by halves of the workers ----

  __device__ void sync_half() const {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + warp_ / 4) : "memory");
  }

  // Adds to each of kCount values that of the lane whose number differs by kBit. Half of the sums
  // are those of lanes without that bit, the others of lanes with it.
  template <int kBit, int kCount, int kSize>
  __device__ void fold(float (&values)[kSize]) const {
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane_ & kBit) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? values[i] : values[i + kHalf];
      const float kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffff, sent, kBit);
    }
  }

  __device__ void delta(const StepPhase& phase, int index) {
    constexpr int kUnitsOfHead = kDim / kUnitColumns;
    const int units = batch_ * phase.heads * kUnitsOfHead;
    const int blocks = static_cast<int>(gridDim.x);
    const int half = warp_ / 4;
    const int warp = warp_ % 4;
    const int own = warp * 32 + lane_;
    const int column = lane_ % 4 * 4;       // and the next three, of the unit
    const int row = warp * 32 + lane_ / 4;  // and 8, 16, 24 rows on
    DeltaScratch& scratch = shared_.delta[half];
    const auto state_of = [&](int unit) {
      const int head = unit / kUnitsOfHead % phase.heads;
      return phase.states[unit / (kUnitsOfHead * phase.heads)] +
             (static_cast<std::int64_t>(head) * kDim + row) * kDim +
             unit % kUnitsOfHead * kUnitColumns + column;
    };
    bool waiting = true;
    for (int first = 0; first < units || waiting; first += 2 * kUnits * blocks) {
      const auto unit_of = [&](int j) {
        return first + (2 * j + half) * blocks + static_cast<int>(blockIdx.x);
      };
      float* states[kUnits];
#pragma unroll
      for (int j = 0; j < kUnits; ++j) states[j] = state_of(min(unit_of(j), units - 1));
      float4 s[kUnits][4]{};
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[j][i] = __ldcs(reinterpret_cast<const float4*>(states[j] + i * 8 * kDim));
        }
      }
      if (waiting) {
        for (int j = kUnits; unit_of(j) < units; ++j) {  // for the turns to come
          const float* state = state_of(unit_of(j));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (lane_ % 4 == 0) prefetch(state + i * 8 * kDim);
          }
        }
        wait_for_blocks(index);
      }
      waiting = false;

      float own_q[kUnits]{};
      float own_k[kUnits]{};
      float4 v[kUnits]{};
      float beta[kUnits]{};
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
        const int head = unit_of(j) / kUnitsOfHead;  // of all sequences
        own_q[j] = __ldcg(phase.q + head * kDim + own);
        own_k[j] = __ldcg(phase.key + head * kDim + own);
        v[j] = __ldcg(reinterpret_cast<const float4*>(
            phase.v + head * kDim + unit_of(j) % kUnitsOfHead * kUnitColumns + column));
        beta[j] = __ldcg(phase.beta + head);
      }
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
        scratch.q[j][own] = own_q[j];
        scratch.k[j][own] = own_k[j];
        float dots[4] = {own_q[j] * own_q[j], own_k[j] * own_k[j], own_q[j] * own_k[j], 0};
        fold<16, 4>(dots);
        fold<8, 2>(dots);
        float dot = dots[0];
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) {
          dot += __shfl_xor_sync(0xffffffff, dot, offset);
        }
        if (lane_ % 8 == 0) scratch.dots[j][warp][lane_ / 16 * 2 + lane_ / 8 % 2] = dot;
      }
      sync_half();
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
        float sums_q[4] = {};
        float sums_k[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float q = scratch.q[j][row + i * 8];
          const float k = scratch.k[j][row + i * 8];
          sums_q[0] = fmaf(s[j][i].x, q, sums_q[0]), sums_q[1] = fmaf(s[j][i].y, q, sums_q[1]);
          sums_q[2] = fmaf(s[j][i].z, q, sums_q[2]), sums_q[3] = fmaf(s[j][i].w, q, sums_q[3]);
          sums_k[0] = fmaf(s[j][i].x, k, sums_k[0]), sums_k[1] = fmaf(s[j][i].y, k, sums_k[1]);
          sums_k[2] = fmaf(s[j][i].z, k, sums_k[2]), sums_k[3] = fmaf(s[j][i].w, k, sums_k[3]);
        }
        float sums[8] = {sums_q[0], sums_q[1], sums_q[2], sums_q[3],
                         sums_k[0], sums_k[1], sums_k[2], sums_k[3]};
        fold<4, 8>(sums);
        fold<8, 4>(sums);
        fold<16, 2>(sums);
        auto& of_lane = lane_ / 4 % 2 == 0 ? scratch.sums_q[j] : scratch.sums_k[j];
        of_lane[warp][column + lane_ / 8 % 2 * 2 + lane_ / 16] = sums[0];
      }
      sync_half();
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
        const auto all = [&](int which) {
          return (scratch.dots[j][0][which] + scratch.dots[j][1][which]) +
                 (scratch.dots[j][2][which] + scratch.dots[j][3][which]);
        };
        const auto column_sum = [&](const float(&x)[4][kUnitColumns], int e) {
          return (x[0][column + e] + x[1][column + e]) + (x[2][column + e] + x[3][column + e]);
        };
        const float q_scale = 1 / sqrtf(all(0) + 1e-6F);
        const float k_scale = 1 / sqrtf(all(1) + 1e-6F);
        const float4 u =
            make_float4(beta[j] * (v[j].x - column_sum(scratch.sums_k[j], 0) * k_scale),
                        beta[j] * (v[j].y - column_sum(scratch.sums_k[j], 1) * k_scale),
                        beta[j] * (v[j].z - column_sum(scratch.sums_k[j], 2) * k_scale),
                        beta[j] * (v[j].w - column_sum(scratch.sums_k[j], 3) * k_scale));
        if (own < 4) {
          const float q_dot_k = all(2) * q_scale * k_scale;
          const float scale = 1 / sqrtf(static_cast<float>(kDim));
          float4 o;
          o.x = (column_sum(scratch.sums_q[j], 0) * q_scale + q_dot_k * u.x) * scale;
          o.y = (column_sum(scratch.sums_q[j], 1) * q_scale + q_dot_k * u.y) * scale;
          o.z = (column_sum(scratch.sums_q[j], 2) * q_scale + q_dot_k * u.z) * scale;
          o.w = (column_sum(scratch.sums_q[j], 3) * q_scale + q_dot_k * u.w) * scale;
          const int head = unit_of(j) / kUnitsOfHead;
          *reinterpret_cast<float4*>(phase.o + head * kDim +
                                     unit_of(j) % kUnitsOfHead * kUnitColumns + column) = o;
        }
        v[j] = u;
        beta[j] = k_scale;  // in its register
      }
      const bool last = first + 2 * kUnits * blocks >= units;
      if (last) tell_finished();  // nobody waits for the states
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit_of(j) >= units) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float key = scratch.k[j][row + i * 8] * beta[j];
          s[j][i].x = fmaf(key, v[j].x, s[j][i].x), s[j][i].y = fmaf(key, v[j].y, s[j][i].y);
          s[j][i].z = fmaf(key, v[j].z, s[j][i].z), s[j][i].w = fmaf(key, v[j].w, s[j][i].w);
          __stcs(reinterpret_cast<float4*>(states[j] + i * 8 * kDim), s[j][i]);
        }
      }
      if (!last) sync_half();  // before the scratch is written again
    }
  }

  const StepPhase* phases_;
  int count_;
  int batch_;
  Shared<kHalves, kAny>& shared_;
  int thread_ = static_cast<int>(threadIdx.x);
  int warp_ = static_cast<int>(threadIdx.x) / 32;
  int lane_ = static_cast<int>(threadIdx.x) % 32;
  Place place_;
  uint4 next_vector_;
  StepPart next_part_;  // what its slice depends on
};

template <int kHalves, bool kAny>
__global__ void __launch_bounds__(kThreads, 1)
    step_program_kernel(const StepPhase* phases, int count, const CUtensorMap* maps, int map_count,
                        int batch, Counters* counters) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kHalves, kAny>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPieces; ++i) {
      sm90::barrier_init(&shared.full[i], 1);
      sm90::barrier_init(&shared.empty[i], kWorkers);
    }
    sm90::fence_async_proxy();
  }
  __syncthreads();
  if (threadIdx.x >= kWorkers) {
    sm90::shrink_registers<40>();
    if (threadIdx.x < kWorkers + 32) {
      stream_weights<kHalves, kAny>(phases, count, maps, map_count, shared);
    } else if (threadIdx.x < kWorkers + 64) {
      meet_blocks(count, counters);
    }
  } else {
    sm90::grow_registers<232>();
    Worker<kHalves, kAny>(phases, count, batch, shared).run();
  }
#endif
}

// The program that the context's stream gathers and to which steps of `batch` sequences belong.
StepProgram* program_for(Context& ctx, std::int64_t batch) {
  StepProgram* program = ctx.stream().program();
  if (program == nullptr) return nullptr;
  if (program->phases.empty()) program->batch = static_cast<int>(batch);
  return program->batch == batch ? program : nullptr;
}

// All bytes are known, so that equal programs are found again.
StepPhase& new_phase(StepProgram& program) {
  StepPhase& phase = program.phases.emplace_back();
  std::memset(static_cast<void*>(&phase), 0, sizeof phase);
  return phase;
}

// Pieces of w: [columns / 256][rows][4][64].
CUtensorMap map_of_pieces(const ConstTensorView& w, int tile_rows) {
  constexpr int kLine = 64;
  const std::int64_t k = w.shape[1];
  const std::int64_t blocks = k / kBlockColumns;
  const cuuint64_t sizes[] = {kLine, kBlockColumns / kLine, static_cast<cuuint64_t>(w.shape[0]),
                              static_cast<cuuint64_t>(blocks)};
  const cuuint64_t strides[] = {kLine * 2, static_cast<cuuint64_t>(k) * 2, kStripBytes};
  const cuuint32_t box[] = {kLine, kBlockColumns / kLine, static_cast<cuuint32_t>(tile_rows),
                            static_cast<cuuint32_t>(std::min<std::int64_t>(kPieceBlocks, blocks))};
  return encode_map(w.data, sizes, strides, box, CU_TENSOR_MAP_L2_PROMOTION_NONE);
}

// Its number in the program.
int add_map(StepProgram& program, const ConstTensorView& w, int tile_rows) {
  const std::tuple key(w.data, w.shape[0], w.shape[1], tile_rows);
  auto known = program.known_maps.find(key);
  if (known == program.known_maps.end()) {
    known = program.known_maps.emplace(key, map_of_pieces(w, tile_rows)).first;
  }
  program.maps.push_back(known->second);
  return static_cast<int>(program.maps.size()) - 1;
}

bool fits(const StepLinearArgs& args) {
  const std::int64_t k = args.x.shape[1];
  if (args.x.shape[0] > kStepLinearRows || k % kBlockColumns != 0 || k > kMaxColumns) return false;
  for (const StepLinearPart& part : args.parts) {
    if (part.epilogue == StepEpilogue::kGlu && args.parts.size() > 1) return false;
    if (!is_packed(part.w.dtype) && !has_tiles(part.w)) return false;
  }
  if (args.x.dtype == DType::kF32 && k > kWideF32Blocks * kBlockColumns) return false;
  if (args.norm.data == nullptr) return true;
  const std::int64_t width = args.norm.shape.size();
  return args.x.dtype == DType::kF32 && (width == k || width == kDim);
}

template <int kHalves, bool kAny>
void launch(Context& ctx, const StepProgram& program) {
  const auto kernel = step_program_kernel<kHalves, kAny>;
  constexpr std::size_t kBytes = sizeof(Shared<kHalves, kAny>);
  static_assert(kBytes <= std::size_t{227} * 1024);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kBytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;  // all blocks at once, or they wait for ever
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctx.stream().multiprocessors()));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream_of(ctx);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto* phases = upload(ctx, std::span<const StepPhase>(program.phases));
  const auto* maps = upload(ctx, std::span<const CUtensorMap>(program.maps));
  auto* counters = static_cast<Counters*>(const_cast<void*>(program.counters.view().data));
  check(cudaLaunchKernelEx(&config, kernel, phases, static_cast<int>(program.phases.size()), maps,
                           static_cast<int>(program.maps.size()), program.batch, counters),
        "step_program");
}

}  // namespace

bool add_to_program(Context& ctx, const StepLinearArgs& args) {
  StepProgram* program = program_for(ctx, args.x.shape[0]);
  if (program == nullptr || !fits(args)) return false;
  StepPhase& phase = new_phase(*program);
  phase.x = args.x.data;
  phase.x_is_bf16 = args.x.dtype == DType::kBF16;
  phase.k = static_cast<int>(args.x.shape[1]);
  if (args.norm.data != nullptr) {
    phase.norm = args.norm.f32();
    phase.norm_eps = args.norm_eps;
    phase.norm_width = static_cast<int>(args.norm.shape.size());
  }
  program->any = program->any || (!phase.x_is_bf16 && phase.k > kF32Blocks * kBlockColumns);
  phase.count = static_cast<int>(args.parts.size());
  for (std::size_t i = 0; i < args.parts.size(); ++i) {
    const StepLinearPart& from = args.parts[i];
    StepPart& part = phase.parts[i];
    part.form = from.w.dtype;
    part.y = from.y.data;
    part.rows = static_cast<int>(outputs_of(from));
    part.stride = static_cast<int>(from.y.shape[1]);
    part.y_is_bf16 = from.y.dtype == DType::kBF16;
    part.epilogue = from.epilogue;
    const int blocks = ctx.stream().multiprocessors();
    if (is_packed(part.form)) {
      program->any = true;
      part.w = from.w.data;
      part.tile_rows = kTileRows;
      part.turn = program->turn;
      const int panels = (part.rows + kTileRows - 1) / kTileRows;
      program->turn = (program->turn + panels) % blocks;
    } else {
      part.share = (part.rows + blocks - 1) / blocks;
      const int tiles = (part.share + kTileRows - 1) / kTileRows;
      part.tile_rows = static_cast<std::uint8_t>((part.share + tiles - 1) / tiles);
      part.map = add_map(*program, from.w, part.tile_rows);
    }
    if (from.epilogue == StepEpilogue::kConvSilu) {
      part.conv = static_cast<const float4*>(from.conv.data);
      part.conv_bias = static_cast<const float*>(from.conv_bias.data);
      part.conv_states = reinterpret_cast<float4* const*>(upload(ctx, from.conv_states));
    }
  }
  return true;
}

bool add_to_program(Context& ctx, const DeltaRuleStepArgs& args) {
  StepProgram* program = program_for(ctx, args.q.shape[0]);
  if (program == nullptr) return false;
  StepPhase& phase = new_phase(*program);
  phase.heads = static_cast<int>(args.q.shape[1]);
  phase.q = args.q.f32();
  phase.key = args.k.f32();
  phase.v = args.v.f32();
  phase.beta = args.beta.f32();
  phase.states = upload(ctx, args.states);
  phase.o = args.o.f32();
  return true;
}

bool begin_step_program(Context& ctx) {
  return ctx.stream().open_program();
}

void run_step_program(Context& ctx) {
  StepProgram* program = ctx.stream().program();
  if (program != nullptr && !program->phases.empty()) {
    const auto run = program->any ? (program->batch <= 8 ? launch<1, true> : launch<2, true>)
                                  : (program->batch <= 8 ? launch<1, false> : launch<2, false>);
    run(ctx, *program);
    program->clear();
  }
}

void end_step_program(Context& ctx) {
  ctx.stream().close_program();
}

}  // namespace deltafox::cuda
