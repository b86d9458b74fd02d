// The delta rule's gradients in chunks of 64 rows on the tensor cores (docs/numerics.md has the
// equations), in bfloat16 with float32 sums. With G = tril(K Kᵀ, −1), T = (I + diag(β) G)⁻¹ diag(β)
// and P = tril(Q Kᵀ):
//
// 1. `prepare`, all chunks at once: T and P.
// 2. `walk<kGradients>`, a block a segment as in delta_rule_chunks.cu, from the last chunk to the
//    first: keeps the gradient of the state behind each chunk and yields
//      dV = dE = Tᵀ (Pᵀ dO + K dS),  dS ← dS + Qᵀ dO − Kᵀ dE
//    Everything is linear in dO, so 1/√K is left to what is stored.
// 3. `finish`, from the first chunk to the last: two warp groups carry the state as the forward's
//    do, U = T (V − K S), S ← S + Kᵀ U, and pass S and U of each chunk in shared memory to a third.
//    With M = tril(dE Uᵀ, −1) and dO over √K it computes
//      dQ = dO Sᵀ + tril(dO Uᵀ) K,  dβ_t = dE_t·U_t / β_t²
//      dK = U dSᵀ + tril(dO Uᵀ)ᵀ Q − dE Sᵀ − (M + Mᵀ) K
//    A triangle's transpose is a product of its own, not a transposition: so all of them are made
//    in registers and are left operands there. A fourth group loads.
//
// For dβ, a β nearer to 0 than 2⁻⁴⁰ counts as 2⁻⁴⁰, far below what rounding leaves of the rest.
//
// Segments need the state before them and the gradient behind them. The first comes as in the
// forward from affine maps [M | N]. Gradients pass a segment by dS ← Mᵀ dS + N' with the same M;
// N' is what a walk over the segment leaves of dS = 0.
#include <cmath>

#include "cuda/delta_rule_chunks.cuh"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

using Products = GroupProducts;

constexpr int kWalkThreads = kStateThreads + 128;
constexpr int kValueSteps = kValues / 16;  // of a product's depth
constexpr float kLeastBeta = 0x1p-40F;

// What the passes keep, in bfloat16 but the maps. [c, h] counts the chunks of the whole batch; K'
// is the padded K.
struct Workspace {
  float* maps;     // see launch_delta_rule_joins
  float* d_maps;   // likewise
  bf16* inverses;  // [c, h] tiles [64, 64] of −Tᵀ
  bf16* scores;    // [c, h] tiles [64, 64] of P
  bf16* d_states;  // [c, h, 128, K'], √K dSᵀ behind it

  // Bytes of all; fills in the pointers if there is memory.
  std::size_t plan(const DeltaRuleBackwardProblem& problem, const SequenceBatch& batch,
                   void* memory) {
    const auto heads = static_cast<std::size_t>(problem.heads);
    const auto keys = static_cast<std::size_t>(padded_keys(problem.key_dim));
    const std::size_t maps_of_heads = heads * static_cast<std::size_t>(batch.maps);
    const std::size_t chunks = heads * static_cast<std::size_t>(batch.chunks);
    std::size_t used = 0;
    const auto take = [&](auto*& pointer, std::size_t count) {
      auto* bytes = static_cast<std::byte*>(memory);
      if (memory != nullptr) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(bytes + used);
      }
      used += count * sizeof(*pointer);
    };
    take(maps, maps_of_heads * (kValues + keys) * keys);
    take(d_maps, maps_of_heads * kValues * keys);
    take(inverses, chunks * kChunk * kChunk);
    take(scores, chunks * kChunk * kChunk);
    take(d_states, chunks * kValues * keys);
    return used;
  }
};

struct BackwardParams {
  DeltaRuleBackwardProblem problem;
  Workspace workspace;
  float scale;  // 1 / √K
  SequenceBatch batch;

  // Of [c, h], the place in an array of so many elements each.
  __device__ std::size_t place(int chunk, int head, int elements) const {
    return (static_cast<std::size_t>(chunk) * problem.heads + head) * elements;
  }
};

// One chunk of one head.
struct Chunk {
  int index;           // of those of the batch
  std::ptrdiff_t row;  // its first
  int rows;
};

__device__ Chunk find_chunk(const SequenceBatch& batch, int index) {
  const BatchEntry& entry = find_entry(batch, &BatchEntry::first_chunk, index);
  const int first = (index - entry.first_chunk) * kChunk;
  return {index, entry.begin + first, min(kChunk, entry.length - first)};
}

// The first 8·kPieces columns from `first` on of a chunk's rows of x [T, H, size].
template <int kPieces>
__device__ void load_rows(std::uint32_t tile, const void* x, const Chunk& chunk, int heads,
                          int head, int size, int first = 0) {
  const bf16* rows = static_cast<const bf16*>(x) + (chunk.row * heads + head) * size + first;
  load_tile<kPieces>(tile, rows, heads * size, size - first, chunk.rows, read_thread() % 128);
}

// A tile that lies in memory as it does in shared memory.
__device__ void load_image(std::uint32_t tile, const bf16* from) {
  const int thread = read_thread() % 128;
#pragma unroll
  for (int i = 0; i < kTileBlockBytes / 16; i += 128) {
    copy_piece_async(tile + (i + thread) * 16, from + (i + thread) * 8, true);
  }
}

__device__ float beta_at(const BackwardParams& p, std::ptrdiff_t row, int head) {
  if (p.problem.beta == nullptr) return 1;
  const float beta = p.problem.beta[row * p.problem.heads + head];
  return fabsf(beta) < kLeastBeta ? kLeastBeta : beta;
}

// This warp's 16 rows of a left operand to rows of memory, `to` being the lane's first (l/4); only
// rows below `rows`, counted from that one, and the first `columns` columns.
template <int kSteps>
__device__ void store_operand(const std::uint32_t (&f)[kSteps][4], bf16* to, int stride, int rows,
                              int columns) {
  const int quarter = read_thread() % 4;
#pragma unroll
  for (int k = 0; k < kSteps; k += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane q of four has columns 2q, 2q + 1 of four 8×8 matrices; it gets all of matrix q's.
      std::uint32_t m[4] = {f[k][half], f[k][half + 2], f[k + 1][half], f[k + 1][half + 2]};
      transpose_quads(m);
      const int column = 16 * k + 8 * quarter;
      if (8 * half < rows && column < columns) {
        *reinterpret_cast<uint4*>(to + 8 * half * stride + column) =
            make_uint4(m[0], m[1], m[2], m[3]);
      }
    }
  }
}

template <int kTiles>
__device__ void clear(float (&d)[kTiles][4]) {
  WarpProducts::clear(d);
}

// ---- All chunks at once: T and P --------------------------------------------------------------

template <int kKeys>
struct PrepareLayout {
  static constexpr int kK = 0;
  static constexpr int kQ = kKeys / 64 * kTileBlockBytes;
  static constexpr int kT = 2 * kQ;
  static constexpr int kP = kT + kTileBlockBytes;
  static constexpr int kInverse = kP + kTileBlockBytes;
  static constexpr int kBeta = kInverse + 10 * kInverseBlock * 4;
  static constexpr int kBytes = 1024 + kBeta + kChunk * 4;
};

__device__ unsigned char* align_tiles(unsigned char* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

template <int kKeys>
__global__ void __launch_bounds__(128) prepare(const __grid_constant__ BackwardParams p) {
  if constexpr (kHasGroupProducts) {
    using L = PrepareLayout<kKeys>;
    extern __shared__ unsigned char shared[];
    unsigned char* base = align_tiles(shared);
    const int head = blockIdx.x;
    const Chunk chunk = find_chunk(p.batch, blockIdx.y);
    const DeltaRuleBackwardProblem& problem = p.problem;
    const std::uint32_t k = shared_address(base + L::kK);
    const std::uint32_t q = shared_address(base + L::kQ);
    load_rows<kKeys / 8>(k, problem.k, chunk, problem.heads, head, problem.key_dim);
    load_rows<kKeys / 8>(q, problem.q, chunk, problem.heads, head, problem.key_dim);
    float* beta = reinterpret_cast<float*>(base + L::kBeta);
    if (threadIdx.x < kChunk) {
      const int t = threadIdx.x;
      beta[t] = t < chunk.rows ? beta_at(p, chunk.row + t, head) : 0;
    }
    for (int i = threadIdx.x; i < 2 * kTileBlockBytes / 16; i += 128) {
      reinterpret_cast<uint4*>(base + L::kT)[i] = make_uint4(0, 0, 0, 0);
    }
    commit_copies();
    wait_copies<0>();
    Products::publish();
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const int warp = uniform(threadIdx.x / 32);
    float* blocks = reinterpret_cast<float*>(base + L::kInverse);
    float g[8][4];
    float a[8][4];
    Products::begin(g);
    Products::begin(a);
    Products::tiles_transposed<kKeys / 16>(g, k, k);
    Products::commit();
    Products::tiles_transposed<kKeys / 16>(a, q, k);
    Products::commit();
    Products::wait<1>();
    Products::end(g);
    store_scaled_products(g, beta, blocks, lane, warp);
    invert_diagonal(inverse_block(blocks, warp, warp), lane % 16);
    Products::wait<0>();
    Products::end(a);
    store_lower(a, base + L::kP, lane, warp);
    __syncthreads();
    finish_inverse(blocks, beta, base + L::kT, lane, warp);
    __syncthreads();
    const std::size_t to = p.place(chunk.index, head, kChunk * kChunk);
    const auto* tiles = reinterpret_cast<const uint4*>(base + L::kT);
#pragma unroll
    for (int i = 0; i < kTileBlockBytes / 16; i += 128) {
      const int piece = i + threadIdx.x;
      reinterpret_cast<uint4*>(p.workspace.inverses + to)[piece] = tiles[piece];
      reinterpret_cast<uint4*>(p.workspace.scores + to)[piece] =
          tiles[kTileBlockBytes / 16 + piece];
    }
  }
}

// ---- Walks over the chunks of a segment -------------------------------------------------------

enum class Walk {
  kMaps,          // forwards, [M | N] of all segments but each sequence's last
  kGradientMaps,  // backwards, N' of all segments but each sequence's first
  kGradients,     // backwards
};

template <int kKeys, Walk kWalk>
struct WalkLayout {
  static constexpr bool kReverse = kWalk == Walk::kGradientMaps || kWalk == Walk::kGradients;
  static constexpr int kKeyTile = kKeys / 64 * kTileBlockBytes;
  static constexpr int kValueTile = kValues / 64 * kTileBlockBytes;
  static constexpr int kK = 0;
  static constexpr int kV = kKeyTile;  // or dO
  static constexpr int kT = kV + kValueTile;
  static constexpr int kQ = kT + kTileBlockBytes;
  static constexpr int kP = kQ + kKeyTile;
  static constexpr int kStage = kReverse ? kP + kTileBlockBytes : kQ;

  static constexpr int kStages = kReverse ? 3 : 4;
  static constexpr int kBarriers = kStages * kStage;  // full, empty of each stage
  static constexpr int kBytes = 1024 + kBarriers + kStages * 16;
};

// The step'th chunk of a walk.
template <bool kReverse>
__device__ Chunk walk_chunk(const Segment& segment, int step) {
  const int c = kReverse ? segment.chunks - 1 - step : step;
  return {segment.first_chunk + c, segment.begin + c * kChunk,
          min(kChunk, segment.rows - c * kChunk)};
}

// The group that loads: a chunk's copies are on their way while those of the next are started.
template <int kKeys, Walk kWalk>
__device__ void load_chunks(const BackwardParams& p, const Segment& segment, int head,
                            std::uint32_t stages, std::uint32_t barriers) {
  using L = WalkLayout<kKeys, kWalk>;
  const DeltaRuleBackwardProblem& problem = p.problem;
  int stage = 0;
  int round = 0;
  int ready = 0;  // the stage whose copies are waited for next
  for (int step = 0; step <= segment.chunks; ++step) {
    if (step < segment.chunks) {
      if (round > 0) barrier_wait(barriers + (2 * stage + 1) * 8, (round - 1) & 1);
      const Chunk chunk = walk_chunk<L::kReverse>(segment, step);
      const std::uint32_t base = stages + stage * L::kStage;
      const std::size_t image = p.place(chunk.index, head, kChunk * kChunk);
      load_rows<kKeys / 8>(base + L::kK, problem.k, chunk, problem.heads, head, problem.key_dim);
      load_rows<kValues / 8>(base + L::kV, L::kReverse ? problem.d_o : problem.v, chunk,
                             problem.heads, head, problem.value_dim);
      load_image(base + L::kT, p.workspace.inverses + image);
      if (L::kReverse) {
        load_rows<kKeys / 8>(base + L::kQ, problem.q, chunk, problem.heads, head, problem.key_dim);
        load_image(base + L::kP, p.workspace.scores + image);
      }
      if (++stage == L::kStages) {
        stage = 0;
        ++round;
      }
    }
    commit_copies();
    if (step > 0) {
      wait_copies<1>();
      Products::publish();
      barrier_arrive(barriers + 2 * ready * 8);
      if (++ready == L::kStages) ready = 0;
    }
  }
}

template <int kKeys, Walk kWalk>
__device__ void walk_gradients(const BackwardParams& p, const Segment& segment, int head,
                               std::uint32_t tiles, std::uint32_t barriers) {
  using L = WalkLayout<kKeys, kWalk>;
  constexpr bool kResults = kWalk == Walk::kGradients;
  const DeltaRuleBackwardProblem& problem = p.problem;
  const int row = state_row();
  const int first_map = segment.entry->first_map + segment.index;
  float ds[kKeys / 8][4];
  if (kResults && !segment.last) {
    load_transposed(ds, p.workspace.d_maps + p.place(first_map, head, kValues * kKeys), row);
  } else {
    clear(ds);
  }
  Stages<L::kStage> stages{tiles, barriers, L::kStages};
  for (int step = 0; step < segment.chunks; ++step) {
    const Chunk chunk = walk_chunk<L::kReverse>(segment, step);
    std::uint32_t dsf[kKeys / 16][4];
    to_operand(dsf, ds);
    if (kResults) {
      const std::size_t first_row = p.place(chunk.index, head, kValues) + row;
      store_operand(dsf, p.workspace.d_states + first_row * kKeys, kKeys, kChunk, kKeys);
    }
    const std::uint32_t base = stages.wait();
    std::uint32_t d_o[4][4];
    std::uint32_t f[4][4];
    load_columns(d_o, base + L::kV);
    float e[8][4];  // dUᵀ, then −dEᵀ
    Products::begin(e);
    Products::begin(ds);
    Products::times<true>(e, d_o, base + L::kP);
    Products::times_transposed<false>(e, dsf, base + L::kK);
    Products::commit();
    Products::times<false>(ds, d_o, base + L::kQ);
    Products::commit();
    Products::wait<1>();
    Products::end(e);
    to_operand(f, e);
    Products::begin(e);
    Products::times_transposed<true>(e, f, base + L::kT);
    Products::commit();
    Products::wait<0>();
    Products::end(e);
    Products::end(ds);
    to_operand(f, e);
    Products::begin(ds);
    Products::times<false>(ds, f, base + L::kK);
    Products::commit();
    if (kResults) {
      bf16* dv =
          static_cast<bf16*>(problem.dv) + (chunk.row * problem.heads + head) * problem.value_dim;
      store_columns(e, -p.scale, base + L::kV, dv, problem.heads * problem.value_dim, chunk.rows,
                    problem.value_dim);
    }
    Products::wait<0>();
    Products::end(ds);
    stages.give_back();
  }
  if (!kResults) {
    store_transposed(ds, p.workspace.d_maps + p.place(first_map - 1, head, kValues * kKeys), row);
  }
}

template <int kKeys, Walk kWalk>
__global__ void __launch_bounds__(kWalkThreads, 1) walk(const __grid_constant__ BackwardParams p) {
  if constexpr (kHasGroupProducts) {
    using L = WalkLayout<kKeys, kWalk>;
    extern __shared__ unsigned char shared[];
    const std::uint32_t tiles = shared_address(align_tiles(shared));
    const std::uint32_t barriers = tiles + L::kBarriers;
    const int head = blockIdx.x;
    constexpr bool kMap = kWalk == Walk::kMaps || kWalk == Walk::kGradientMaps;
    constexpr auto kFirst = kMap ? &BatchEntry::first_map : &BatchEntry::first_block;
    const BatchEntry& entry = find_entry(p.batch, kFirst, blockIdx.y);
    const int part = static_cast<int>(blockIdx.y) - entry.*kFirst;
    const Segment segment = segment_of(entry, part + (kWalk == Walk::kGradientMaps ? 1 : 0));
    if (threadIdx.x == 0) {
      for (int s = 0; s < L::kStages; ++s) {
        barrier_init(barriers + 2 * s * 8, 128);
        barrier_init(barriers + (2 * s + 1) * 8, kStateThreads);
      }
    }
    __syncthreads();
    if (threadIdx.x >= kStateThreads) {
      give_registers<56>();
      load_chunks<kKeys, kWalk>(p, segment, head, tiles, barriers);
    } else {
      take_registers<224>();
      if constexpr (kWalk == Walk::kMaps) {
        float n[kKeys / 8][4];
        clear(n);
        const int map = entry.first_map + part;
        walk_maps<Products, L, kKeys>(
            n, segment, {tiles, barriers, L::kStages},
            p.workspace.maps + p.place(map, head, static_cast<int>(map_floats(kKeys))));
      } else {
        walk_gradients<kKeys, kWalk>(p, segment, head, tiles, barriers);
      }
    }
  }
}

// ---- The walk that finishes: states, dQ, dK and dβ ---------------------------------------------

constexpr int kFinishThreads = kStateThreads + 2 * 128;

// Buffers in shared memory that one side fills and another reads, in turns; each side counts
// chunks.
template <int kCount, int kTile, int kBytes, int kBarrier>
struct Buffers {
  static constexpr int kEndTile = kTile + kCount * kBytes;
  static constexpr int kEndBarrier = kBarrier + 2 * kCount;

  __device__ static void init(std::uint32_t barriers, int fills, int reads) {
    for (int i = 0; i < kCount; ++i) {
      barrier_init(full(barriers, i), fills);
      barrier_init(empty(barriers, i), reads);
    }
  }
  __device__ static std::uint32_t full(std::uint32_t barriers, int chunk) {
    return barriers + 8 * (kBarrier + chunk % kCount);
  }
  __device__ static std::uint32_t empty(std::uint32_t barriers, int chunk) {
    return barriers + 8 * (kBarrier + kCount + chunk % kCount);
  }
  __device__ static std::uint32_t tile(std::uint32_t tiles, int chunk) {
    return tiles + kTile + chunk % kCount * kBytes;
  }
  __device__ static void wait_full(std::uint32_t barriers, int chunk) {
    barrier_wait(full(barriers, chunk), chunk / kCount & 1);
    GroupProducts::publish();  // copies by cp.async are made known to products on this side
  }
  __device__ static void wait_empty(std::uint32_t barriers, int chunk) {
    if (chunk >= kCount) barrier_wait(empty(barriers, chunk), (chunk / kCount - 1) & 1);
  }
  __device__ static void give_back(std::uint32_t barriers, int chunk) {
    barrier_arrive(empty(barriers, chunk));
  }
  // This thread's copies so far count as its part of the fill once they are done.
  __device__ static void arrive_with_copies(std::uint32_t barriers, int chunk) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full(barriers, chunk))
                 : "memory");
  }
};

template <int kKeys>
struct FinishLayout {
  static constexpr int kKeyTile = kKeys / 64 * kTileBlockBytes;
  static constexpr int kValueTile = kValues / 64 * kTileBlockBytes;
  static constexpr int kStateTile = kKeys / 64 * kValueTile;  // [128, 64] for every 64 keys
  // K; V, −Tᵀ; dO, dE; Q, dSᵀ; Sᵀ, Uᵀ
  using Keys = Buffers<2, 0, kKeyTile, 0>;
  using ValuesAndInverse =
      Buffers<1, Keys::kEndTile, kValueTile + kTileBlockBytes, Keys::kEndBarrier>;
  using Outputs =
      Buffers<2, ValuesAndInverse::kEndTile, 2 * kValueTile, ValuesAndInverse::kEndBarrier>;
  using Queries = Buffers<1, Outputs::kEndTile, kKeyTile + kStateTile, Outputs::kEndBarrier>;
  using States = Buffers<1, Queries::kEndTile, kStateTile + kValueTile, Queries::kEndBarrier>;
  static constexpr int kBarriers = States::kEndTile;
  static constexpr int kBytes = 1024 + kBarriers + 8 * States::kEndBarrier;
};

template <int kKeys>
__device__ void load_all(const BackwardParams& p, const Segment& segment, int head,
                         std::uint32_t tiles, std::uint32_t barriers) {
  using L = FinishLayout<kKeys>;
  const DeltaRuleBackwardProblem& problem = p.problem;
  const int heads = problem.heads;
  for (int c = 0; c < segment.chunks; ++c) {
    const Chunk chunk = walk_chunk<false>(segment, c);
    L::Keys::wait_empty(barriers, c);
    load_rows<kKeys / 8>(L::Keys::tile(tiles, c), problem.k, chunk, heads, head, problem.key_dim);
    L::Keys::arrive_with_copies(barriers, c);
    L::ValuesAndInverse::wait_empty(barriers, c);
    const std::uint32_t v = L::ValuesAndInverse::tile(tiles, c);
    load_rows<kValues / 8>(v, problem.v, chunk, heads, head, problem.value_dim);
    load_image(v + L::kValueTile,
               p.workspace.inverses + p.place(chunk.index, head, kChunk * kChunk));
    L::ValuesAndInverse::arrive_with_copies(barriers, c);
    L::Outputs::wait_empty(barriers, c);
    const std::uint32_t d_o = L::Outputs::tile(tiles, c);
    load_rows<kValues / 8>(d_o, problem.d_o, chunk, heads, head, problem.value_dim);
    load_rows<kValues / 8>(d_o + L::kValueTile, problem.dv, chunk, heads, head, problem.value_dim);
    L::Outputs::arrive_with_copies(barriers, c);
    L::Queries::wait_empty(barriers, c);
    const std::uint32_t q = L::Queries::tile(tiles, c);
    load_rows<kKeys / 8>(q, problem.q, chunk, heads, head, problem.key_dim);
    const bf16* d_state = p.workspace.d_states + p.place(chunk.index, head, kValues * kKeys);
#pragma unroll
    for (int i = 0; i < kKeys / 64; ++i) {
      load_tile<8, kValues>(q + L::kKeyTile + i * L::kValueTile, d_state + 64 * i, kKeys, 64,
                            kValues, read_thread() % 128);
    }
    L::Queries::arrive_with_copies(barriers, c);
  }
  commit_copies();
  wait_copies<0>();
}

// This warp's 16 rows of a left operand to a tile of 64 columns.
__device__ void store_tile(const std::uint32_t (&f)[4][4], std::uint32_t tile) {
  const int thread = read_thread();
  const int lane = thread % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    store_matrices(tile + piece_offset(thread / 32 * 16 + lane % 16, 2 * k + lane / 16), f[k]);
  }
}

template <int kKeys>
__device__ void advance_states(const BackwardParams& p, const Segment& segment, int head,
                               std::uint32_t tiles, std::uint32_t barriers) {
  using L = FinishLayout<kKeys>;
  float s[kKeys / 8][4];
  if (segment.index == 0) {
    clear(s);
  } else {
    const std::size_t map = p.place(segment.entry->first_map + segment.index - 1, head,
                                    static_cast<int>(map_floats(kKeys)));
    load_transposed(s, p.workspace.maps + map, state_row());
  }
  // In parts of 64 keys, lest the state and its rounded copy outgrow the registers.
  const auto part = [&](int i) -> const float(&)[8][4] {
    return reinterpret_cast<const float(&)[8][4]>(s[8 * i]);
  };
  for (int c = 0; c < segment.chunks; ++c) {
    std::uint32_t f[4][4];
    float r[8][4];
    L::ValuesAndInverse::wait_full(barriers, c);
    L::Keys::wait_full(barriers, c);
    const std::uint32_t k = L::Keys::tile(tiles, c);
    const std::uint32_t v = L::ValuesAndInverse::tile(tiles, c);
    load_negated_columns(r, v);
#pragma unroll
    for (int i = 0; i < kKeys / 64; ++i) {
      to_operand(f, part(i));
      Products::begin(r);
      Products::times_transposed<false>(r, f, k + i * kTileBlockBytes);
      Products::commit();
      Products::wait<0>();
      Products::end(r);
    }
    to_operand(f, r);
    Products::begin(r);
    Products::times<true>(r, f, v + L::kValueTile);
    Products::commit();
    Products::wait<0>();
    Products::end(r);
    L::ValuesAndInverse::give_back(barriers, c);
    L::States::wait_empty(barriers, c);
    const std::uint32_t state = L::States::tile(tiles, c);
    to_operand(f, r);
    store_tile(f, state + L::kStateTile);
#pragma unroll
    for (int i = 0; i < kKeys / 64; ++i) {
      std::uint32_t sf[4][4];
      to_operand(sf, part(i));
      store_tile(sf, state + i * L::kValueTile);
    }
    Products::publish();
    barrier_arrive(L::States::full(barriers, c));
    Products::begin(s);
    Products::times<false>(s, f, k);
    Products::commit();
    Products::wait<0>();
    Products::end(s);
    L::Keys::give_back(barriers, c);
  }
}

// What of a product's elements to keep: keep(row, column). The comparisons are made anew each time:
// kept over the chunks, they would not fit in the registers.
template <class Keep>
__device__ void mask(float (&d)[8][4], const Keep& keep) {
  const int thread = read_thread() % 128;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!keep(row + i / 2 * 8, 8 * j + 2 * (lane % 4) + i % 2)) d[j][i] = 0;
    }
  }
}

// dβ from the diagonal of dE Uᵀ; `beta` is that of a lane's rows.
__device__ void store_dbeta(const BackwardParams& p, const Chunk& chunk, int head,
                            const float (&d)[8][4], const float (&beta)[2]) {
  const int thread = read_thread() % 128;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = row + i / 2 * 8;
      if (8 * j + 2 * (lane % 4) + i % 2 == t && t < chunk.rows) {
        const float b = beta[i / 2];
        p.problem.dbeta[(chunk.row + t) * p.problem.heads + head] = d[j][i] / b / b;
      }
    }
  }
}

__device__ void scale(float (&d)[8][4], float factor) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[j][i] *= factor;
  }
}

template <int kKeys>
__device__ void query_and_key_gradients(const BackwardParams& p, const Segment& segment, int head,
                                        std::uint32_t tiles, std::uint32_t barriers) {
  using L = FinishLayout<kKeys>;
  const DeltaRuleBackwardProblem& problem = p.problem;
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  // Whether this lane has elements (row, row) and (row + 8, row + 8) of a product.
  const bool diagonal = lane / 4 / 2 == lane % 4;
  for (int c = 0; c < segment.chunks; ++c) {
    const Chunk chunk = walk_chunk<false>(segment, c);
    float beta[2] = {1, 1};
    if (diagonal && problem.dbeta != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i < chunk.rows) beta[i] = beta_at(p, chunk.row + row + 8 * i, head);
      }
    }
    L::Outputs::wait_full(barriers, c);
    L::States::wait_full(barriers, c);
    const std::uint32_t d_o = L::Outputs::tile(tiles, c);
    const std::uint32_t d_e = d_o + L::kValueTile;
    const std::uint32_t state = L::States::tile(tiles, c);
    const std::uint32_t u = state + L::kStateTile;
    float x[8][4];
    float y[8][4];
    std::uint32_t n[4][4];  // tril(dO Uᵀ)ᵀ, then tril(dO Uᵀ)
    std::uint32_t m[4][4];  // M + Mᵀ
    // Two products are under way at a time; one is masked and packed while the other goes on.
    Products::begin(x);
    Products::begin(y);
    Products::tiles<true, kValueSteps, true, true>(y, u, d_o);
    Products::commit();
    Products::tiles<true, kValueSteps, false, false>(x, d_e, u);
    Products::commit();
    Products::wait<1>();
    Products::end(y);
    mask(y, [](int r, int s) { return s >= r; });
    to_operand(n, y);
    Products::begin(y);
    Products::tiles<true, kValueSteps, true, true>(y, u, d_e);
    Products::commit();
    Products::wait<1>();
    Products::end(x);
    if (problem.dbeta != nullptr) store_dbeta(p, chunk, head, x, beta);
    mask(x, [](int r, int s) { return s < r; });
    Products::wait<0>();
    Products::end(y);
    mask(y, [](int r, int s) { return s > r; });
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j][i] += y[j][i];
    }
    to_operand(m, x);

    L::Queries::wait_full(barriers, c);
    L::Keys::wait_full(barriers, c);
    const std::uint32_t k = L::Keys::tile(tiles, c);
    const std::uint32_t q = L::Queries::tile(tiles, c);
    // Of 64 keys from 64·i on.
    const auto store = [&](const float(&d)[8][4], int i, void* gradient) {
      const int thread = read_thread() % 128;
      const int first = thread / 32 * 16 + thread % 32 / 4;
      std::uint32_t f[4][4];
      to_operand(f, d);
      bf16* to = static_cast<bf16*>(gradient) +
                 ((chunk.row + first) * problem.heads + head) * problem.key_dim + 64 * i;
      store_operand(f, to, problem.heads * problem.key_dim, chunk.rows - first,
                    problem.key_dim - 64 * i);
    };
    // x: √K (U dSᵀ + tril(dO Uᵀ)ᵀ Q); y: dE Sᵀ + (M + Mᵀ) K
#pragma unroll 1
    for (int i = 0; i < kKeys / 64; ++i) {
      Products::begin(x);
      Products::begin(y);
      Products::tiles<true, kValueSteps, true, false>(x, u, q + L::kKeyTile + i * L::kValueTile);
      Products::times<false>(x, n, q + i * kTileBlockBytes);
      Products::tiles<true, kValueSteps, false, false>(y, d_e, state + i * L::kValueTile);
      Products::times<false>(y, m, k + i * kTileBlockBytes);
      Products::commit();
      Products::wait<0>();
      Products::end(x);
      Products::end(y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[j][e] = x[j][e] * p.scale - y[j][e];
      }
      store(x, i, problem.dk);
    }
    L::Queries::give_back(barriers, c);
    Products::begin(y);
    Products::tiles<true, kValueSteps, false, false>(y, d_o, u);
    Products::commit();
    Products::wait<0>();
    Products::end(y);
    mask(y, [](int r, int s) { return s <= r; });
    to_operand(n, y);
#pragma unroll 1
    for (int i = 0; i < kKeys / 64; ++i) {
      Products::begin(x);
      Products::tiles<true, kValueSteps, false, false>(x, d_o, state + i * L::kValueTile);
      Products::times<false>(x, n, k + i * kTileBlockBytes);
      Products::commit();
      Products::wait<0>();
      Products::end(x);
      scale(x, p.scale);
      store(x, i, problem.dq);
    }
    L::Outputs::give_back(barriers, c);
    L::States::give_back(barriers, c);
    L::Keys::give_back(barriers, c);
  }
}

template <int kKeys>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish(const __grid_constant__ BackwardParams p) {
  if constexpr (kHasGroupProducts) {
    using L = FinishLayout<kKeys>;
    extern __shared__ unsigned char shared[];
    const std::uint32_t tiles = shared_address(align_tiles(shared));
    const std::uint32_t barriers = tiles + L::kBarriers;
    const int head = blockIdx.x;
    const BatchEntry& entry = find_entry(p.batch, &BatchEntry::first_block, blockIdx.y);
    const Segment segment = segment_of(entry, static_cast<int>(blockIdx.y) - entry.first_block);
    if (threadIdx.x == 0) {
      L::Keys::init(barriers, 128, kStateThreads + 128);
      L::ValuesAndInverse::init(barriers, 128, kStateThreads);
      L::Outputs::init(barriers, 128, 128);
      L::Queries::init(barriers, 128, 128);
      L::States::init(barriers, kStateThreads, 128);
    }
    __syncthreads();
    // Together what the block was launched with. With these, what ptxas has of them suffices for
    // products to run one behind the other; with less it waits after each (C7512).
    if (threadIdx.x >= kStateThreads + 128) {
      give_registers<24>();
      load_all<kKeys>(p, segment, head, tiles, barriers);
    } else if (threadIdx.x >= kStateThreads) {
      take_registers<136>();
      query_and_key_gradients<kKeys>(p, segment, head, tiles, barriers);
    } else {
      take_registers<176>();
      advance_states<kKeys>(p, segment, head, tiles, barriers);
    }
  }
}

// ---- Launches ---------------------------------------------------------------------------------

DeltaRuleProblem forward_problem(const DeltaRuleBackwardProblem& problem) {
  return {.q = problem.q,
          .k = problem.k,
          .v = problem.v,
          .beta = problem.beta,
          .o = nullptr,
          .is_bf16 = problem.is_bf16,
          .heads = problem.heads,
          .key_dim = problem.key_dim,
          .value_dim = problem.value_dim};
}

template <int kKeys>
void launch(Context& ctx, const BackwardParams& params) {
  const SequenceBatch& batch = params.batch;
  const auto launch_kernel = [&](auto kernel, dim3 grid, int threads, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "delta_rule_backward");
    kernel<<<grid, threads, bytes, stream_of(ctx)>>>(params);
    check_launch("delta_rule_backward");
  };
  const int heads = params.problem.heads;
  const auto launch_walk = [&]<Walk kWalk>(int parts) {
    launch_kernel(walk<kKeys, kWalk>, dim3(heads, parts), kWalkThreads,
                  WalkLayout<kKeys, kWalk>::kBytes);
  };
  launch_kernel(prepare<kKeys>, dim3(heads, batch.chunks), 128, PrepareLayout<kKeys>::kBytes);
  if (batch.maps > 0) {
    launch_walk.template operator()<Walk::kMaps>(batch.maps);
    launch_walk.template operator()<Walk::kGradientMaps>(batch.maps);
    launch_delta_rule_joins(ctx, forward_problem(params.problem), batch, params.workspace.maps,
                            params.workspace.d_maps);
  }
  launch_walk.template operator()<Walk::kGradients>(batch.blocks);
  launch_kernel(finish<kKeys>, dim3(heads, batch.blocks), kFinishThreads,
                FinishLayout<kKeys>::kBytes);
}

}  // namespace

bool delta_rule_backward_chunks_fit(const DeltaRuleBackwardProblem& problem) {
  return delta_rule_chunks_fit(forward_problem(problem)) && problem.value_dim <= kValues &&
         has_group_products();
}

int delta_rule_backward_segments(const DeltaRuleBackwardProblem& problem, int length,
                                 int multiprocessors) {
  return delta_rule_segments(forward_problem(problem), length, multiprocessors);
}

std::size_t delta_rule_backward_chunks_bytes(const DeltaRuleBackwardProblem& problem,
                                             const SequenceBatch& batch) {
  return Workspace{}.plan(problem, batch, nullptr);
}

void launch_delta_rule_backward_chunks(Context& ctx, const DeltaRuleBackwardProblem& problem,
                                       const SequenceBatch& batch, void* workspace) {
  BackwardParams params{.problem = problem,
                        .workspace = {},
                        .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
                        .batch = batch};
  params.workspace.plan(problem, batch, workspace);
  if (padded_keys(problem.key_dim) == 64) {
    launch<64>(ctx, params);
  } else {
    launch<128>(ctx, params);
  }
}

}  // namespace deltafox::cuda
