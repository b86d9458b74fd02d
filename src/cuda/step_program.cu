// The steps of step.cu as the phases of one kernel, one thread block a multiprocessor.
//
// A step is bound by reading the weights, which do not depend on what is computed: so one warp of
// each block does nothing but ask for the block's rows of w, phase after phase, as far ahead as
// shared memory has room (a ring of row pieces, filled by bulk copies), and the memory is busy
// while the other warps wait for each other. Those share K between them: a warp has x of its
// columns in registers as operands of the tensor cores for the whole phase, w comes from the ring.
// Between two phases all blocks wait for all.
//
// A block takes as many rows of each part of a phase as any other, one more or less, in tiles of up
// to 16 rows. Products are 16 rows of w by 8 rows of x; which elements are called k = 0, 1, ...
// does not matter to a sum as long as w and x have them in the same places, so a lane reads 16
// bytes of each at once. Sums are those of a warp's columns in order, then of the warps in order:
// they depend neither on B nor on the card.
//
// Packed weights (packed.cuh) come in whole panels of 16 rows, which are tiles. Blocks get them in
// turn, over all parts of a program: that evens out who has one more in a part. In the ring a piece
// is the bytes of some blocks of a panel, over as many rows as they fill.
#include <algorithm>
#include <cstring>

#include "cuda/launch.cuh"
#include "cuda/packed.cuh"
#include "cuda/rows.cuh"
#include "cuda/sm90.cuh"
#include "cuda/step_program.h"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kWorkers = kWarps * 32;
constexpr int kThreads = kWorkers + 128;  // registers are dealt out to four warps at a time
constexpr int kTileRows = 16;
constexpr int kBlockColumns = 32 * kWarps;  // 32 of each warp
constexpr int kPieceBlocks = 6;
constexpr int kPieceColumns = kPieceBlocks * kBlockColumns;  // of a row, in a piece
constexpr int kMaxBlocks = 16;
constexpr int kMaxColumns = kMaxBlocks * kBlockColumns;
// Of an x of float32, in programs of bfloat16 weights and in all others.
constexpr int kF32Blocks = 8;
constexpr int kWideF32Blocks = 12;
// A piece's row in the ring: eight neighbouring rows of 16 bytes by four lanes hit all banks once.
constexpr int kRowBytes = kPieceColumns * 2 + 64;
constexpr int kPieces = 32;  // in the ring at most
// Rows that are under way at most, a tile's: more would wait in queues, and what blocks tell each
// other behind them.
constexpr int kRowsUnderWay = kTileRows;
constexpr int kDim = static_cast<int>(kStepHeadDim);
constexpr int kUnitColumns = 16;  // of a head's state
constexpr int kUnits = 4;         // of a half of the workers, at once
constexpr int kPhaseVectors = sizeof(StepPhase) / 16;
static_assert(kTileRows == kPackedRows && kBlockColumns == kPackedBlock);
static_assert(kRowBytes % 16 == 0, "no vector of a packed piece is cut where the ring ends");

struct Counters {
  unsigned arrived;
  unsigned exited;
};

// A block's part of a phase.
struct Slice {
  int first;  // row
  int rows;
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

constexpr int kGroupTiles = 4;  // whose sums are taken at once
constexpr int kPhases = 3;  // in shared memory: that of the slowest warp, the fastest's, the next

// kHalves: of up to eight sequences. kAny: weights may be packed, x of float32 wide.
template <int kHalves, bool kAny>
struct Shared {
  static constexpr int kMaxF32Columns = (kAny ? kWideF32Blocks : kF32Blocks) * kBlockColumns;
  // An even number of rows, so that neighbours stay neighbours where the ring ends.
  static constexpr int kRows = (kHalves == 1 ? 62 : 56) - (kAny ? 2 : 0);
  alignas(128) unsigned char ring[kRows * kRowBytes];
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
  const int tiles = (slice.rows + kTileRows - 1) / kTileRows;
  return part.epilogue == StepEpilogue::kGlu ? 2 * tiles : tiles;
}

__device__ inline Slice slice_of(const StepPart& part) {
  if (is_packed(part.form)) {
    const auto blocks = static_cast<int>(gridDim.x);
    int first = static_cast<int>(blockIdx.x) - part.turn;
    if (first < 0) first += blocks;
    const int panels = (part.rows + kTileRows - 1) / kTileRows;
    const int own = first < panels ? (panels - first + blocks - 1) / blocks : 0;
    return {first * kTileRows, own * kTileRows};
  }
  const unsigned first = static_cast<unsigned>(part.rows) * blockIdx.x / gridDim.x;
  const unsigned end = static_cast<unsigned>(part.rows) * (blockIdx.x + 1) / gridDim.x;
  return {static_cast<int>(first), static_cast<int>(end - first)};
}

// Rows of tile `tile` of a part: with kGlu tiles 2j and 2j + 1 are rows of p and the same of p'.
__device__ inline Slice rows_of_tile(const StepPart& part, const Slice& slice, int tile) {
  const bool glu = part.epilogue == StepEpilogue::kGlu;
  const int begin = (glu ? tile / 2 : tile) * kTileRows;
  const int behind = glu && tile % 2 == 1 ? part.rows : 0;  // the rows of p
  if (is_packed(part.form)) {
    const int first = slice.first + begin * static_cast<int>(gridDim.x);
    return {first + behind, min(kTileRows, part.rows - first)};
  }
  return {slice.first + begin + behind, min(kTileRows, slice.rows - begin)};
}

__device__ inline int packed_block_bytes(DType form) {
  return form == DType::kQ4 ? PackedForm<true>::kBlockBytes : PackedForm<false>::kBlockBytes;
}

// `columns` columns of a tile's rows as they lie in the ring: its rows, and the bytes of one.
struct Piece {
  int rows;
  int bytes;  // of all
  int row_bytes;

  __device__ Piece(DType form, int tile_rows, int columns) {
    if (is_packed(form)) {
      bytes = columns / kPackedBlock * packed_block_bytes(form);
      rows = (bytes + kRowBytes - 1) / kRowBytes;
      row_bytes = kRowBytes;
    } else {
      rows = tile_rows;
      row_bytes = columns * 2;
      bytes = rows * row_bytes;
    }
  }
};

// Where the next piece begins.
struct Place {
  int piece = 0;
  int row = 0;

  template <int kRows>
  __device__ void advance(int rows) {
    ++piece;
    row += rows;
    if (row >= kRows) row -= kRows;
  }
  __device__ int slot() const { return piece % kPieces; }
  __device__ int parity() const { return piece / kPieces & 1; }
};

// Weights are read once in a step, what is computed several times.
__device__ inline void copy_row(void* to, const void* from, int bytes, std::uint64_t* barrier,
                                std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], "
      "%2, [%3], %4;" ::"r"(sm90::shared_address(to)),
      "l"(from), "r"(bytes), "r"(sm90::shared_address(barrier)), "l"(policy)
      : "memory");
}

template <int kHalves, bool kAny>
__device__ void stream_weights(const StepPhase* phases, int count, Shared<kHalves, kAny>& shared) {
  constexpr int kRows = Shared<kHalves, kAny>::kRows;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  Place place;
  int oldest = 0;         // piece in the ring
  int free_rows = kRows;  // of it
  int arriving = 0;       // piece that was not seen to be there
  int under_way = 0;      // rows from there on
  int rows_of_slot = 0;   // lane l knows those of slot l
  const auto fetch = [&](int index) {
    uint4 v{};
    if (index < count && lane < kPhaseVectors) {
      v = __ldg(reinterpret_cast<const uint4*>(phases + index) + lane);
    }
    return v;
  };
  static_assert(kPhaseVectors <= 32);
  uint4 next = fetch(0);
  for (int index = 0; index < count; ++index) {
    StepPhase& phase = shared.coming[index % 2];
    if (lane < kPhaseVectors) reinterpret_cast<uint4*>(&phase)[lane] = next;
    __syncwarp();
    next = fetch(index + 1);
    if (phase.heads > 0) continue;
    for (int p = 0; p < phase.count; ++p) {
      const StepPart& part = phase.parts[p];
      const DType form = kAny ? part.form : DType::kBF16;
      const Slice slice = slice_of(part);
      const int tiles = tiles_of(part, slice);
      for (int tile = 0; tile < tiles; ++tile) {
        const Slice rows = rows_of_tile(part, slice, tile);
        const auto* from = static_cast<const std::byte*>(part.w);
        if (is_packed(form)) {
          from += static_cast<std::int64_t>(rows.first / kPackedRows) * (phase.k / kPackedBlock) *
                  packed_block_bytes(form);
        } else {
          from += static_cast<std::int64_t>(rows.first) * phase.k * 2;
        }
        for (int column = 0; column < phase.k; column += kPieceColumns) {
          const Piece piece(form, rows.rows, min(kPieceColumns, phase.k - column));
          while (free_rows < piece.rows || place.piece - oldest == kPieces) {
            const int slot = oldest % kPieces;
            sm90::barrier_wait(&shared.empty[slot], oldest / kPieces & 1);
            const int freed = __shfl_sync(0xffffffff, rows_of_slot, slot);
            free_rows += freed;
            if (arriving == oldest) {  // what was used was there
              under_way -= freed;
              ++arriving;
            }
            ++oldest;
          }
          free_rows -= piece.rows;
          while (under_way + piece.rows > kRowsUnderWay) {
            const int slot = arriving % kPieces;
            sm90::barrier_wait(&shared.full[slot], arriving / kPieces & 1);
            under_way -= __shfl_sync(0xffffffff, rows_of_slot, slot);
            ++arriving;
          }
          under_way += piece.rows;
          if (lane == place.slot()) rows_of_slot = piece.rows;
          std::uint64_t* barrier = &shared.full[place.slot()];
          if (lane == 0) sm90::barrier_arrive_expect(barrier, piece.bytes);
          __syncwarp();
          if (lane < piece.rows) {
            int row = place.row + lane;
            if (row >= kRows) row -= kRows;
            const std::byte* source =
                from + (is_packed(form) ? lane * kRowBytes : (lane * phase.k + column) * 2);
            const int bytes = min(piece.row_bytes, piece.bytes - lane * piece.row_bytes);
            copy_row(shared.ring + row * kRowBytes, source, bytes, barrier, policy);
          }
          if (is_packed(form)) from += piece.bytes;
          place.template advance<kRows>(piece.rows);
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
      }
      asm volatile("bar.arrive %0, %1;" ::"n"(kFinished), "n"(kWorkers + 32) : "memory");
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
  // That of whole rows is left to the sums.
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
            x[h][i] = __ldcg(reinterpret_cast<const uint4*>(row + i * kBlockColumns));
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
            low = __ldcg(from);
            high = __ldcg(from + 1);
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
    constexpr int kRows = Shared<kHalves, kAny>::kRows;
    int part = 0;
    int tile = first_tile;  // of the part
    int in_part = tiles_of(phase.parts[0], slices[0]);
    for (int t = first_tile; t < end_tile; ++t, ++tile) {
      while (tile >= in_part) {
        tile -= in_part;
        ++part;
        in_part = tiles_of(phase.parts[part], slices[part]);
      }
      const int rows = rows_of_tile(phase.parts[part], slices[part], tile).rows;
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
      // Rows behind the last are the last; their sums are not used.
      const int low_row = min(lane_ / 4, rows - 1);
      const int high_row = min(lane_ / 4 + 8, rows - 1);
      const unsigned char* columns = shared_.ring + (warp_ * 32 + lane_ % 4 * 8) * 2;
      const auto row_at = [&](int row) {
        row += place_.row;
        if (row >= kRows) row -= kRows;
        return columns + row * kRowBytes;
      };
      float c[2][kHalves][4] = {};  // two chains of sums, of alternate blocks
#pragma unroll
      for (int piece = 0; piece * kPieceBlocks < kMaxBlocks; ++piece) {
        const int first = piece * kPieceBlocks;
        const int blocks = min(kPieceBlocks, phase.k / kBlockColumns - first);
        if (blocks <= 0) break;
        const int slot = place_.slot();
        const unsigned char* low = row_at(low_row);
        const unsigned char* high = row_at(high_row);
        sm90::barrier_wait(&shared_.full[slot], place_.parity());
        constexpr int kLastBlocks = kMaxBlocks % kPieceBlocks;
        if (blocks == kPieceBlocks) {
          multiply_blocks<kPieceBlocks>(c, low, high, x, first);
        } else if (blocks == kLastBlocks) {
          multiply_blocks<kLastBlocks>(c, low, high, x, first);
        } else {
#pragma unroll
          for (int i = 0; i < kPieceBlocks; ++i) {
            if (i < blocks) multiply_block(c[i % 2], low, high, x, first, i);
          }
        }
        sm90::barrier_arrive(&shared_.empty[slot]);
        place_.template advance<kRows>(rows);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[0][h][e] += c[1][h][e];
      }
      keep_sums(t - first_tile, c[0]);
    }
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
    constexpr int kRows = Shared<kHalves, kAny>::kRows;
#pragma unroll
    for (int piece = 0; piece * kPieceBlocks < kMaxBlocks; ++piece) {
      const int first = piece * kPieceBlocks;
      const int blocks = min(kPieceBlocks, k / kBlockColumns - first);
      if (blocks <= 0) break;
      const int slot = place_.slot();
      sm90::barrier_wait(&shared_.full[slot], place_.parity());
#pragma unroll
      for (int i = 0; i < kPieceBlocks; ++i) {
        if (i >= blocks || first + i >= kMaxBlocks) break;
        add_packed(
            operand_at<kFourBits>(i), warp_, [&](int h) { return x[h][first + i]; }, c);
      }
      sm90::barrier_arrive(&shared_.empty[slot]);
      const Piece of(kFourBits ? DType::kQ4 : DType::kQ8, kTileRows, blocks * kBlockColumns);
      place_.template advance<kRows>(of.rows);
    }
  }

  // What the lane has of block `i` of the piece at hand.
  template <bool kFourBits>
  __device__ PackedOperand<kFourBits> operand_at(int i) const {
    using Form = PackedForm<kFourBits>;
    constexpr int kRingBytes = Shared<kHalves, kAny>::kRows * kRowBytes;
    const auto at = [&](int offset) {
      offset += place_.row * kRowBytes + i * Form::kBlockBytes;
      return shared_.ring + (offset >= kRingBytes ? offset - kRingBytes : offset);
    };
    const unsigned char* values =
        at(Form::kHeadBytes + warp_ * Form::kStepBytes + lane_ * Form::kLaneBytes);
    PackedOperand<kFourBits> operand;
    operand.scales = *reinterpret_cast<const float2*>(at(lane_ / 4 * 8));
    if constexpr (kFourBits) {
      operand.values = *reinterpret_cast<const uint2*>(values);
      operand.factors = *reinterpret_cast<const std::uint16_t*>(
          at(static_cast<int>(kScaleBytes) + warp_ / 2 * 16 + lane_ / 4 * 2));
    } else {
      operand.values = *reinterpret_cast<const uint4*>(values);
    }
    return operand;
  }

  // c += w xᵀ of block `i` of a piece whose first is `first`; w in the ring.
  __device__ static void multiply_block(float (&c)[kHalves][4], const unsigned char* low,
                                        const unsigned char* high, const Operands& x, int first,
                                        int i) {
    if (first + i >= kMaxBlocks) return;
    const uint4 w_low = *reinterpret_cast<const uint4*>(low + i * kBlockColumns * 2);
    const uint4 w_high = *reinterpret_cast<const uint4*>(high + i * kBlockColumns * 2);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const uint4& b = x[h][first + i];
      multiply(c[h], w_low.x, w_high.x, w_low.y, w_high.y, b.x, b.y);
      multiply(c[h], w_low.z, w_high.z, w_low.w, w_high.w, b.z, b.w);
    }
  }

  // Without a branch in between, w of all blocks is under way at once.
  template <int kCount>
  __device__ static void multiply_blocks(float (&c)[2][kHalves][4], const unsigned char* low,
                                         const unsigned char* high, const Operands& x, int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) multiply_block(c[i % 2], low, high, x, first, i);
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
        const float qq = warp_sum(own_q[j] * own_q[j]);
        const float kk = warp_sum(own_k[j] * own_k[j]);
        const float qk = warp_sum(own_q[j] * own_k[j]);
        if (lane_ == 0) {
          scratch.dots[j][warp][0] = qq;
          scratch.dots[j][warp][1] = kk;
          scratch.dots[j][warp][2] = qk;
        }
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
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums_q[e] += __shfl_xor_sync(0xffffffff, sums_q[e], offset);
            sums_k[e] += __shfl_xor_sync(0xffffffff, sums_k[e], offset);
          }
        }
        if (lane_ < 4) {
          *reinterpret_cast<float4*>(&scratch.sums_q[j][warp][column]) =
              make_float4(sums_q[0], sums_q[1], sums_q[2], sums_q[3]);
          *reinterpret_cast<float4*>(&scratch.sums_k[j][warp][column]) =
              make_float4(sums_k[0], sums_k[1], sums_k[2], sums_k[3]);
        }
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
        const float u[4] = {beta[j] * (v[j].x - column_sum(scratch.sums_k[j], 0) * k_scale),
                            beta[j] * (v[j].y - column_sum(scratch.sums_k[j], 1) * k_scale),
                            beta[j] * (v[j].z - column_sum(scratch.sums_k[j], 2) * k_scale),
                            beta[j] * (v[j].w - column_sum(scratch.sums_k[j], 3) * k_scale)};
        if (own < 4) {
          const float q_dot_k = all(2) * q_scale * k_scale;
          const float scale = 1 / sqrtf(static_cast<float>(kDim));
          float4 o;
          o.x = (column_sum(scratch.sums_q[j], 0) * q_scale + q_dot_k * u[0]) * scale;
          o.y = (column_sum(scratch.sums_q[j], 1) * q_scale + q_dot_k * u[1]) * scale;
          o.z = (column_sum(scratch.sums_q[j], 2) * q_scale + q_dot_k * u[2]) * scale;
          o.w = (column_sum(scratch.sums_q[j], 3) * q_scale + q_dot_k * u[3]) * scale;
          const int head = unit_of(j) / kUnitsOfHead;
          *reinterpret_cast<float4*>(phase.o + head * kDim +
                                     unit_of(j) % kUnitsOfHead * kUnitColumns + column) = o;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float key = scratch.k[j][row + i * 8] * k_scale;
          s[j][i].x = fmaf(key, u[0], s[j][i].x), s[j][i].y = fmaf(key, u[1], s[j][i].y);
          s[j][i].z = fmaf(key, u[2], s[j][i].z), s[j][i].w = fmaf(key, u[3], s[j][i].w);
          __stcs(reinterpret_cast<float4*>(states[j] + i * 8 * kDim), s[j][i]);
        }
      }
      sync_half();  // before the scratch is written again
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
    step_program_kernel(const StepPhase* phases, int count, int batch, Counters* counters) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // elsewhere it is never launched
  extern __shared__ __align__(128) unsigned char memory[];
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
      stream_weights<kHalves, kAny>(phases, count, shared);
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

bool fits(const StepLinearArgs& args) {
  const std::int64_t k = args.x.shape[1];
  if (args.x.shape[0] > kStepLinearRows || k % kBlockColumns != 0 || k > kMaxColumns) return false;
  for (const StepLinearPart& part : args.parts) {
    if (part.epilogue == StepEpilogue::kGlu && args.parts.size() > 1) return false;
  }
  if (args.x.dtype == DType::kF32 && k > kWideF32Blocks * kBlockColumns) return false;
  if (args.norm.data == nullptr) return true;
  const std::int64_t width = args.norm.shape.size();
  return args.x.dtype == DType::kF32 && (width == k || width == kDim);
}

template <int kHalves, bool kAny>
void launch(Context& ctx, const StepProgram& program, const StepPhase* phases, Counters* counters) {
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
  check(cudaLaunchKernelEx(&config, kernel, phases, static_cast<int>(program.phases.size()),
                           program.batch, counters),
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
    part.w = from.w.data;
    part.form = from.w.dtype;
    part.y = from.y.data;
    part.rows = static_cast<int>(outputs_of(from));
    part.stride = static_cast<int>(from.y.shape[1]);
    part.y_is_bf16 = from.y.dtype == DType::kBF16;
    part.epilogue = from.epilogue;
    if (is_packed(part.form)) {
      program->any = true;
      part.turn = program->turn;
      const int panels = (part.rows + kTileRows - 1) / kTileRows;
      program->turn = (program->turn + panels) % ctx.stream().multiprocessors();
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
    const auto* phases = upload(ctx, std::span<const StepPhase>(program->phases));
    auto* counters = static_cast<Counters*>(program->counters.view().data);
    const auto run = program->any ? (program->batch <= 8 ? launch<1, true> : launch<2, true>)
                                  : (program->batch <= 8 ? launch<1, false> : launch<2, false>);
    run(ctx, *program, phases, counters);
    program->clear();
  }
}

void end_step_program(Context& ctx) {
  ctx.stream().close_program();
}

}  // namespace deltafox::cuda
