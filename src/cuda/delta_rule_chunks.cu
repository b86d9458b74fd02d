// The delta rule in chunks of 64 rows on the tensor cores (the equations are in ops/delta_rule.h).
//
// A block owns one head of one segment of a sequence and walks its chunks. Its state lives in the
// accumulators of two warp groups as Sᵀ, 64 of the value columns a group; everything that a column
// of the state needs is then a chain of products whose left operand is already in registers:
//   Rᵀ = Sᵀ Kᵀ − Vᵀ,  Uᵀ = −Rᵀ Tᵀ,  Oᵀ = (Sᵀ Qᵀ + Uᵀ Aᵀ) / √K,  Sᵀ ← Sᵀ + Uᵀ K
// A third group runs ahead: it loads rows and computes T = (I + diag(β) G)⁻¹ diag(β) and
// A = tril(Q Kᵀ). It inverts the 16×16 blocks on the diagonal by substitution in float32, then
// fills each block column below by products in TF32, again without leaving the registers.
//
// A sequence in n segments takes two walks. What a segment does to the state is an affine map
// S ← M S + N; the first walk carries [M | N] instead of S through every segment but the last (the
// first segment starts from the state itself and needs no M), `join_segments` applies the maps one
// after the other, and the second walk computes the outputs of all segments at once.
#include <algorithm>
#include <cmath>

#include "cuda/check.h"
#include "cuda/delta_rule_chunks.cuh"
#include "cuda/launch.cuh"

namespace deltafox::cuda {
namespace {

// Groups that prepare chunks, in turns: preparing one takes longer than advancing one state over
// it, and less than advancing both M and N.
template <class Products, bool kMaps>
constexpr int kPreparingGroups = Products::kGroup && !kMaps ? 2 : 1;
template <class Products, bool kMaps>
constexpr int kThreads = kStateThreads + 128 * kPreparingGroups<Products, kMaps>;

struct ChunkParams {
  DeltaRuleProblem problem;
  float* maps;    // per map and head: Nᵀ [kValues, K'], Mᵀ [K', K'] with K' the padded K
  float* d_maps;  // per map and head: N'ᵀ [kValues, K'], see join_segments
  float scale;
  int stages;
  SequenceBatch batch;
};

// A stage has what belongs to a chunk. Where two groups prepare, copies of a chunk's keys and
// queries must be under way while its group prepares the chunk before: these have twice as many
// buffers, apart from the rest, which is not needed before the chunk is nearly prepared.
template <class Products, int kKeys, bool kMaps>
struct Layout {
  static constexpr bool kApart = kPreparingGroups<Products, kMaps> == 2;
  static constexpr int kRowBuffers = kApart ? 2 : 1;  // of keys and queries, for each stage
  static constexpr int kKeyTile = kKeys / 64 * kTileBlockBytes;
  static constexpr int kValueTile = kValues / 64 * kTileBlockBytes;
  static constexpr int kBeta = 1024 / kRowBuffers;  // bytes for [64] float32
  // from rows_at on
  static constexpr int kK = 0;
  static constexpr int kQ = kKeyTile;
  static constexpr int kRows = (kMaps ? 1 : 2) * kKeyTile;
  // from rest_at on
  static constexpr int kV = kRows;
  static constexpr int kT = kV + kValueTile;
  static constexpr int kA = kT + kTileBlockBytes;
  static constexpr int kRest = kA + (kMaps ? 0 : kTileBlockBytes) - kV;
  static constexpr int kStage = kRowBuffers * (kRows + kBeta) + kRest;
  // behind the stages
  static constexpr int kInverse = 0;  // 10 blocks
  static constexpr int kBarriers = kInverse + kPreparingGroups<Products, kMaps> * 10 *
                                                  kInverseBlock * 4;  // full, empty of each stage
  static constexpr int kSums = kBarriers + 128;  // [2, 8, 64] float32 of norm_values, in turns
  static constexpr int kFixed = kSums + (kMaps ? 0 : 2 * 8 * 64 * 4);

  static constexpr int bytes(int stages) { return 1024 + stages * kStage + kFixed; }
  // Of buffer `b` of the rows, of stage `s` for the rest.
  __device__ static int rows_at(int b) { return b * (kApart ? kRows : kStage); }
  __device__ static int rest_at(int s, int stages) {
    return kApart ? (kRowBuffers * stages - 1) * kRows + s * kRest : s * kStage;
  }
  __device__ static int beta_at(int b, int stages) {
    return kApart ? stages * (kRowBuffers * kRows + kRest) + b * kBeta : b * kStage + kRows + kRest;
  }
};

// A place among the buffers, and how often they have been used before.
struct Ring {
  int stage;
  int round;

  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      ++round;
    }
  }
};

template <bool kMaps>
__device__ Segment find_segment(const SequenceBatch& batch, int block) {
  constexpr auto kFirst = kMaps ? &BatchEntry::first_map : &BatchEntry::first_block;
  const BatchEntry& entry = find_entry(batch, kFirst, block);
  return segment_of(entry, block - entry.*kFirst);
}

// ---- The group that prepares ------------------------------------------------------------------

template <class Products, int kKeys, bool kMaps>
struct Loader {
  using L = Layout<Products, kKeys, kMaps>;
  const ChunkParams& p;
  const Segment& segment;
  int block_head;
  int block_first_value;
  std::uint32_t stages_base;

  __device__ int valid_rows(int chunk) const { return min(kChunk, segment.rows - chunk * kChunk); }
  __device__ std::ptrdiff_t row(int chunk) const { return segment.begin + chunk * kChunk; }

  // Starts the copies of a chunk's keys, queries and beta.
  __device__ void load_rows(int chunk, int buffer) const {
    const int thread = read_thread() % 128;
    const int head = read_again(block_head);
    const DeltaRuleProblem& problem = p.problem;
    const int heads = read_again(problem.heads);
    const int stride = heads * problem.key_dim;
    const std::uint32_t base = stages_base + L::rows_at(buffer);
    const std::ptrdiff_t offset = row(chunk) * stride + head * problem.key_dim;
    load_tile<kKeys / 8>(base + L::kK, static_cast<const bf16*>(problem.k) + offset, stride,
                         problem.key_dim, valid_rows(chunk), thread);
    if (!kMaps) {
      load_tile<kKeys / 8>(base + L::kQ, static_cast<const bf16*>(problem.q) + offset, stride,
                           problem.key_dim, valid_rows(chunk), thread);
    }
    if (thread < kChunk) {
      const std::uint32_t to = stages_base + L::beta_at(buffer, p.stages) + 4 * thread;
      const auto* beta = static_cast<const float*>(problem.beta);
      if (beta == nullptr) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(1.0F) : "memory");
      } else {
        const bool valid = thread < valid_rows(chunk);
        copy_word_async(to, valid ? beta + (row(chunk) + thread) * heads + head : beta, valid);
      }
    }
  }

  // And of its values.
  __device__ void load_values(int chunk, int stage) const {
    const int first_value = read_again(block_first_value);
    const DeltaRuleProblem& problem = p.problem;
    const int stride = read_again(problem.heads) * problem.value_dim;
    load_tile<kValues / 8>(stages_base + L::rest_at(stage, p.stages) + L::kV,
                           static_cast<const bf16*>(problem.v) + row(chunk) * stride +
                               read_again(block_head) * problem.value_dim + first_value,
                           stride, problem.value_dim - first_value, valid_rows(chunk),
                           read_thread() % 128);
  }
};

// T and A of a chunk whose keys, queries and beta are there. `between` is called where A is about
// to be written.
template <class Products, int kKeys, bool kMaps, class Between>
__device__ void prepare_chunk(unsigned char* rows, unsigned char* rest, const float* beta,
                              float* blocks, int barrier, const Between& between) {
  using L = Layout<Products, kKeys, kMaps>;
  const int thread = read_thread() % 128;
  const int lane = thread % 32;
  const int warp = uniform(thread / 32);
  const std::uint32_t k = shared_address(rows + L::kK);
  {
    float g[8][4];
    Products::begin(g);
    Products::template tiles_transposed<kKeys / 16>(g, k, k);
    Products::commit();
    Products::template wait<0>();
    Products::end(g);
    store_scaled_products(g, beta, blocks, lane, warp);
  }
  invert_diagonal(inverse_block(blocks, warp, warp), lane % 16);
  between();
  if (!kMaps) {
    float a[8][4];
    Products::begin(a);
    Products::template tiles_transposed<kKeys / 16>(a, shared_address(rows + L::kQ), k);
    Products::commit();
    Products::template wait<0>();
    Products::end(a);
    store_lower(a, rest + L::kA, lane, warp);
  }
  group_sync(barrier);
  finish_inverse(blocks, beta, rest + L::kT, lane, warp);
}

// One of two groups, in turns. The state's groups give back all of a chunk at once, so when they
// have done with the one that this group has prepared last, there is room for what this chunk still
// needs and for the rows of the next.
template <class Products, int kKeys>
__device__ void prepare_every_other(const ChunkParams& p, const Segment& segment, int head,
                                    int first_value, unsigned char* stages, unsigned char* fixed) {
  using L = Layout<Products, kKeys, false>;
  const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
  const int group = uniform((threadIdx.x - kStateThreads) / 128);
  float* blocks = reinterpret_cast<float*>(fixed + L::kInverse) + group * 10 * kInverseBlock;
  const Loader<Products, kKeys, false> loader{p, segment, head, first_value,
                                              shared_address(stages)};
  const int stage = group;
  unsigned char* rest = stages + L::rest_at(stage, 2);
  if (group < segment.chunks) loader.load_rows(group, stage);
  commit_copies();
  for (int c = group; c < segment.chunks; c += 2) {
    wait_copies<0>();
    Products::publish();
    group_sync(1 + group);
    const int buffer = c % 4;
    const auto* beta = reinterpret_cast<const float*>(stages + L::beta_at(buffer, 2));
    prepare_chunk<Products, kKeys, false>(
        stages + L::rows_at(buffer), rest, beta, blocks, 1 + group, [&] {
          if (c >= 2) barrier_wait(barriers + (2 * stage + 1) * 8, (c / 2 - 1) & 1);
          loader.load_values(c, stage);
          commit_copies();
          if (c + 2 < segment.chunks) loader.load_rows(c + 2, (c + 2) % 4);
          commit_copies();
        });
    wait_copies<1>();
    Products::publish();
    barrier_arrive(barriers + 2 * stage * 8);
  }
}

template <class Products, int kKeys, bool kMaps>
__device__ void prepare_chunks(const ChunkParams& p, const Segment& segment, int head,
                               int first_value, unsigned char* stages, unsigned char* fixed) {
  using L = Layout<Products, kKeys, kMaps>;
  const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
  auto* blocks = reinterpret_cast<float*>(fixed + L::kInverse);
  const Loader<Products, kKeys, kMaps> loader{p, segment, head, first_value,
                                              shared_address(stages)};
  // How far ahead of the chunk being prepared copies are started.
  const int ahead = p.stages > 1 ? 1 : 0;
  Ring load_ring{0, 0};
  const auto load = [&](int chunk) {
    if (chunk < segment.chunks) {
      if (load_ring.round > 0) {
        barrier_wait(barriers + (2 * load_ring.stage + 1) * 8, (load_ring.round - 1) & 1);
      }
      loader.load_rows(chunk, load_ring.stage);
      loader.load_values(chunk, load_ring.stage);
    }
    load_ring.advance(p.stages);
    commit_copies();
  };
  Ring ring = load_ring;
  if (ahead > 0) load(0);
  for (int c = 0; c < segment.chunks; ++c) {
    const int stage = ring.stage;
    ring.advance(p.stages);
    load(c + ahead);
    if (ahead > 0) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    Products::publish();
    group_sync(1);
    const auto* beta = reinterpret_cast<const float*>(stages + L::beta_at(stage, p.stages));
    prepare_chunk<Products, kKeys, kMaps>(
        stages + L::rows_at(stage), stages + L::rest_at(stage, p.stages), beta, blocks, 1, [] {});
    Products::publish();
    barrier_arrive(barriers + 2 * stage * 8);
  }
}

// ---- The groups that hold the state -------------------------------------------------------------

// `sums` as norm_values has it.
__device__ void store_outputs(float (&o)[8][4], std::uint32_t tile, const ChunkParams& p,
                              const Segment& segment, int head, int first_value, int chunk,
                              float* sums) {
  const int values = read_again(p.problem.value_dim);
  const int stride = read_again(p.problem.heads) * values;
  bf16* out = static_cast<bf16*>(p.problem.o) +
              static_cast<std::ptrdiff_t>(segment.begin + chunk * kChunk) * stride + head * values +
              first_value;
  float factor = p.scale;
  if (p.problem.norm != nullptr) {
    norm_values(o, factor, p.problem.norm, p.problem.norm_eps, values, sums);
    factor = 1;
  }
  store_columns(o, factor, tile, out, stride, segment.rows - chunk * kChunk, values - first_value);
}

template <class Products, int kKeys>
__device__ void walk_outputs(const ChunkParams& p, const Segment& segment, int head,
                             int first_value, unsigned char* stages, unsigned char* fixed) {
  using L = Layout<Products, kKeys, false>;
  const DeltaRuleProblem& problem = p.problem;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;  // of eight
  const int row = 16 * warp + lane / 4;
  const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
  const std::ptrdiff_t state_offset =
      static_cast<std::ptrdiff_t>(head) * problem.key_dim * problem.value_dim;

  float s[kKeys / 8][4];
  if (segment.index == 0) {
    load_state(s, segment.entry->state + state_offset, problem.key_dim, problem.value_dim,
               first_value + row);
  } else {
    const std::size_t slot = segment.entry->first_map + segment.index - 1;
    load_transposed(s, p.maps + (slot * problem.heads + head) * map_floats(kKeys), row);
  }
  int stage = 0;
  int parity = 0;
  for (int c = 0; c < segment.chunks; ++c) {
    const std::uint32_t rows =
        shared_address(stages) + L::rows_at(L::kApart ? stage + parity * p.stages : stage);
    const std::uint32_t rest = shared_address(stages) + L::rest_at(stage, p.stages);
    barrier_wait(barriers + 2 * stage * 8, parity);

    // S is rounded for the products once a chunk. The outputs wait until the registers of R are
    // free; the other group's products fill the tensor cores meanwhile.
    std::uint32_t sf[kKeys / 16][4];
    std::uint32_t f[4][4];
    to_operand(sf, s);
    {
      float r[8][4];
      load_negated_columns(r, rest + L::kV);
      Products::begin(r);
      Products::template times_transposed<false>(r, sf, rows + L::kK);
      Products::commit();
      Products::template wait<0>();
      Products::end(r);
      to_operand(f, r);
      Products::begin(r);
      Products::template times<true>(r, f, rest + L::kT);
      Products::commit();
      Products::template wait<0>();
      Products::end(r);
      to_operand(f, r);
    }
    float o[8][4];
    Products::begin(s);
    Products::template times<false>(s, f, rows + L::kK);
    Products::template times_transposed<true>(o, sf, rows + L::kQ);
    Products::template times_transposed<false>(o, f, rest + L::kA);
    Products::commit();
    Products::template wait<0>();
    Products::end(s);
    Products::end(o);
    store_outputs(o, rest + L::kV, p, segment, head, first_value, c,
                  reinterpret_cast<float*>(fixed + L::kSums) + c % 2 * 8 * 64);
    barrier_arrive(barriers + (2 * stage + 1) * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  if (segment.last) {
    store_state(s, segment.entry->state + state_offset, problem.key_dim, problem.value_dim,
                first_value + read_thread() / 32 * 16 + read_thread() % 32 / 4);
  }
}

template <class Products, int kKeys>
__device__ void walk_segment_maps(const ChunkParams& p, const Segment& segment, int head,
                                  unsigned char* stages, unsigned char* fixed) {
  using L = Layout<Products, kKeys, true>;
  const DeltaRuleProblem& problem = p.problem;
  float n[kKeys / 8][4];
  if (segment.index == 0) {
    load_state(n,
               segment.entry->state +
                   static_cast<std::ptrdiff_t>(head) * problem.key_dim * problem.value_dim,
               problem.key_dim, problem.value_dim, state_row());
  } else {
    WarpProducts::clear(n);
  }
  const std::size_t slot = segment.entry->first_map + segment.index;
  walk_maps<Products, L, kKeys>(
      n, segment, {shared_address(stages), shared_address(fixed + L::kBarriers), p.stages},
      p.maps + (slot * problem.heads + head) * map_floats(kKeys));
}

// ---- Kernels ----------------------------------------------------------------------------------

template <class Products, int kKeys, bool kMaps>
__global__ void __launch_bounds__((kThreads<Products, kMaps>), 1)
    delta_rule_chunks(const __grid_constant__ ChunkParams p) {
  // Other targets compile this kernel too, and never launch it.
  if constexpr (!Products::kGroup || kHasGroupProducts) {
    using L = Layout<Products, kKeys, kMaps>;
    extern __shared__ unsigned char shared[];
    unsigned char* stages = shared + (1024 - shared_address(shared) % 1024) % 1024;
    unsigned char* fixed = stages + p.stages * L::kStage;
    const int head = blockIdx.x;
    const Segment segment = find_segment<kMaps>(p.batch, blockIdx.y);
    const int first_value = blockIdx.z * kValues;

    const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
    if (threadIdx.x == 0) {
      for (int s = 0; s < p.stages; ++s) {
        barrier_init(barriers + 2 * s * 8, 128);
        barrier_init(barriers + (2 * s + 1) * 8, kStateThreads);
      }
    }
    // What lies above the diagonal blocks is written here, once.
    for (int s = 0; s < p.stages; ++s) {
      for (int i = threadIdx.x; i < kTileBlockBytes / 16; i += (kThreads<Products, kMaps>)) {
        unsigned char* rest = stages + L::rest_at(s, p.stages);
        reinterpret_cast<uint4*>(rest + L::kT)[i] = make_uint4(0, 0, 0, 0);
        if (!kMaps) reinterpret_cast<uint4*>(rest + L::kA)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    Products::publish();
    __syncthreads();
    wait_for_input();

    if (threadIdx.x >= kStateThreads) {
      if constexpr (Products::kGroup) give_registers<kMaps ? 88 : 80>();
      if constexpr (L::kApart) {
        prepare_every_other<Products, kKeys>(p, segment, head, first_value, stages, fixed);
      } else {
        prepare_chunks<Products, kKeys, kMaps>(p, segment, head, first_value, stages, fixed);
      }
    } else {
      if constexpr (Products::kGroup) take_registers<kMaps ? 208 : 176>();
      if constexpr (kMaps) {
        walk_segment_maps<Products, kKeys>(p, segment, head, stages, fixed);
      } else {
        walk_outputs<Products, kKeys>(p, segment, head, first_value, stages, fixed);
      }
    }
  }
}

__device__ void split(float x, float y, std::uint32_t& high, std::uint32_t& low) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(x, y);
  const float2 back = __bfloat1622float2(rounded);
  high = reinterpret_cast<const std::uint32_t&>(rounded);
  low = pack(x - back.x, y - back.y);
}

// S_{s+1}ᵀ = S_sᵀ M_sᵀ + N_sᵀ for the segments of one sequence and head, kJoinRows value columns a
// block; N is replaced by the state behind the segment. In reverse the same for gradients of
// states, D_{s-1}ᵀ = D_sᵀ M_s + N'_sᵀ: map slot s - 1 holds N'_s, and then D_{s-1}, the gradient of
// the state behind segment s - 1. Operands are split into two bfloat16 halves each, which leaves
// products of 16 bits: the state stays a float32 one.
constexpr int kJoinRows = 32;
constexpr int kJoinThreads = 256;

template <int kKeys, int kMaps>  // so many maps in use or under way
struct JoinLayout {
  static constexpr int kMapStride = kKeys + 4;    // floats
  static constexpr int kStateStride = kKeys + 8;  // bfloat16
  static constexpr int kMapBytes = kKeys * kMapStride * 4;
  static constexpr int kHalfBytes = kJoinRows * kStateStride * 2;
  static constexpr int kBytes = kMaps * kMapBytes + 2 * kHalfBytes;
};

template <int kKeys, int kMaps, bool kReverse>
__device__ void join(const ChunkParams& p, int row_block) {
  using L = JoinLayout<kKeys, kMaps>;
  constexpr int kColumns = kKeys / 8;  // of a warp
  constexpr int kTiles = kColumns / 8;
  extern __shared__ unsigned char shared[];
  const BatchEntry& entry = p.batch.entries[blockIdx.z];
  const int hops = entry.segments - 2;
  if (hops < 1) return;
  const int head = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row = lane / 4;
  const int column = warp * kColumns + 2 * (lane % 4);
  // The slot of the step'th state.
  const auto slot = [&](int step) {
    const std::size_t segment = kReverse ? entry.segments - 2 - step : step;
    return (entry.first_map + segment) * p.problem.heads + head;
  };
  // Element (row, column) of tile (i, j) of Nᵀ, and of the state that replaces it.
  const auto at = [&](int step, int i, int j) {
    float* n = kReverse ? p.d_maps + slot(step) * kValues * kKeys
                        : p.maps + slot(step) * map_floats(kKeys);
    return n + (kJoinRows * row_block + 16 * i + row) * kKeys + column + 8 * j;
  };
  const auto load_n = [&](float(&n)[2][kTiles][4], int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 low = *reinterpret_cast<const float2*>(at(step, i, j));
        const float2 high = *reinterpret_cast<const float2*>(at(step, i, j) + 8 * kKeys);
        n[i][j][0] = low.x;
        n[i][j][1] = low.y;
        n[i][j][2] = high.x;
        n[i][j][3] = high.y;
      }
    }
  };
  const auto load_m = [&](int hop) {
    if (hop < hops) {
      // Mᵀ of the segment between this state and the next.
      const float* from =
          p.maps + slot(kReverse ? hop : hop + 1) * map_floats(kKeys) + kValues * kKeys;
      const std::uint32_t to = shared_address(shared + hop % kMaps * L::kMapBytes);
      for (int i = threadIdx.x; i < kKeys * kKeys / 4; i += kJoinThreads) {
        copy_piece_async(to + (i / (kKeys / 4) * L::kMapStride + i % (kKeys / 4) * 4) * 4,
                         from + 4 * i, true);
      }
    }
    commit_copies();
  };
  unsigned char* high_half = shared + kMaps * L::kMapBytes;
  unsigned char* low_half = high_half + L::kHalfBytes;
  const auto store_halves = [&](const float(&s)[2][kTiles][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int to = ((16 * i + row + 8 * k) * L::kStateStride + column + 8 * j) * 2;
          split(s[i][j][2 * k], s[i][j][2 * k + 1],
                *reinterpret_cast<std::uint32_t*>(high_half + to),
                *reinterpret_cast<std::uint32_t*>(low_half + to));
        }
      }
    }
  };

  float d[2][kTiles][4];
  float n[2][kTiles][4];
#pragma unroll
  for (int hop = 0; hop < kMaps - 1; ++hop) load_m(hop);
  load_n(d, 0);
  store_halves(d);
  load_n(n, 1);
  for (int hop = 0; hop < hops; ++hop) {
    load_m(hop + kMaps - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) d[i][j][k] = n[i][j][k];
      }
    }
    if (hop + 1 < hops) load_n(n, hop + 2);
    wait_copies<kMaps - 1>();
    __syncthreads();
    const auto* m = reinterpret_cast<const float*>(shared + hop % kMaps * L::kMapBytes);
#pragma unroll 2
    for (int k = 0; k < kKeys / 16; ++k) {
      std::uint32_t a[2][2][4];  // tile, half
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int from =
              ((16 * i + row + r % 2 * 8) * L::kStateStride + 16 * k + r / 2 * 8 + 2 * (lane % 4)) *
              2;
          a[i][0][r] = *reinterpret_cast<const std::uint32_t*>(high_half + from);
          a[i][1][r] = *reinterpret_cast<const std::uint32_t*>(low_half + from);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        std::uint32_t b[2][2];  // half
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int depth = 16 * k + 8 * r + 2 * (lane % 4);
          const int to = warp * kColumns + 8 * j + row;
          const float* from =
              kReverse ? m + to * L::kMapStride + depth : m + depth * L::kMapStride + to;
          split(from[0], from[kReverse ? 1 : L::kMapStride], b[0][r], b[1][r]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_bf16(d[i][j], a[i][0], b[1][0], b[1][1]);
          mma_bf16(d[i][j], a[i][1], b[0][0], b[0][1]);
          mma_bf16(d[i][j], a[i][0], b[0][0], b[0][1]);
        }
      }
    }
    __syncthreads();
    store_halves(d);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float* to = at(hop + 1, i, j);
        *reinterpret_cast<float2*>(to) = make_float2(d[i][j][0], d[i][j][1]);
        *reinterpret_cast<float2*>(to + 8 * kKeys) = make_float2(d[i][j][2], d[i][j][3]);
      }
    }
  }
}

// With kGradients, half of the blocks join the states and half their gradients.
template <int kKeys, int kMaps, bool kGradients>
__global__ void __launch_bounds__(kJoinThreads)
    join_segments(const __grid_constant__ ChunkParams p) {
  wait_for_input();
  const int blocks = kGradients ? gridDim.x / 2 : gridDim.x;
  const int block = blockIdx.x;
  if (kGradients && block >= blocks) {
    join<kKeys, kMaps, true>(p, block - blocks);
  } else {
    join<kKeys, kMaps, false>(p, block);
  }
}

template <class Products, int kKeys, bool kMaps>
void launch_walk(Context& ctx, ChunkParams params, int most_stages) {
  using L = Layout<Products, kKeys, kMaps>;
  static_assert(!L::kApart || L::bytes(2) <= 227 * 1024);
  params.stages = L::kApart ? 2 : most_stages;
  while (params.stages > 1 && L::bytes(params.stages) > most_shared_bytes()) --params.stages;
  const int bytes = L::bytes(params.stages);
  const auto kernel = delta_rule_chunks<Products, kKeys, kMaps>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "delta_rule");
  const int blocks = kMaps ? params.batch.maps : params.batch.blocks;
  const int value_blocks = (params.problem.value_dim + kValues - 1) / kValues;
  launch_dependent(ctx, "delta_rule", kernel,
                   dim3(params.problem.heads, blocks, kMaps ? 1 : value_blocks),
                   kThreads<Products, kMaps>, bytes, params);
}

template <int kKeys, int kMaps, bool kGradients>
void launch_join_of(Context& ctx, const ChunkParams& params) {
  constexpr int kBytes = JoinLayout<kKeys, kMaps>::kBytes;
  const auto kernel = join_segments<kKeys, kMaps, kGradients>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  const int value_blocks = (params.problem.value_dim + kJoinRows - 1) / kJoinRows;
  launch_dependent(
      ctx, "join_segments", kernel,
      dim3((kGradients ? 2 : 1) * value_blocks, params.problem.heads, params.batch.count),
      kJoinThreads, kBytes, params);
}

template <int kKeys, bool kGradients>
void launch_join(Context& ctx, const ChunkParams& params) {
  if (most_shared_bytes() >= JoinLayout<kKeys, 3>::kBytes) {
    launch_join_of<kKeys, 3, kGradients>(ctx, params);
  } else {
    launch_join_of<kKeys, 2, kGradients>(ctx, params);
  }
}

template <class Products, int kKeys>
void launch(Context& ctx, const ChunkParams& params) {
  if (params.batch.maps > 0) {
    launch_walk<Products, kKeys, true>(ctx, params, 4);
    launch_join<kKeys, false>(ctx, params);
  }
  launch_walk<Products, kKeys, false>(ctx, params, 3);
}

ChunkParams chunk_params(const DeltaRuleProblem& problem, const SequenceBatch& batch, float* maps) {
  return {.problem = problem,
          .maps = maps,
          .d_maps = nullptr,
          .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
          .stages = 0,
          .batch = batch};
}

}  // namespace

bool delta_rule_chunks_fit(const DeltaRuleProblem& problem) {
  return problem.is_bf16 && problem.key_dim % 8 == 0 && problem.value_dim % 8 == 0 &&
         problem.key_dim <= 128;
}

int delta_rule_segments_of(const DeltaRuleProblem& problem, int length, int tokens_bucket,
                           int multiprocessors) {
  constexpr int kLeastChunks = 5;    // of a segment; a map costs what walking some chunks does
  constexpr int kLeastSegments = 3;  // two walks cost twice one
  const int chunks = chunks_of(length);
  if (problem.value_dim > kValues || most_shared_bytes() < JoinLayout<128, 2>::kBytes) return 1;
  // As many as fill the card if the batch has the fewest chunks of its bucket.
  const int chunks_of_batch = std::max(1, tokens_bucket / 2 / kChunk);
  const int fill = static_cast<int>(static_cast<std::int64_t>(chunks) * multiprocessors /
                                    (static_cast<std::int64_t>(chunks_of_batch) * problem.heads));
  const int segments = std::min({multiprocessors / problem.heads, fill, chunks / kLeastChunks});
  return segments < kLeastSegments ? 1 : segments;
}

int delta_rule_segments(const DeltaRuleProblem& problem, int length, int multiprocessors) {
  // Two walks cost about twice one: below three segments' worth of chunks there is nothing to gain.
  constexpr int kLeastChunks = 16;
  const int chunks = chunks_of(length);
  if (problem.value_dim > kValues || chunks < 5 * kLeastChunks) return 1;
  if (most_shared_bytes() < JoinLayout<128, 2>::kBytes) return 1;
  return std::clamp(multiprocessors / problem.heads, 1, chunks / kLeastChunks);
}

std::size_t delta_rule_maps_bytes(const DeltaRuleProblem& problem, int maps) {
  const auto keys = static_cast<std::size_t>(padded_keys(problem.key_dim));
  return sizeof(float) * (kValues + keys) * keys * static_cast<std::size_t>(problem.heads) *
         static_cast<std::size_t>(maps);
}

void launch_delta_rule_chunks(Context& ctx, const DeltaRuleProblem& problem,
                              const SequenceBatch& batch, float* maps) {
  for_products_and_keys(problem.key_dim, [&]<class Products, int kKeys>() {
    launch<Products, kKeys>(ctx, chunk_params(problem, batch, maps));
  });
}

void launch_delta_rule_joins(Context& ctx, const DeltaRuleProblem& problem,
                             const SequenceBatch& batch, float* maps, float* d_maps) {
  ChunkParams params = chunk_params(problem, batch, maps);
  params.d_maps = d_maps;
  if (padded_keys(problem.key_dim) == 64) {
    launch_join<64, true>(ctx, params);
  } else {
    launch_join<128, true>(ctx, params);
  }
}

}  // namespace deltafox::cuda
