// Mamba-2's state space in chunks of 64 rows on the tensor cores (the equations are in ops/ssd.h).
//
// A block owns 128 of the columns of a group's heads, 64 a warp group, and walks a sequence. The
// states lie transposed in accumulators, as in delta_rule_chunks.cu. With λ_t the sum of log a from
// the chunk's first row to t, a group's head has
//   Yᵀ = (Sᵀ Cᵀ) diag(e^λ) + Xᵀ Aᵀ + d Xᵀ,  A_ts = (c_t·b_s) e^(λ_t − λ_s) Δ_s  (s ≤ t),
//   Sᵀ ← e^λ_last Sᵀ + Xᵀ diag(Δ_s e^(λ_last − λ_s)) B.
// A third group runs ahead: it loads rows and computes λ and A for both heads. λ never leaves a
// chunk, so its rounding, relative to e^λ, stays below that of the bfloat16 operands.
//
// A long sequence is cut into segments that fill the card. A first walk finds what each but the
// last adds to the state and how much it leaves of it, `join_segments` puts these together one
// after the other, and the second walk computes the outputs of all segments at once.
#include <algorithm>

#include "cuda/card.h"
#include "cuda/check.h"
#include "cuda/decayed_kernels.h"
#include "cuda/ssd_decays.cuh"
#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kChunk = kTileRows;
constexpr int kColumns = 128;  // of a block
constexpr int kStateThreads = 2 * 128;
constexpr int kThreads = kStateThreads + 128;
constexpr int kStages = 2;
constexpr int kJoinThreads = 256;

// Thread blocks of a segment.
int ssd_blocks(const SsdProblem& p) {
  return p.groups * ((p.heads / p.groups * p.head_dim + kColumns - 1) / kColumns);
}

struct ChunkParams {
  SsdProblem problem;
  SsdSegments segments;  // of sequences that have several
  SequenceBatch batch;

  __device__ std::ptrdiff_t state_floats() const {
    return static_cast<std::ptrdiff_t>(problem.heads) * problem.state_size * problem.head_dim;
  }
  // [H, N, P], the state before a segment; behind the first walk, of the segment before it alone.
  __device__ float* state_before(int segment) const {
    return segments.states + segment * state_floats();
  }
};

// What a warp group's head needs of a chunk besides its tiles.
struct alignas(16) Decays {
  float lambda[kChunk];
  float into[kChunk];    // e^λ_t: of the state before the chunk
  float weight[kChunk];  // Δ_s
  float out[kChunk];     // Δ_s e^(λ_last − λ_s): into the state behind the chunk
  float whole;           // e^λ_last
};

template <int kStates>
struct Layout {
  static constexpr int kStateTile = kStates / 64 * kTileBlockBytes;
  static constexpr int kB = 0;
  static constexpr int kC = kStateTile;
  static constexpr int kX = 2 * kStateTile;
  static constexpr int kA = kX + kColumns / 64 * kTileBlockBytes;  // of either head
  static constexpr int kDecays = kA + 2 * kTileBlockBytes;
  static constexpr int kStage = kDecays + 3072;
  static constexpr int kBytes = 1024 + kStages * kStage + 128;
  static_assert(2 * sizeof(Decays) <= 3072);
};

struct Block {
  int begin;  // the first of its rows
  int length;
  const float* state_before;  // [H, N, P], null for zeros
  float* state_behind;        // [H, N, P] or null
  float* decays;              // [H], or null where nobody asks what is left of a state
  int group;
  int first_column;  // of the group's heads
  int columns;       // that exist
  int chunks;

  // The head of a warp group's columns, or of the last column where it has none.
  __device__ int head(const SsdProblem& p, int warp_group) const {
    const int column = min(first_column + 64 * warp_group, heads_per_group(p) * p.head_dim - 1);
    return group * heads_per_group(p) + column / p.head_dim;
  }
  __device__ static int heads_per_group(const SsdProblem& p) { return p.heads / p.groups; }
};

// The rows and states of segment `index` of those that the walk has: all of them, or for kSums all
// but each sequence's last.
template <bool kSums>
__device__ void find_segment(Block& block, const ChunkParams& params, int index) {
  const SequenceBatch& batch = params.batch;
  int low = 0;
  int high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const BatchEntry& entry = batch.entries[middle];
    ((kSums ? entry.first_map : entry.first_block) <= index ? low : high) = middle;
  }
  const BatchEntry& entry = batch.entries[low];
  const int segment = index - (kSums ? entry.first_map : entry.first_block);
  const int chunks = (entry.length + kChunk - 1) / kChunk;
  const int base = chunks / entry.segments;
  const int rest = chunks % entry.segments;
  const int first = segment * base + min(segment, rest);
  block.chunks = base + (segment < rest ? 1 : 0);
  block.begin = entry.begin + first * kChunk;
  block.length = min(block.chunks * kChunk, entry.length - first * kChunk);
  const int place = entry.first_block + segment;
  block.decays = nullptr;
  if (kSums) {
    block.state_before = nullptr;
    block.state_behind = params.state_before(place + 1);
    block.decays = params.segments.decays + place * params.problem.heads;
    return;
  }
  block.state_before = entry.segments == 1 ? entry.state : params.state_before(place);
  block.state_behind = segment == entry.segments - 1 ? entry.state : nullptr;
}

template <int kPieces>
__device__ void load_tile(std::uint32_t tile, const bf16* rows, std::ptrdiff_t stride, int columns,
                          int valid_rows, int thread) {
  constexpr int kRowStep = 128 / kPieces;  // a multiple of 8: the permutation stays the same
  const int piece = thread % kPieces;
  const int first = thread / kPieces;
  const bf16* source = rows + first * stride + piece * 8;
  tile += piece_offset(first, piece);
#pragma unroll
  for (int i = 0; i < kChunk / kRowStep; ++i) {
    const bool valid = piece * 8 < columns && first + i * kRowStep < valid_rows;
    copy_piece_async(tile + i * kRowStep * 128, valid ? source : rows, valid);
    source += kRowStep * stride;
  }
}

template <class Products, int kStates, bool kSums>
__device__ void prepare_chunks(const SsdProblem& p, const Block& block, unsigned char* stages,
                               std::uint32_t barriers) {
  using L = Layout<kStates>;
  const int thread = threadIdx.x % 128;
  const int lane = thread % 32;
  const int warp = uniform(thread / 32);
  const std::ptrdiff_t stride =
      static_cast<std::ptrdiff_t>(p.heads) * p.head_dim + 2 * p.groups * p.state_size;
  const int heads_per_group = Block::heads_per_group(p);
  // Warps 0 and 1 find the decays of the two heads.
  const int head = block.head(p, warp % 2);
  const float rate = -expf(p.a_log[head]);
  const float dt_bias = p.dt_bias[head];

  for (int c = 0; c < block.chunks; ++c) {
    const int stage = c % kStages;
    unsigned char* base = stages + stage * L::kStage;
    const std::uint32_t at = shared_address(base);
    const int valid_rows = min(kChunk, block.length - c * kChunk);
    const auto row = static_cast<std::ptrdiff_t>(block.begin + c * kChunk);
    if (c >= kStages) barrier_wait(barriers + (2 * stage + 1) * 8, (c / kStages - 1) & 1);
    const bf16* token = static_cast<const bf16*>(p.xbc) + row * stride;
    const bf16* b = token + p.heads * p.head_dim + block.group * p.state_size;
    load_tile<kStates / 8>(at + L::kB, b, stride, p.state_size, valid_rows, thread);
    if constexpr (!kSums) {
      load_tile<kStates / 8>(at + L::kC, b + p.groups * p.state_size, stride, p.state_size,
                             valid_rows, thread);
    }
    load_tile<kColumns / 8>(at + L::kX,
                            token + block.group * heads_per_group * p.head_dim + block.first_column,
                            stride, block.columns, valid_rows, thread);
    commit_copies();

    Decays* decays = reinterpret_cast<Decays*>(base + L::kDecays);
    if (warp < 2) {
      const ChunkDecays found = find_decays(rate, valid_rows, [&](int t) {
        const float raw = p.dt[(row + t) * p.heads + head] + dt_bias;
        const float softplus = fmaxf(raw, 0.0F) + log1pf(expf(-fabsf(raw)));
        return fminf(fmaxf(softplus, p.dt_min), p.dt_max);
      });
      Decays& d = decays[warp];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 2 * lane + i;
        d.lambda[t] = found.lambda[i];
        d.into[t] = expf(found.lambda[i]);
        d.weight[t] = found.step[i];
        d.out[t] = found.step[i] * expf(found.last - found.lambda[i]);
      }
      if (lane == 0) d.whole = expf(found.last);
    }
    wait_copies<0>();
    Products::publish();
    group_sync(1);
    if constexpr (kSums) {
      barrier_arrive(barriers + 2 * stage * 8);
      continue;
    }

    float g[8][4];
    Products::begin(g);
    Products::template tiles_transposed<kStates / 16>(g, at + L::kC, at + L::kB);
    Products::commit();
    Products::template wait<0>();
    Products::end(g);
    const int t = 16 * warp + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Decays& d = decays[h];
      const float low = d.lambda[t];
      const float high = d.lambda[t + 8];
      unsigned char* tile = base + L::kA + h * kTileBlockBytes;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < 2 * warp + 2) {
          const int s = 8 * j + 2 * (lane % 4);
          const float2 lambda = *reinterpret_cast<const float2*>(&d.lambda[s]);
          const float2 weight = *reinterpret_cast<const float2*>(&d.weight[s]);
          // Above the diagonal the exponent is positive and may overflow: it is never used there.
          const auto element = [&](float product, float from, int to_row, float to, int column,
                                   float w) {
            return column <= to_row ? product * w * __expf(to - from) : 0;
          };
          unsigned char* to = tile + piece_offset(t, j) + 4 * (lane % 4);
          *reinterpret_cast<std::uint32_t*>(to) =
              pack(element(g[j][0], lambda.x, t, low, s, weight.x),
                   element(g[j][1], lambda.y, t, low, s + 1, weight.y));
          *reinterpret_cast<std::uint32_t*>(to + 8 * 128) =
              pack(element(g[j][2], lambda.x, t + 8, high, s, weight.x),
                   element(g[j][3], lambda.y, t + 8, high, s + 1, weight.y));
        }
      }
    }
    Products::publish();
    barrier_arrive(barriers + 2 * stage * 8);
  }
}

template <class Products, int kStates, bool kSums>
__device__ void walk(const SsdProblem& p, const Block& block, unsigned char* stages,
                     std::uint32_t barriers) {
  using L = Layout<kStates>;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;  // of eight
  const int warp_group = warp / 4;
  const int head = block.head(p, warp_group);
  const int heads_per_group = Block::heads_per_group(p);
  // This warp's 16 columns, counted over the group's heads and within their head.
  const int column = block.first_column + 16 * warp;
  const int own = column % p.head_dim + lane / 4;
  const bool exists = 16 * warp < block.columns;
  const float skip = p.d[head];
  const std::ptrdiff_t state = static_cast<std::ptrdiff_t>(head) * p.state_size * p.head_dim;
  const auto state_at = [&](int j, int i) {
    return state + (8 * j + 2 * (lane % 4) + i % 2) * p.head_dim + own + i / 2 * 8;
  };
  const auto has_state = [&](int j, int i) {
    return exists && 8 * j + 2 * (lane % 4) + i % 2 < p.state_size;
  };

  float s[kStates / 8][4];
#pragma unroll
  for (int j = 0; j < kStates / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool known = block.state_before != nullptr && has_state(j, i);
      s[j][i] = known ? block.state_before[state_at(j, i)] : 0;
    }
  }
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(p.heads) * p.head_dim;
  bf16* out = static_cast<bf16*>(p.y) + block.begin * stride +
              block.group * heads_per_group * p.head_dim + column;
  float left = 1;  // of a state
  for (int c = 0; c < block.chunks; ++c) {
    const int stage = c % kStages;
    unsigned char* base = stages + stage * L::kStage;
    const std::uint32_t at = shared_address(base);
    const Decays& decays = reinterpret_cast<const Decays*>(base + L::kDecays)[warp_group];
    barrier_wait(barriers + 2 * stage * 8, (c / kStages) & 1);

    std::uint32_t x[4][4];
    const std::uint32_t own_piece =
        at + L::kX + piece_offset(8 * (lane / 16) + lane % 8, 2 * warp + (lane / 8) % 2);
#pragma unroll
    for (int k = 0; k < 4; ++k) load_matrices_transposed(x[k], own_piece + 16 * k * 128);
    float y[8][4];
    if constexpr (!kSums) {
      std::uint32_t sf[kStates / 16][4];
      to_operand(sf, s);
      Products::begin(y);
      Products::template times_transposed<true>(y, sf, at + L::kC);
      Products::commit();
      Products::template wait<0>();
      Products::end(y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 into = *reinterpret_cast<const float2*>(&decays.into[8 * j + 2 * (lane % 4)]);
        y[j][0] *= into.x;
        y[j][1] *= into.y;
        y[j][2] *= into.x;
        y[j][3] *= into.y;
      }
    }
    std::uint32_t u[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = 16 * k + i / 2 * 8 + 2 * (lane % 4);
        u[k][i] = scale_pair(x[k][i], *reinterpret_cast<const float2*>(&decays.out[t]));
      }
    }
    const float whole = decays.whole;
    left *= whole;
#pragma unroll
    for (int j = 0; j < kStates / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= whole;
    }
    Products::begin(s);
    if constexpr (!kSums) {
      Products::begin(y);
      Products::template times_transposed<false>(y, x, at + L::kA + warp_group * kTileBlockBytes);
    }
    Products::template times<false>(s, u, at + L::kB);
    Products::commit();
    Products::template wait<0>();
    Products::end(s);
    if constexpr (!kSums) Products::end(y);

    if constexpr (!kSums) {
      // Through this warp's own columns of the tile of x to memory.
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t m[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x[k][i]));
          const float* sum = y[2 * k + i / 2] + i % 2 * 2;
          m[i] = pack(sum[0] + skip * pair.x, sum[1] + skip * pair.y);
        }
        store_matrices_transposed(own_piece + 16 * k * 128, m);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * i + lane / 2;
        uint4 data;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                     : "r"(at + L::kX + piece_offset(row, 2 * warp + lane % 2))
                     : "memory");
        if (exists && c * kChunk + row < block.length) {
          *reinterpret_cast<uint4*>(out + (c * kChunk + row) * stride + 8 * (lane % 2)) = data;
        }
      }
    }
    barrier_arrive(barriers + (2 * stage + 1) * 8);
  }
  // By the warp of the head's first columns.
  if (kSums && exists && column % p.head_dim == 0 && lane == 0) block.decays[head] = left;
  if (block.state_behind == nullptr) return;
#pragma unroll
  for (int j = 0; j < kStates / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (has_state(j, i)) block.state_behind[state_at(j, i)] = s[j][i];
    }
  }
}

template <class Products, int kStates, bool kSums>
__global__ void __launch_bounds__(kThreads, 1)
    ssd_chunks(const __grid_constant__ ChunkParams params) {
  // Other targets compile this kernel too, and never launch it.
  if constexpr (!Products::kGroup || kHasGroupProducts) {
    using L = Layout<kStates>;
    extern __shared__ unsigned char shared[];
    unsigned char* stages = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const SsdProblem& p = params.problem;
    const int group_columns = Block::heads_per_group(p) * p.head_dim;
    const int blocks_per_group = (group_columns + kColumns - 1) / kColumns;
    Block block;
    find_segment<kSums>(block, params, static_cast<int>(blockIdx.y));
    block.group = blockIdx.x / blocks_per_group;
    block.first_column = blockIdx.x % blocks_per_group * kColumns;
    block.columns = min(kColumns, group_columns - block.first_column);

    const std::uint32_t barriers = shared_address(stages + kStages * L::kStage);
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(barriers + 2 * s * 8, 128);
        barrier_init(barriers + (2 * s + 1) * 8, kStateThreads);
      }
    }
    // What lies above the diagonal blocks is written here, once.
    for (int s = 0; s < kStages; ++s) {
      for (int i = threadIdx.x; i < 2 * kTileBlockBytes / 16; i += kThreads) {
        reinterpret_cast<uint4*>(stages + s * L::kStage + L::kA)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    Products::publish();
    __syncthreads();
    if (threadIdx.x >= kStateThreads) {
      if constexpr (Products::kGroup) give_registers<88>();
      prepare_chunks<Products, kStates, kSums>(p, block, stages, barriers);
    } else {
      if constexpr (Products::kGroup) take_registers<208>();
      walk<Products, kStates, kSums>(p, block, stages, barriers);
    }
  }
}

// From what the segments add and leave, in the place behind each, to the states before them.
__global__ void __launch_bounds__(kJoinThreads)
    join_segments(const __grid_constant__ ChunkParams params) {
  const BatchEntry& entry = params.batch.entries[blockIdx.y];
  const std::ptrdiff_t i = static_cast<std::ptrdiff_t>(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (entry.segments == 1 || i >= params.state_floats()) return;
  const int heads = params.problem.heads;
  const auto head = i / (params.state_floats() / heads);
  float state = entry.state[i];
  for (int place = entry.first_block; place < entry.first_block + entry.segments; ++place) {
    const bool last = place == entry.first_block + entry.segments - 1;
    const float sum = last ? 0 : params.state_before(place + 1)[i];
    const float left = last ? 0 : params.segments.decays[place * heads + head];
    params.state_before(place)[i] = state;
    state = fmaf(left, state, sum);
  }
}

template <class Products, int kStates, bool kSums>
void launch_walk(const ChunkParams& params, cudaStream_t stream) {
  constexpr int kBytes = Layout<kStates>::kBytes;
  const auto kernel = ssd_chunks<Products, kStates, kSums>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  const SsdProblem& p = params.problem;
  const int segments = kSums ? params.batch.maps : params.batch.blocks;
  kernel<<<dim3(ssd_blocks(p), segments), kThreads, kBytes, stream>>>(params);
  check_launch("ssd_chunks");
}

template <class Products, int kStates>
void launch(const ChunkParams& params, cudaStream_t stream) {
  if (params.batch.maps > 0) {
    launch_walk<Products, kStates, true>(params, stream);
    const SsdProblem& p = params.problem;
    const int blocks = (p.heads * p.state_size * p.head_dim + kJoinThreads - 1) / kJoinThreads;
    join_segments<<<dim3(blocks, params.batch.count), kJoinThreads, 0, stream>>>(params);
    check_launch("ssd_chunks");
  }
  launch_walk<Products, kStates, false>(params, stream);
}

}  // namespace

bool ssd_chunks_fit(const SsdProblem& p) {
  return p.is_bf16 && p.head_dim % 64 == 0 && p.state_size % 8 == 0 && p.state_size <= 128 &&
         most_shared_bytes() >= (p.state_size <= 64 ? Layout<64>::kBytes : Layout<128>::kBytes);
}

int ssd_segments(const SsdProblem& problem, int length, int tokens_bucket, int multiprocessors) {
  // Two walks cost about half as much again as one.
  constexpr int kLeastChunks = 2;
  constexpr int kLeastSegments = 3;
  const int chunks = (length + kChunk - 1) / kChunk;
  // As many as fill the card if the batch has the fewest chunks of its bucket.
  const int chunks_of_batch = std::max(1, tokens_bucket / 2 / kChunk);
  const int blocks = ssd_blocks(problem);
  const int fill = static_cast<int>(static_cast<std::int64_t>(chunks) * multiprocessors /
                                    (static_cast<std::int64_t>(chunks_of_batch) * blocks));
  const int segments = std::min({multiprocessors / blocks, fill, chunks / kLeastChunks});
  return segments < kLeastSegments ? 1 : segments;
}

void launch_ssd_chunks(const SsdProblem& problem, const SsdSegments& segments,
                       const SequenceBatch& batch, cudaStream_t stream) {
  const ChunkParams params{.problem = problem, .segments = segments, .batch = batch};
  const bool group = compute_major() == 9;
  if (problem.state_size <= 64) {
    group ? launch<GroupProducts, 64>(params, stream) : launch<WarpProducts, 64>(params, stream);
  } else {
    group ? launch<GroupProducts, 128>(params, stream) : launch<WarpProducts, 128>(params, stream);
  }
}

}  // namespace deltafox::cuda
