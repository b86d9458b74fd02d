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

#include "cuda/check.cuh"
#include "cuda/delta_rule_kernels.h"
#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {
namespace {

constexpr int kChunk = kTileRows;
constexpr int kValues = 128;       // value columns of a block
constexpr int kThreads = 3 * 128;  // two groups for the state, one that prepares
constexpr int kInverseStride = 20;
constexpr int kInverseBlock = 16 * kInverseStride;  // floats of a 16×16 block, padded

struct ChunkParams {
  DeltaRuleProblem problem;
  float* maps;  // per map and head: Nᵀ [kValues, K'], Mᵀ [K', K'] with K' the padded K
  float scale;
  int stages;
  SequenceBatch batch;
};

template <int kKeys, bool kMaps>
struct Layout {
  static constexpr int kKeyTile = kKeys / 64 * kTileBlockBytes;
  static constexpr int kValueTile = kValues / 64 * kTileBlockBytes;
  static constexpr int kK = 0;
  static constexpr int kV = kKeyTile;
  static constexpr int kT = kV + kValueTile;
  static constexpr int kQ = kT + kTileBlockBytes;
  static constexpr int kA = kQ + kKeyTile;
  static constexpr int kStage = kMaps ? kQ : kA + kTileBlockBytes;
  // behind the stages
  static constexpr int kInverse = 0;                               // 10 blocks
  static constexpr int kBeta = kInverse + 10 * kInverseBlock * 4;  // [2, 64]
  static constexpr int kBarriers = kBeta + 2 * kChunk * 4;         // full and empty of each stage
  static constexpr int kFixed = kBarriers + 128;

  static int bytes(int stages) { return 1024 + stages * kStage + kFixed; }
};

// The thread's index, read anew: keeps what depends on it out of the registers between chunks.
__device__ int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

struct Segment {
  const BatchEntry* entry;
  int index;
  int begin;  // first row
  int rows;
  int chunks;
  bool last;
};

template <bool kMaps>
__device__ Segment find_segment(const SequenceBatch& batch, int block) {
  int low = 0;
  int high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const int first = kMaps ? batch.entries[middle].first_map : batch.entries[middle].first_block;
    if (first <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const BatchEntry& entry = batch.entries[low];
  Segment s;
  s.entry = &entry;
  s.index = block - (kMaps ? entry.first_map : entry.first_block);
  const int chunks = (entry.length + kChunk - 1) / kChunk;
  const int base = chunks / entry.segments;
  const int rest = chunks % entry.segments;
  const int first = s.index * base + min(s.index, rest);
  s.chunks = base + (s.index < rest ? 1 : 0);
  s.begin = entry.begin + first * kChunk;
  s.rows = min(s.chunks * kChunk, entry.length - first * kChunk);
  s.last = s.index == entry.segments - 1;
  return s;
}

__device__ std::size_t map_floats(int keys) {
  return static_cast<std::size_t>(kValues + keys) * keys;
}

// ---- The group that prepares ------------------------------------------------------------------

template <int kKeys, bool kMaps>
struct Loader {
  const ChunkParams& p;
  const Segment& segment;
  int head;
  int first_value;
  std::uint32_t stages_base;

  __device__ static void load_tile(std::uint32_t tile, const bf16* rows, int stride, int columns,
                                   int kPieces, int valid_rows, int thread) {
    const int piece = thread % kPieces;
    const int row_step = 128 / kPieces;
    const bool in_columns = piece * 8 < columns;
    const bf16* source = rows + static_cast<std::ptrdiff_t>(thread / kPieces) * stride + piece * 8;
#pragma unroll 4
    for (int row = thread / kPieces; row < kChunk; row += row_step) {
      const bool valid = in_columns && row < valid_rows;
      copy_piece_async(tile + piece_offset(row, piece), valid ? source : rows, valid);
      source += static_cast<std::ptrdiff_t>(row_step) * stride;
    }
  }

  // Starts the copies of one chunk; returns β of row threadIdx.x % 128 of it.
  __device__ float load(int chunk, int stage) const {
    using L = Layout<kKeys, kMaps>;
    const int thread = read_thread() % 128;
    const DeltaRuleProblem& problem = p.problem;
    const int valid_rows = min(kChunk, segment.rows - chunk * kChunk);
    const auto row = static_cast<std::ptrdiff_t>(segment.begin + chunk * kChunk);
    const int key_stride = problem.heads * problem.key_dim;
    const int value_stride = problem.heads * problem.value_dim;
    const std::uint32_t base = stages_base + stage * L::kStage;
    const std::ptrdiff_t key_offset = row * key_stride + head * problem.key_dim;
    load_tile(base + L::kK, static_cast<const bf16*>(problem.k) + key_offset, key_stride,
              problem.key_dim, kKeys / 8, valid_rows, thread);
    if (!kMaps) {
      load_tile(base + L::kQ, static_cast<const bf16*>(problem.q) + key_offset, key_stride,
                problem.key_dim, kKeys / 8, valid_rows, thread);
    }
    load_tile(base + L::kV,
              static_cast<const bf16*>(problem.v) + row * value_stride + head * problem.value_dim +
                  first_value,
              value_stride, problem.value_dim - first_value, kValues / 8, valid_rows, thread);
    if (thread >= valid_rows) return 0;
    if (problem.beta == nullptr) return 1;
    const std::ptrdiff_t at = (row + thread) * problem.heads + head;
    return problem.beta_bf16 ? __bfloat162float(static_cast<const bf16*>(problem.beta)[at])
                             : static_cast<const float*>(problem.beta)[at];
  }
};

// Block (i, m) of the lower triangle, m ≤ i.
__device__ float* inverse_block(float* blocks, int i, int m) {
  return blocks + (i * (i + 1) / 2 + m) * kInverseBlock;
}

// Replaces the 16×16 unit lower triangular block by its inverse: lane c solves for column c.
__device__ void invert_diagonal(float* block, int column) {
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) {
    float sum = r == column ? 1.0F : 0.0F;
#pragma unroll
    for (int m = 0; m < r; m += 4) {
      const float4 row = *reinterpret_cast<const float4*>(block + r * kInverseStride + m);
      sum -= row.x * x[m];
      if (m + 1 < r) sum -= row.y * x[m + 1];
      if (m + 2 < r) sum -= row.z * x[m + 2];
      if (m + 3 < r) sum -= row.w * x[m + 3];
    }
    x[r] = sum;
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 16; ++r) block[r * kInverseStride + column] = x[r];
}

// d += x · blockᵀ for 16×16 matrices; x is an accumulator of two 16×8 tiles. Slots l%4 and
// l%4 + 4 of the depth stand for columns 2(l%4) and 2(l%4) + 1, in both operands, so that an
// accumulator is an operand as it is.
__device__ void times_block_transposed(float (&d)[2][4], const float (&x)[2][4], int lane,
                                       const float* block) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t a[4] = {to_tf32(x[k][0]), to_tf32(x[k][2]), to_tf32(x[k][1]),
                                to_tf32(x[k][3])};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(
          block + (8 * n + lane / 4) * kInverseStride + 8 * k + 2 * (lane % 4));
      mma_tf32(d[n], a, to_tf32(b.x), to_tf32(b.y));
    }
  }
}

// Column j (warp j's) of the inverse, transposed, from the blocks below the diagonal and the
// inverses on it: X_j = D_jᵀ, X_i = −(Σ_{j≤m<i} X_m L_imᵀ) D_iᵀ. Writes −inverse·diag(β) to `tile`.
__device__ void finish_inverse(float* blocks, const float* beta, unsigned char* tile, int lane,
                               int column) {
  float x[4][2][4];
  const float* diagonal = inverse_block(blocks, column, column);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[0][n][i] =
          diagonal[(8 * n + 2 * (lane % 4) + i % 2) * kInverseStride + lane / 4 + i / 2 * 8];
    }
  }
#pragma unroll
  for (int d = 1; d < 4; ++d) {
    if (column + d < 4) {
      float y[2][4] = {};
#pragma unroll
      for (int e = 0; e < d; ++e) {
        times_block_transposed(y, x[e], lane, inverse_block(blocks, column + d, column + e));
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[n][i] = -y[n][i];
          x[d][n][i] = 0;
        }
      }
      times_block_transposed(x[d], y, lane, inverse_block(blocks, column + d, column + d));
    }
  }
  const float beta_low = beta[16 * column + lane / 4];
  const float beta_high = beta[16 * column + lane / 4 + 8];
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    if (column + d < 4) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * (column + d) + 8 * n + 2 * (lane % 4) + i % 2;
          const int piece = 2 * column + i / 2;
          *reinterpret_cast<bf16*>(tile + piece_offset(row, piece) + lane / 4 * 2) =
              __float2bfloat16(-x[d][n][i] * (i / 2 == 0 ? beta_low : beta_high));
        }
      }
    }
  }
}

template <class Products, int kKeys, bool kMaps>
__device__ void prepare_chunks(const ChunkParams& p, const Segment& segment, int head,
                               int first_value, unsigned char* stages, unsigned char* fixed) {
  using L = Layout<kKeys, kMaps>;
  const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
  auto* blocks = reinterpret_cast<float*>(fixed + L::kInverse);
  const Loader<kKeys, kMaps> loader{p, segment, head, first_value, shared_address(stages)};
  const int ahead = p.stages > 1 ? 1 : 0;

  float beta_next = 0;
  if (ahead > 0) {
    beta_next = loader.load(0, 0);
    commit_copies();
  }
  for (int c = 0; c < segment.chunks; ++c) {
    const int thread = read_thread() % 128;
    const int lane = thread % 32;
    const int warp = thread / 32;
    const int stage = c % p.stages;
    float beta_now = beta_next;
    const int next = c + ahead;
    if (next < segment.chunks) {
      if (next >= p.stages) {
        barrier_wait(barriers + (2 * (next % p.stages) + 1) * 8, (next / p.stages - 1) & 1);
      }
      beta_next = loader.load(next, next % p.stages);
      if (ahead == 0) beta_now = beta_next;
    }
    commit_copies();
    float* beta = reinterpret_cast<float*>(fixed + L::kBeta) + (c % 2) * kChunk;
    if (thread < kChunk) beta[thread] = beta_now;
    if (ahead > 0) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    Products::publish();
    group_sync(1);

    unsigned char* base = stages + stage * L::kStage;
    const std::uint32_t k = shared_address(base + L::kK);
    const int row = 16 * warp + lane / 4;
    {
      float g[8][4];
      Products::begin(g);
      Products::template tiles_transposed<kKeys / 16>(g, k, k);
      Products::commit();
      Products::template wait<0>();
      Products::end(g);
      const float beta_low = beta[row];
      const float beta_high = beta[row + 8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < 2 * warp + 2) {
          float* to = inverse_block(blocks, warp, j / 2) + lane / 4 * kInverseStride + j % 2 * 8 +
                      2 * (lane % 4);
          *reinterpret_cast<float2*>(to) = make_float2(beta_low * g[j][0], beta_low * g[j][1]);
          *reinterpret_cast<float2*>(to + 8 * kInverseStride) =
              make_float2(beta_high * g[j][2], beta_high * g[j][3]);
        }
      }
      __syncwarp();
    }
    float a[8][4];
    if (!kMaps) {
      Products::begin(a);
      Products::template tiles_transposed<kKeys / 16>(a, shared_address(base + L::kQ), k);
      Products::commit();
    }
    invert_diagonal(inverse_block(blocks, warp, warp), lane % 16);
    if (!kMaps) {
      Products::template wait<0>();
      Products::end(a);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (j < 2 * warp + 2) {
          const int column = 8 * j + 2 * (lane % 4);
          unsigned char* to = base + L::kA + piece_offset(row, j) + 4 * (lane % 4);
          *reinterpret_cast<std::uint32_t*>(to) =
              pack(column <= row ? a[j][0] : 0, column + 1 <= row ? a[j][1] : 0);
          *reinterpret_cast<std::uint32_t*>(to + 8 * 128) =
              pack(column <= row + 8 ? a[j][2] : 0, column + 1 <= row + 8 ? a[j][3] : 0);
        }
      }
    }
    group_sync(1);
    finish_inverse(blocks, beta, base + L::kT, lane, warp);
    Products::publish();
    barrier_arrive(barriers + 2 * stage * 8);
  }
}

// ---- The groups that hold the state -------------------------------------------------------------

template <int kTiles>
__device__ void load_state(float (&s)[kTiles][4], const float* state, int keys, int values,
                           int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + 2 * (lane % 4) + i % 2;
      const int value = column + i / 2 * 8;
      s[j][i] = key < keys && value < values
                    ? state[static_cast<std::ptrdiff_t>(key) * values + value]
                    : 0;
    }
  }
}

template <int kTiles>
__device__ void store_state(const float (&s)[kTiles][4], float* state, int keys, int values,
                            int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 8 * j + 2 * (lane % 4) + i % 2;
      const int value = column + i / 2 * 8;
      if (key < keys && value < values) {
        state[static_cast<std::ptrdiff_t>(key) * values + value] = s[j][i];
      }
    }
  }
}

// A transposed state of a map, rows `row` and `row` + 8.
template <int kTiles>
__device__ void load_transposed(float (&s)[kTiles][4], const float* from, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float* at = from + row * (8 * kTiles) + 8 * j + 2 * (lane % 4);
    const float2 low = *reinterpret_cast<const float2*>(at);
    const float2 high = *reinterpret_cast<const float2*>(at + 8 * (8 * kTiles));
    s[j][0] = low.x;
    s[j][1] = low.y;
    s[j][2] = high.x;
    s[j][3] = high.y;
  }
}

template <int kTiles>
__device__ void store_transposed(const float (&s)[kTiles][4], float* to, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float* at = to + row * (8 * kTiles) + 8 * j + 2 * (lane % 4);
    *reinterpret_cast<float2*>(at) = make_float2(s[j][0], s[j][1]);
    *reinterpret_cast<float2*>(at + 8 * (8 * kTiles)) = make_float2(s[j][2], s[j][3]);
  }
}

// −Vᵀ of this warp's 16 value columns as an accumulator.
__device__ void load_values(float (&r)[8][4], std::uint32_t tile) {
  const int thread = read_thread();
  const int lane = thread % 32;
  const int first_piece = thread / 32 * 2;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    std::uint32_t m[4];
    load_matrices_transposed(
        m, tile + piece_offset(8 * (j + lane / 16) + lane % 8, first_piece + (lane / 8) % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(m[i]));
      r[j + i / 2][i % 2 * 2] = -pair.x;
      r[j + i / 2][i % 2 * 2 + 1] = -pair.y;
    }
  }
}

// Oᵀ of this warp's columns through its own columns of the value tile to memory.
__device__ void store_outputs(const float (&o)[8][4], std::uint32_t tile, int first_piece,
                              float scale, bf16* out, int stride, int valid_rows,
                              int valid_columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const std::uint32_t m[4] = {pack(o[j][0] * scale, o[j][1] * scale),
                                pack(o[j][2] * scale, o[j][3] * scale),
                                pack(o[j + 1][0] * scale, o[j + 1][1] * scale),
                                pack(o[j + 1][2] * scale, o[j + 1][3] * scale)};
    store_matrices_transposed(
        tile + piece_offset(8 * (j + lane / 16) + lane % 8, first_piece + (lane / 8) % 2), m);
  }
  __syncwarp();
  const int piece = lane % 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * i + lane / 2;
    uint4 data;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                 : "r"(tile + piece_offset(row, first_piece + piece))
                 : "memory");
    if (row < valid_rows && 8 * piece < valid_columns) {
      *reinterpret_cast<uint4*>(out + static_cast<std::ptrdiff_t>(row) * stride + 8 * piece) = data;
    }
  }
}

template <class Products, int kKeys>
__device__ void walk_outputs(const ChunkParams& p, const Segment& segment, int head,
                             int first_value, unsigned char* stages, unsigned char* fixed) {
  using L = Layout<kKeys, false>;
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
  std::uint32_t sf[kKeys / 16][4];
  to_operand(sf, s);

  const int stride = problem.heads * problem.value_dim;
  const int column = first_value + 16 * warp;
  bf16* out = static_cast<bf16*>(problem.o) + static_cast<std::ptrdiff_t>(segment.begin) * stride +
              head * problem.value_dim + column;
  int stage = 0;
  int parity = 0;
  for (int c = 0; c < segment.chunks; ++c) {
    const std::uint32_t base = shared_address(stages) + stage * L::kStage;
    barrier_wait(barriers + 2 * stage * 8, parity);

    float r[8][4];
    float o[8][4];
    std::uint32_t f[4][4];
    load_values(r, base + L::kV);
    Products::begin(r);
    Products::template times_transposed<false>(r, sf, base + L::kK);
    Products::commit();
    Products::template times_transposed<true>(o, sf, base + L::kQ);
    Products::commit();
    Products::template wait<1>();
    Products::end(r);
    to_operand(f, r);
    Products::begin(r);
    Products::template times_transposed<true>(r, f, base + L::kT);
    Products::commit();
    Products::template wait<0>();
    Products::end(r);
    Products::end(o);
    to_operand(f, r);
    Products::begin(s);
    Products::template times<false>(s, f, base + L::kK);
    Products::commit();
    Products::template times_transposed<false>(o, f, base + L::kA);
    Products::commit();
    Products::template wait<1>();
    Products::end(s);
    to_operand(sf, s);
    Products::template wait<0>();
    Products::end(o);
    store_outputs(o, base + L::kV, 2 * warp, p.scale, out, stride, segment.rows - c * kChunk,
                  problem.value_dim - column);
    out += static_cast<std::ptrdiff_t>(kChunk) * stride;
    __syncwarp();
    if (read_thread() % 32 == 0) barrier_arrive(barriers + (2 * stage + 1) * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  if (segment.last) {
    store_state(s, segment.entry->state + state_offset, problem.key_dim, problem.value_dim,
                first_value + row);
  }
}

// One chunk's change of 64 columns of [M | N].
template <class Products, int kKeys, bool kHasValues>
__device__ void advance_map(float (&s)[kKeys / 8][4], std::uint32_t base) {
  using L = Layout<kKeys, true>;
  float r[8][4];
  std::uint32_t f[4][4];
  if (kHasValues) load_values(r, base + L::kV);
  // In parts, lest [M | N] and its rounded copy outgrow the registers.
#pragma unroll
  for (int i = 0; i < kKeys / 64; ++i) {
    const auto& part = reinterpret_cast<const float(&)[8][4]>(s[8 * i]);
    to_operand(f, part);
    Products::begin(r);
    if (i == 0 && !kHasValues) {
      Products::template times_transposed<true>(r, f, base + L::kK);
    } else {
      Products::template times_transposed<false>(r, f, base + L::kK + i * kTileBlockBytes);
    }
    Products::commit();
    Products::template wait<0>();
    Products::end(r);
  }
  to_operand(f, r);
  Products::begin(r);
  Products::template times_transposed<true>(r, f, base + L::kT);
  Products::commit();
  Products::template wait<0>();
  Products::end(r);
  to_operand(f, r);
  Products::begin(s);
  Products::template times<false>(s, f, base + L::kK);
  Products::commit();
  Products::template wait<0>();
  Products::end(s);
}

template <class Products, int kKeys>
__device__ void walk_maps(const ChunkParams& p, const Segment& segment, int head,
                          unsigned char* stages, unsigned char* fixed) {
  using L = Layout<kKeys, true>;
  const DeltaRuleProblem& problem = p.problem;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;  // of eight
  const int row = 16 * warp + lane / 4;
  const std::uint32_t barriers = shared_address(fixed + L::kBarriers);
  const bool has_map = segment.index > 0 && warp / 4 * 64 < kKeys;

  float n[kKeys / 8][4];
  float m[kKeys / 8][4];
  if (segment.index == 0) {
    load_state(n,
               segment.entry->state +
                   static_cast<std::ptrdiff_t>(head) * problem.key_dim * problem.value_dim,
               problem.key_dim, problem.value_dim, row);
  } else {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) n[j][0] = n[j][1] = n[j][2] = n[j][3] = 0;
  }
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      m[j][i] = 8 * j + 2 * (lane % 4) + i % 2 == row + i / 2 * 8 ? 1.0F : 0.0F;
    }
  }
  int stage = 0;
  int parity = 0;
  for (int c = 0; c < segment.chunks; ++c) {
    const std::uint32_t base = shared_address(stages) + stage * L::kStage;
    barrier_wait(barriers + 2 * stage * 8, parity);
    advance_map<Products, kKeys, true>(n, base);
    if (has_map) advance_map<Products, kKeys, false>(m, base);
    __syncwarp();
    if (read_thread() % 32 == 0) barrier_arrive(barriers + (2 * stage + 1) * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  const std::size_t slot = segment.entry->first_map + segment.index;
  float* map = p.maps + (slot * problem.heads + head) * map_floats(kKeys);
  store_transposed(n, map, row);
  if (has_map) store_transposed(m, map + kValues * kKeys, row);
}

// ---- Kernels ----------------------------------------------------------------------------------

template <int kRegisters>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <class Products, int kKeys, bool kMaps>
__global__ void __launch_bounds__(kThreads, 1)
    delta_rule_chunks(const __grid_constant__ ChunkParams p) {
  // Other targets compile this kernel too, and never launch it.
  if constexpr (!Products::kGroup || kHasGroupProducts) {
    using L = Layout<kKeys, kMaps>;
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
        barrier_init(barriers + (2 * s + 1) * 8, 8);
      }
    }
    // What lies above the diagonal blocks is written here, once.
    for (int s = 0; s < p.stages; ++s) {
      for (int i = threadIdx.x; i < kTileBlockBytes / 16; i += kThreads) {
        reinterpret_cast<uint4*>(stages + s * L::kStage + L::kT)[i] = make_uint4(0, 0, 0, 0);
        if (!kMaps) {
          reinterpret_cast<uint4*>(stages + s * L::kStage + L::kA)[i] = make_uint4(0, 0, 0, 0);
        }
      }
    }
    Products::publish();
    __syncthreads();

    if (threadIdx.x >= 256) {
      if constexpr (Products::kGroup) give_registers<88>();
      prepare_chunks<Products, kKeys, kMaps>(p, segment, head, first_value, stages, fixed);
    } else {
      if constexpr (Products::kGroup) take_registers<208>();
      if constexpr (kMaps) {
        walk_maps<Products, kKeys>(p, segment, head, stages, fixed);
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

// S_{s+1}ᵀ = S_sᵀ M_sᵀ + N_sᵀ for the segments of one sequence and head, 16 value columns a block;
// N is replaced by the state behind the segment. Operands are split into two bfloat16 halves each,
// which leaves products of 16 bits: the state stays a float32 one.
template <int kKeys>
__global__ void __launch_bounds__(256) join_segments(const __grid_constant__ ChunkParams p) {
  constexpr int kStride = kKeys + 4;
  constexpr int kColumns = kKeys / 8;  // of a warp
  extern __shared__ unsigned char shared[];
  auto* tiles = reinterpret_cast<float*>(shared);  // [2, K', kStride]
  float* state = tiles + 2 * kKeys * kStride;      // [16, kStride]
  const BatchEntry& entry = p.batch.entries[blockIdx.z];
  const int hops = entry.segments - 2;
  if (hops < 1) return;
  const int head = blockIdx.y;
  const int first_row = 16 * blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto map = [&](int segment) {
    const std::size_t slot = entry.first_map + segment;
    return p.maps + (slot * p.problem.heads + head) * map_floats(kKeys);
  };
  const auto prefetch = [&](int hop) {
    if (hop < hops) {
      const float* from = map(hop + 1) + kValues * kKeys;
      float* to = tiles + (hop % 2) * kKeys * kStride;
      for (int i = threadIdx.x; i < kKeys * kKeys / 4; i += 256) {
        const int row = i / (kKeys / 4);
        const int column = i % (kKeys / 4) * 4;
        copy_piece_async(shared_address(to + row * kStride + column), from + 4 * i, true);
      }
    }
    commit_copies();
  };
  prefetch(0);
  for (int i = threadIdx.x; i < 16 * kKeys; i += 256) {
    state[i / kKeys * kStride + i % kKeys] = map(0)[first_row * kKeys + i];
  }
  for (int hop = 0; hop < hops; ++hop) {
    prefetch(hop + 1);
    float* n = map(hop + 1) + (first_row + lane / 4) * kKeys + warp * kColumns + 2 * (lane % 4);
    float d[kColumns / 8][4];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float2 low = *reinterpret_cast<const float2*>(n + 8 * j);
      const float2 high = *reinterpret_cast<const float2*>(n + 8 * j + 8 * kKeys);
      d[j][0] = low.x;
      d[j][1] = low.y;
      d[j][2] = high.x;
      d[j][3] = high.y;
    }
    wait_copies<1>();
    __syncthreads();
    const float* m = tiles + (hop % 2) * kKeys * kStride;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      std::uint32_t a[4];
      std::uint32_t a_low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(
            state + (lane / 4 + i % 2 * 8) * kStride + 16 * k + i / 2 * 8 + 2 * (lane % 4));
        split(pair.x, pair.y, a[i], a_low[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        std::uint32_t b[2];
        std::uint32_t b_low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* at =
              m + (16 * k + 8 * i + 2 * (lane % 4)) * kStride + warp * kColumns + 8 * j + lane / 4;
          split(at[0], at[kStride], b[i], b_low[i]);
        }
        mma_bf16(d[j], a, b_low[0], b_low[1]);
        mma_bf16(d[j], a_low, b[0], b[1]);
        mma_bf16(d[j], a, b[0], b[1]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      float* at = state + lane / 4 * kStride + warp * kColumns + 8 * j + 2 * (lane % 4);
      *reinterpret_cast<float2*>(at) = make_float2(d[j][0], d[j][1]);
      *reinterpret_cast<float2*>(at + 8 * kStride) = make_float2(d[j][2], d[j][3]);
      *reinterpret_cast<float2*>(n + 8 * j) = make_float2(d[j][0], d[j][1]);
      *reinterpret_cast<float2*>(n + 8 * j + 8 * kKeys) = make_float2(d[j][2], d[j][3]);
    }
  }
}

struct Card {
  int multiprocessors = 0;
  int shared_bytes = 0;
  bool group_products = false;
};

Card card() {
  int device = 0;
  int major = 0;
  Card card;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&card.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(
      cudaDeviceGetAttribute(&card.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  card.group_products = major == 9;
  return card;
}

template <class Products, int kKeys, bool kMaps>
void launch_walk(ChunkParams params, const Card& card, int most_stages, cudaStream_t stream) {
  using L = Layout<kKeys, kMaps>;
  params.stages = most_stages;
  while (params.stages > 1 && L::bytes(params.stages) > card.shared_bytes) --params.stages;
  const int bytes = L::bytes(params.stages);
  const auto kernel = delta_rule_chunks<Products, kKeys, kMaps>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const int blocks = kMaps ? params.batch.maps : params.batch.blocks;
  const int value_blocks = (params.problem.value_dim + kValues - 1) / kValues;
  kernel<<<dim3(params.problem.heads, blocks, kMaps ? 1 : value_blocks), kThreads, bytes, stream>>>(
      params);
  check(cudaGetLastError());
}

template <class Products, int kKeys>
void launch(const ChunkParams& params, const Card& card, cudaStream_t stream) {
  if (params.batch.maps > 0) {
    launch_walk<Products, kKeys, true>(params, card, 4, stream);
    const int bytes = (2 * kKeys + 16) * (kKeys + 4) * 4;
    const auto kernel = join_segments<kKeys>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<dim3((params.problem.value_dim + 15) / 16, params.problem.heads, params.batch.count),
             256, bytes, stream>>>(params);
    check(cudaGetLastError());
  }
  launch_walk<Products, kKeys, false>(params, card, 3, stream);
}

int padded_keys(const DeltaRuleProblem& problem) {
  return problem.key_dim <= 64 ? 64 : 128;
}

}  // namespace

bool delta_rule_chunks_fit(const DeltaRuleProblem& problem) {
  return problem.is_bf16 && problem.key_dim % 8 == 0 && problem.value_dim % 8 == 0 &&
         problem.key_dim <= 128;
}

int delta_rule_segments(const DeltaRuleProblem& problem, int length, int multiprocessors) {
  // Two walks cost about twice one: below three segments' worth of chunks there is nothing to gain.
  constexpr int kLeastChunks = 16;
  const int chunks = (length + kChunk - 1) / kChunk;
  if (problem.value_dim > kValues || chunks < 5 * kLeastChunks) return 1;
  return std::clamp(multiprocessors / problem.heads, 1, chunks / kLeastChunks);
}

std::size_t delta_rule_maps_bytes(const DeltaRuleProblem& problem, int maps) {
  const auto keys = static_cast<std::size_t>(padded_keys(problem));
  return sizeof(float) * (kValues + keys) * keys * static_cast<std::size_t>(problem.heads) *
         static_cast<std::size_t>(maps);
}

void launch_delta_rule_chunks(const DeltaRuleProblem& problem, const SequenceBatch& batch,
                              float* maps, cudaStream_t stream, ProductKind kind) {
  const Card c = card();
  const ChunkParams params{.problem = problem,
                           .maps = maps,
                           .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim)),
                           .stages = 0,
                           .batch = batch};
  const bool group =
      kind == ProductKind::kAutomatic ? c.group_products : kind == ProductKind::kGroup;
  if (padded_keys(problem) == 64) {
    group ? launch<GroupProducts, 64>(params, c, stream)
          : launch<WarpProducts, 64>(params, c, stream);
  } else {
    group ? launch<GroupProducts, 128>(params, c, stream)
          : launch<WarpProducts, 128>(params, c, stream);
  }
}

}  // namespace deltafox::cuda
