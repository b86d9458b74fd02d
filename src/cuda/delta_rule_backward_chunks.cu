// The delta rule's gradients in chunks of 64 rows on the tensor cores (docs/numerics.md has the
// equations), in bfloat16 with float32 sums. With G = tril(K Kᵀ, −1), T = (I + diag(β) G)⁻¹ diag(β)
// and P = tril(Q Kᵀ):
//
// 1. `prepare`, all chunks at once: T and P.
// 2. `walk_states`, a block a segment as in delta_rule_chunks.cu, keeps the state before each chunk
//    and U = T (V − K S).
// 3. `walk_gradients`, from the last chunk to the first, keeps the gradient of the state behind
// each
//    chunk and yields dV = dE = Tᵀ (Pᵀ dO + K dS), dS ← dS + Qᵀ dO − Kᵀ dE. Everything is linear in
//    dO, so 1/√K is left to what is stored.
// 4. `chunk_gradients`, all chunks at once, 64 keys a block: with M = tril(dE Uᵀ, −1) and
//    dO over √K,
//      dQ = dO Sᵀ + tril(dO Uᵀ) K,  dβ_t = dE_t·U_t / β_t²
//      dK = U dSᵀ + tril(dO Uᵀ)ᵀ Q − dE Sᵀ − (M + Mᵀ) K
//    A triangle's transpose is a product of its own, not a transposition: so all of them are made
//    in registers and are left operands there.
//
// For dβ, a β nearer to 0 than 2⁻⁴⁰ counts as 2⁻⁴⁰, far below what rounding leaves of the rest.
//
// Segments need the state before them and the gradient behind them. The first comes as in the
// forward from affine maps [M | N]. Gradients pass a segment by dS ← Mᵀ dS + N' with the same M;
// N' is what a third walk over the segment leaves of dS = 0.
#include <algorithm>
#include <cmath>

#include "cuda/delta_rule_chunks.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kWalkThreads = kStateThreads + 128;
constexpr int kGradientThreads = 128;
constexpr int kGradientKeys = 64;  // of a block
constexpr float kLeastBeta = 0x1p-40F;

// What the passes keep, in bfloat16 but the maps. [c, h] counts the chunks of the whole batch; K'
// is the padded K.
struct Workspace {
  float* maps;     // see launch_delta_rule_joins
  float* d_maps;   // likewise
  bf16* inverses;  // [c, h] tiles [64, 64] of −Tᵀ
  bf16* scores;    // [c, h] tiles [64, 64] of P
  bf16* updates;   // [c, h, 128, 64], Uᵀ
  bf16* states;    // [c, h, 128, K'], Sᵀ before the chunk
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
    take(updates, chunks * kValues * kChunk);
    take(states, chunks * kValues * keys);
    take(d_states, chunks * kValues * keys);
    return used;
  }
};

struct BackwardParams {
  DeltaRuleBackwardProblem problem;
  Workspace workspace;
  float scale;  // 1 / √K
  int stages;
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
  const bool odd = quarter % 2 != 0;
  const bool upper = quarter / 2 != 0;
#pragma unroll
  for (int k = 0; k < kSteps; k += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane q of four has columns 2q, 2q + 1 of four 8×8 matrices; it gets all of matrix q's.
      std::uint32_t m[4] = {f[k][half], f[k][half + 2], f[k + 1][half], f[k + 1][half + 2]};
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const std::uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? m[i] : m[i + 1], 1);
        (odd ? m[i] : m[i + 1]) = other;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t other = __shfl_xor_sync(0xffffffffU, upper ? m[i] : m[i + 2], 2);
        (upper ? m[i] : m[i + 2]) = other;
      }
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

template <class Products, int kKeys>
__global__ void __launch_bounds__(128) prepare(const __grid_constant__ BackwardParams p) {
  if constexpr (!Products::kGroup || kHasGroupProducts) {
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
    Products::template tiles_transposed<kKeys / 16>(g, k, k);
    Products::commit();
    Products::template tiles_transposed<kKeys / 16>(a, q, k);
    Products::commit();
    Products::template wait<1>();
    Products::end(g);
    store_scaled_products(g, beta, blocks, lane, warp);
    invert_diagonal(inverse_block(blocks, warp, warp), lane % 16);
    Products::template wait<0>();
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
  kStates,        // forwards
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

  static constexpr int kMostStages = kReverse ? 3 : 4;
  static int bytes(int stages) { return 1024 + stages * kStage + 128; }
};

// The step'th chunk of a walk.
template <bool kReverse>
__device__ Chunk walk_chunk(const Segment& segment, int step) {
  const int c = kReverse ? segment.chunks - 1 - step : step;
  return {segment.first_chunk + c, segment.begin + c * kChunk,
          min(kChunk, segment.rows - c * kChunk)};
}

// The group that loads: a chunk's copies are on their way while those of the next are started.
template <class Products, int kKeys, Walk kWalk>
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
      if (++stage == p.stages) {
        stage = 0;
        ++round;
      }
    }
    commit_copies();
    if (step > 0) {
      wait_copies<1>();
      Products::publish();
      barrier_arrive(barriers + 2 * ready * 8);
      if (++ready == p.stages) ready = 0;
    }
  }
}

template <class Products, int kKeys>
__device__ void walk_states(const BackwardParams& p, const Segment& segment, int head,
                            std::uint32_t tiles, std::uint32_t barriers) {
  using L = WalkLayout<kKeys, Walk::kStates>;
  const int row = state_row();
  float s[kKeys / 8][4];
  if (segment.index == 0) {
    clear(s);
  } else {
    const std::size_t map =
        p.place(segment.entry->first_map + segment.index - 1, head, (kValues + kKeys) * kKeys);
    load_transposed(s, p.workspace.maps + map, row);
  }
  Stages<L::kStage> stages{tiles, barriers, p.stages};
  for (int step = 0; step < segment.chunks; ++step) {
    const std::size_t first_row = p.place(segment.first_chunk + step, head, kValues) + row;
    std::uint32_t sf[kKeys / 16][4];
    std::uint32_t f[4][4];
    to_operand(sf, s);
    store_operand(sf, p.workspace.states + first_row * kKeys, kKeys, kChunk, kKeys);
    const std::uint32_t base = stages.wait();
    {
      float r[8][4];
      load_negated_columns(r, base + L::kV);
      Products::begin(r);
      Products::template times_transposed<false>(r, sf, base + L::kK);
      Products::commit();
      Products::template wait<0>();
      Products::end(r);
      to_operand(f, r);
      Products::begin(r);
      Products::template times<true>(r, f, base + L::kT);
      Products::commit();
      Products::template wait<0>();
      Products::end(r);
      to_operand(f, r);
    }
    Products::begin(s);
    Products::template times<false>(s, f, base + L::kK);
    Products::commit();
    store_operand(f, p.workspace.updates + first_row * kChunk, kChunk, kChunk, kChunk);
    Products::template wait<0>();
    Products::end(s);
    stages.give_back();
  }
}

template <class Products, int kKeys, Walk kWalk>
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
  Stages<L::kStage> stages{tiles, barriers, p.stages};
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
    Products::template times<true>(e, d_o, base + L::kP);
    Products::template times_transposed<false>(e, dsf, base + L::kK);
    Products::commit();
    Products::template times<false>(ds, d_o, base + L::kQ);
    Products::commit();
    Products::template wait<1>();
    Products::end(e);
    to_operand(f, e);
    Products::begin(e);
    Products::template times_transposed<true>(e, f, base + L::kT);
    Products::commit();
    Products::template wait<0>();
    Products::end(e);
    Products::end(ds);
    to_operand(f, e);
    Products::begin(ds);
    Products::template times<false>(ds, f, base + L::kK);
    Products::commit();
    if (kResults) {
      bf16* dv =
          static_cast<bf16*>(problem.dv) + (chunk.row * problem.heads + head) * problem.value_dim;
      store_columns(e, -p.scale, base + L::kV, dv, problem.heads * problem.value_dim, chunk.rows,
                    problem.value_dim);
    }
    Products::template wait<0>();
    Products::end(ds);
    stages.give_back();
  }
  if (!kResults) {
    store_transposed(ds, p.workspace.d_maps + p.place(first_map - 1, head, kValues * kKeys), row);
  }
}

template <class Products, int kKeys, Walk kWalk>
__global__ void __launch_bounds__(kWalkThreads, 1) walk(const __grid_constant__ BackwardParams p) {
  if constexpr (!Products::kGroup || kHasGroupProducts) {
    using L = WalkLayout<kKeys, kWalk>;
    extern __shared__ unsigned char shared[];
    const std::uint32_t tiles = shared_address(align_tiles(shared));
    const std::uint32_t barriers = tiles + p.stages * L::kStage;
    const int head = blockIdx.x;
    constexpr bool kMap = kWalk == Walk::kMaps || kWalk == Walk::kGradientMaps;
    constexpr auto kFirst = kMap ? &BatchEntry::first_map : &BatchEntry::first_block;
    const BatchEntry& entry = find_entry(p.batch, kFirst, blockIdx.y);
    const int part = static_cast<int>(blockIdx.y) - entry.*kFirst;
    const Segment segment = segment_of(entry, part + (kWalk == Walk::kGradientMaps ? 1 : 0));
    if (threadIdx.x == 0) {
      for (int s = 0; s < p.stages; ++s) {
        barrier_init(barriers + 2 * s * 8, 128);
        barrier_init(barriers + (2 * s + 1) * 8, kStateThreads);
      }
    }
    __syncthreads();
    if (threadIdx.x >= kStateThreads) {
      if constexpr (Products::kGroup) give_registers<56>();
      load_chunks<Products, kKeys, kWalk>(p, segment, head, tiles, barriers);
    } else {
      if constexpr (Products::kGroup) take_registers<224>();
      if constexpr (kWalk == Walk::kMaps) {
        float n[kKeys / 8][4];
        clear(n);
        const int map = entry.first_map + part;
        walk_maps<Products, L, kKeys>(
            n, segment, {tiles, barriers, p.stages},
            p.workspace.maps + p.place(map, head, static_cast<int>(map_floats(kKeys))));
      } else if constexpr (kWalk == Walk::kStates) {
        walk_states<Products, kKeys>(p, segment, head, tiles, barriers);
      } else {
        walk_gradients<Products, kKeys, kWalk>(p, segment, head, tiles, barriers);
      }
    }
  }
}

// ---- All chunks at once: dQ, dK and dβ ---------------------------------------------------------

struct GradientLayout {
  static constexpr int kValueTile = kValues / 64 * kTileBlockBytes;
  static constexpr int kDo = 0;                 // [64, 128]
  static constexpr int kDe = kDo + kValueTile;  // [64, 128]
  static constexpr int kU = kDe + kValueTile;   // [128, 64], Uᵀ
  static constexpr int kS = kU + kValueTile;    // [128, 64], Sᵀ
  static constexpr int kDs = kS + kValueTile;   // [128, 64], √K dSᵀ
  static constexpr int kK = kDs + kValueTile;   // [64, 64]
  static constexpr int kQ = kK + kTileBlockBytes;
  static constexpr int kBytes = 1024 + kQ + kTileBlockBytes;
};

// This warp's 16 rows of a tile as a left operand.
template <int kSteps>
__device__ void load_operand(std::uint32_t (&f)[kSteps][4], std::uint32_t tile) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    load_matrices(f[k], tile + piece_offset(16 * warp + lane % 16, 2 * k + lane / 16));
  }
}

// d (+)= a · tile for a tile of 128 rows of 64 columns
template <class Products, bool kClear>
__device__ void times_values(float (&d)[8][4], const std::uint32_t (&a)[8][4], std::uint32_t tile) {
  Products::template times<kClear>(d, reinterpret_cast<const std::uint32_t(&)[4][4]>(a[0]), tile);
  Products::template times<false>(d, reinterpret_cast<const std::uint32_t(&)[4][4]>(a[4]),
                                  tile + kTileBlockBytes);
}

// What of a product's elements to keep: keep(row, column).
template <class Keep>
__device__ void mask(float (&d)[8][4], const Keep& keep) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!keep(row + i / 2 * 8, 8 * j + 2 * (lane % 4) + i % 2)) d[j][i] = 0;
    }
  }
}

template <class Products, int kKeys>
__global__ void __launch_bounds__(kGradientThreads, 2)
    chunk_gradients(const __grid_constant__ BackwardParams p) {
  if constexpr (!Products::kGroup || kHasGroupProducts) {
    using L = GradientLayout;
    extern __shared__ unsigned char shared[];
    const std::uint32_t base = shared_address(align_tiles(shared));
    const DeltaRuleBackwardProblem& problem = p.problem;
    const int head = blockIdx.x / (kKeys / kGradientKeys);
    const int first_key = static_cast<int>(blockIdx.x % (kKeys / kGradientKeys)) * kGradientKeys;
    const Chunk chunk = find_chunk(p.batch, blockIdx.y);
    load_rows<kValues / 8>(base + L::kDo, problem.d_o, chunk, problem.heads, head,
                           problem.value_dim);
    load_rows<kValues / 8>(base + L::kDe, problem.dv, chunk, problem.heads, head,
                           problem.value_dim);
    const std::size_t first_row = p.place(chunk.index, head, kValues);
    load_tile<8, kValues>(base + L::kU, p.workspace.updates + first_row * kChunk, kChunk, kChunk,
                          kValues, threadIdx.x);
    commit_copies();
    load_tile<8, kValues>(base + L::kS, p.workspace.states + first_row * kKeys + first_key, kKeys,
                          kGradientKeys, kValues, threadIdx.x);
    load_tile<8, kValues>(base + L::kDs, p.workspace.d_states + first_row * kKeys + first_key,
                          kKeys, kGradientKeys, kValues, threadIdx.x);
    load_rows<kGradientKeys / 8>(base + L::kK, problem.k, chunk, problem.heads, head,
                                 problem.key_dim, first_key);
    load_rows<kGradientKeys / 8>(base + L::kQ, problem.q, chunk, problem.heads, head,
                                 problem.key_dim, first_key);
    commit_copies();
    wait_copies<1>();
    Products::publish();
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 * 16 + lane / 4;
    // Left operands are loaded again where they are needed again: registers are scarce.
    std::uint32_t left[8][4];
    std::uint32_t u[8][4];
    load_operand(left, base + L::kDo);
    load_columns(u, base + L::kU);
    std::uint32_t n[4][4];  // tril(dO Uᵀ)
    std::uint32_t n_transposed[4][4];
    std::uint32_t m[4][4];  // M + Mᵀ
    float x[8][4];
    float y[8][4];
    Products::begin(x);
    Products::begin(y);
    times_values<Products, true>(x, left, base + L::kU);
    Products::template times_transposed<true>(y, u, base + L::kDo);
    Products::commit();
    Products::template wait<0>();
    Products::end(x);
    Products::end(y);
    mask(x, [](int r, int c) { return c <= r; });
    mask(y, [](int r, int c) { return c >= r; });
    to_operand(n, x);
    to_operand(n_transposed, y);
    load_operand(left, base + L::kDe);
    Products::begin(x);
    Products::begin(y);
    times_values<Products, true>(x, left, base + L::kU);
    Products::template times_transposed<true>(y, u, base + L::kDe);
    Products::commit();
    Products::template wait<0>();
    Products::end(x);
    Products::end(y);
    if (problem.dbeta != nullptr && first_key == 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = row + i / 2 * 8;
          if (8 * j + 2 * (lane % 4) + i % 2 == t && t < chunk.rows) {
            const float beta = beta_at(p, chunk.row + t, head);
            problem.dbeta[(chunk.row + t) * problem.heads + head] = x[j][i] / beta / beta;
          }
        }
      }
    }
    mask(x, [](int r, int c) { return c < r; });
    mask(y, [](int r, int c) { return c > r; });
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[j][i] += y[j][i];
    }
    to_operand(m, x);

    wait_copies<0>();
    Products::publish();
    __syncthreads();
    const std::ptrdiff_t to =
        ((chunk.row + row) * problem.heads + head) * problem.key_dim + first_key;
    const int stride = problem.heads * problem.key_dim;
    const auto store = [&](float(&d)[8][4], float factor, void* gradient) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[j][i] *= factor;
      }
      std::uint32_t f[4][4];
      to_operand(f, d);
      store_operand(f, static_cast<bf16*>(gradient) + to, stride, chunk.rows - row,
                    problem.key_dim - first_key);
    };
    // x: √K dQ; y: √K (U dSᵀ + tril(dO Uᵀ)ᵀ Q), then −dK
    load_operand(left, base + L::kDo);
    Products::begin(x);
    Products::begin(y);
    times_values<Products, true>(y, u, base + L::kDs);
    Products::template times<false>(y, n_transposed, base + L::kQ);
    Products::commit();
    times_values<Products, true>(x, left, base + L::kS);
    Products::template times<false>(x, n, base + L::kK);
    Products::commit();
    Products::template wait<1>();
    Products::end(y);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[j][i] *= -p.scale;
    }
    load_operand(u, base + L::kDe);
    Products::begin(y);
    times_values<Products, false>(y, u, base + L::kS);
    Products::template times<false>(y, m, base + L::kK);
    Products::commit();
    Products::template wait<1>();
    Products::end(x);
    store(x, p.scale, problem.dq);
    Products::template wait<0>();
    Products::end(y);
    store(y, -1, problem.dk);
  }
}

// ---- Launches ---------------------------------------------------------------------------------

template <class Products, int kKeys, Walk kWalk>
void launch_walk(BackwardParams params, const Card& card, int blocks, cudaStream_t stream) {
  using L = WalkLayout<kKeys, kWalk>;
  params.stages = L::kMostStages;
  while (params.stages > 2 && L::bytes(params.stages) > card.shared_bytes) --params.stages;
  const int bytes = L::bytes(params.stages);
  const auto kernel = walk<Products, kKeys, kWalk>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "delta_rule_backward");
  kernel<<<dim3(params.problem.heads, blocks), kWalkThreads, bytes, stream>>>(params);
  check_launch("delta_rule_backward");
}

template <typename Kernel>
void launch_chunks(const Kernel& kernel, const BackwardParams& params, int blocks_of_head,
                   int bytes, cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "delta_rule_backward");
  kernel<<<dim3(params.problem.heads * blocks_of_head, params.batch.chunks), 128, bytes, stream>>>(
      params);
  check_launch("delta_rule_backward");
}

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

}  // namespace

bool delta_rule_backward_chunks_fit(const DeltaRuleBackwardProblem& problem) {
  return delta_rule_chunks_fit(forward_problem(problem)) && problem.value_dim <= kValues &&
         card().shared_bytes >= WalkLayout<128, Walk::kGradients>::bytes(2);
}

int delta_rule_backward_segments(const DeltaRuleBackwardProblem& problem, int length,
                                 int multiprocessors) {
  return delta_rule_segments(forward_problem(problem), length, multiprocessors);
}

std::size_t delta_rule_backward_chunks_bytes(const DeltaRuleBackwardProblem& problem,
                                             const SequenceBatch& batch) {
  return Workspace{}.plan(problem, batch, nullptr);
}

void launch_delta_rule_backward_chunks(const DeltaRuleBackwardProblem& problem,
                                       const SequenceBatch& batch, void* workspace,
                                       cudaStream_t stream, ProductKind kind) {
  const Card c = card();
  BackwardParams params{.problem = problem,
                        .workspace = {},
                        .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
                        .stages = 0,
                        .batch = batch};
  params.workspace.plan(problem, batch, workspace);
  for_products_and_keys(c, kind, problem.key_dim, [&]<class Products, int kKeys>() {
    launch_chunks(prepare<Products, kKeys>, params, 1, PrepareLayout<kKeys>::kBytes, stream);
    if (batch.maps > 0) {
      launch_walk<Products, kKeys, Walk::kMaps>(params, c, batch.maps, stream);
      launch_walk<Products, kKeys, Walk::kGradientMaps>(params, c, batch.maps, stream);
      launch_delta_rule_joins(forward_problem(problem), batch, params.workspace.maps,
                              params.workspace.d_maps, stream);
    }
    launch_walk<Products, kKeys, Walk::kStates>(params, c, batch.blocks, stream);
    launch_walk<Products, kKeys, Walk::kGradients>(params, c, batch.blocks, stream);
    launch_chunks(chunk_gradients<Products, kKeys>, params, kKeys / kGradientKeys,
                  GradientLayout::kBytes, stream);
  });
}

}  // namespace deltafox::cuda
