// What the delta rule's kernels in chunks of 64 rows share, forwards and backwards: segments of
// sequences, loads of tiles, the inverse of a chunk's triangle, states and values as accumulators.
#pragma once

#include "cuda/card.h"
#include "cuda/check.h"
#include "cuda/delta_rule_kernels.h"
#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {

constexpr int kChunk = kChunkRows;
static_assert(kChunk == kTileRows);
constexpr int kValues = 128;  // value columns of a block
static_assert(kValues == kNormedValues);
constexpr int kStateThreads = 2 * 128;
constexpr int kInverseStride = 20;
constexpr int kInverseBlock = 16 * kInverseStride;  // floats of a 16×16 block, padded

// The thread's index, read anew: keeps what depends on it out of the registers between chunks.
__device__ inline int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The same for a value that the whole block shares.
__device__ inline int read_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

struct Segment {
  const BatchEntry* entry;
  int index;
  int begin;  // first row
  int rows;
  int chunks;
  int first_chunk;  // of those of all entries
  bool last;
};

// The entry that the part with this number belongs to, `first` being an entry's first part.
__device__ inline const BatchEntry& find_entry(const SequenceBatch& batch, int BatchEntry::*first,
                                               int part) {
  int low = 0;
  int high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.entries[middle].*first <= part) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return batch.entries[low];
}

__device__ inline Segment segment_of(const BatchEntry& entry, int index) {
  Segment s;
  s.entry = &entry;
  s.index = index;
  const int chunks = chunks_of(entry.length);
  const int base = chunks / entry.segments;
  const int rest = chunks % entry.segments;
  const int first = index * base + min(index, rest);
  s.chunks = base + (index < rest ? 1 : 0);
  s.begin = entry.begin + first * kChunk;
  s.rows = min(s.chunks * kChunk, entry.length - first * kChunk);
  s.first_chunk = entry.first_chunk + first;
  s.last = index == entry.segments - 1;
  return s;
}

// The copies of a tile of kRows rows and 8·kPieces columns by 128 threads; zeros beyond `columns`
// and `valid_rows`.
template <int kPieces, int kRows = kChunk>
__device__ void load_tile(std::uint32_t tile, const bf16* rows, int stride, int columns,
                          int valid_rows, int thread) {
  constexpr int kRowStep = 128 / kPieces;  // a multiple of 8: the permutation stays the same
  const int piece = thread % kPieces;
  const int first = thread / kPieces;
  const bf16* source = rows + static_cast<std::ptrdiff_t>(first) * stride + piece * 8;
  const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(kRowStep) * stride;
  tile += piece_offset(first, piece);
  if (valid_rows == kRows && columns >= 8 * kPieces) {
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      copy_piece_async(tile + i * kRowStep * 128, source, true);
      source += step;
    }
    return;
  }
  for (int i = 0; i < kRows / kRowStep; ++i) {
    const bool valid = piece * 8 < columns && first + i * kRowStep < valid_rows;
    copy_piece_async(tile + i * kRowStep * 128, valid ? source : rows, valid);
    source += step;
  }
}

// Block (i, m) of the lower triangle, m ≤ i.
template <typename Float>
__device__ Float* inverse_block(Float* blocks, int i, int m) {
  return blocks + (i * (i + 1) / 2 + m) * kInverseBlock;
}

// diag(β) times this warp's rows of the product of a chunk's keys, g = K Kᵀ, in blocks; the product
// is symmetric, which gives the diagonal block transposed for nothing.
__device__ inline void store_scaled_products(const float (&g)[8][4], const float* beta,
                                             float* blocks, int lane, int warp) {
  const int row = 16 * warp + lane / 4;
  const float beta_low = beta[row];
  const float beta_high = beta[row + 8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < 2 * warp + 2) {
      const bool diagonal = j >= 2 * warp;
      float2 low = make_float2(beta_low, beta_low);
      float2 high = make_float2(beta_high, beta_high);
      if (diagonal) {
        low = *reinterpret_cast<const float2*>(beta + 8 * j + 2 * (lane % 4));
        high = low;
      }
      low = make_float2(low.x * g[j][0], low.y * g[j][1]);
      high = make_float2(high.x * g[j][2], high.y * g[j][3]);
      if (!diagonal) {
        low = make_float2(to_tf32(low.x), to_tf32(low.y));
        high = make_float2(to_tf32(high.x), to_tf32(high.y));
      }
      float* to = inverse_block(blocks, warp, j / 2) + lane / 4 * kInverseStride + j % 2 * 8 +
                  2 * (lane % 4);
      *reinterpret_cast<float2*>(to) = low;
      *reinterpret_cast<float2*>(to + 8 * kInverseStride) = high;
    }
  }
  __syncwarp();
}

// Replaces the transpose of a 16×16 unit lower triangular block by the negated inverse of the
// block: a lane solves for one column, and takes what it has found out of all rows below at once.
__device__ inline void invert_diagonal(float* block, int column) {
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) x[r] = r == column ? 1.0F : 0.0F;
#pragma unroll
  for (int m = 0; m < 15; ++m) {
#pragma unroll
    for (int r = (m + 1) / 4 * 4; r < 16; r += 4) {
      const float4 l = *reinterpret_cast<const float4*>(block + m * kInverseStride + r);
      if (r > m) x[r] -= l.x * x[m];
      if (r + 1 > m) x[r + 1] -= l.y * x[m];
      if (r + 2 > m) x[r + 2] -= l.z * x[m];
      x[r + 3] -= l.w * x[m];
    }
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 16; ++r) block[r * kInverseStride + column] = to_tf32(-x[r]);
}

// d += x · blockᵀ for 16×16 matrices in TF32; x is an accumulator of two 16×8 tiles. Slots l%4 and
// l%4 + 4 of the depth stand for columns 2(l%4) and 2(l%4) + 1, in both operands, so that an
// accumulator is an operand as it is.
__device__ inline void times_block_transposed(float (&d)[2][4], const float (&x)[2][4], int lane,
                                              const float* block) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float a[4] = {x[k][0], x[k][2], x[k][1], x[k][3]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 b = *reinterpret_cast<const float2*>(
          block + (8 * n + lane / 4) * kInverseStride + 8 * k + 2 * (lane % 4));
      mma_tf32(d[n], a, b.x, b.y);
    }
  }
}

__device__ inline void round_to_tf32(float (&x)[2][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (float& e : x[n]) e = to_tf32(e);
  }
}

// Column j (warp j's) of the negated inverse, transposed, from the blocks L below the diagonal and
// the negated inverses D on it: X_j = D_jᵀ, X_i = (Σ_{j≤m<i} X_m L_imᵀ) D_iᵀ. `tile` receives
// −(inverse · diag(β))ᵀ.
__device__ inline void finish_inverse(const float* blocks, const float* beta, unsigned char* tile,
                                      int lane, int column) {
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
  const float beta_low = beta[16 * column + lane / 4];
  const float beta_high = beta[16 * column + lane / 4 + 8];
#pragma unroll
  for (int d = 0; d < 4; ++d) {
    if (column + d < 4) {
      if (d > 0) {
        float y[2][4] = {};
#pragma unroll
        for (int e = 0; e < d; ++e) {
          times_block_transposed(y, x[e], lane, inverse_block(blocks, column + d, column + e));
        }
        round_to_tf32(y);
#pragma unroll
        for (int n = 0; n < 2; ++n) x[d][n][0] = x[d][n][1] = x[d][n][2] = x[d][n][3] = 0;
        times_block_transposed(x[d], y, lane, inverse_block(blocks, column + d, column + d));
        round_to_tf32(x[d]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        unsigned char* to =
            tile + piece_offset(16 * column + lane / 4, 2 * (column + d) + n) + lane % 4 * 4;
        *reinterpret_cast<std::uint32_t*>(to) = pack(x[d][n][0] * beta_low, x[d][n][1] * beta_low);
        *reinterpret_cast<std::uint32_t*>(to + 8 * 128) =
            pack(x[d][n][2] * beta_high, x[d][n][3] * beta_high);
      }
    }
  }
}

// This warp's rows of tril(a), the diagonal included, in a tile whose later blocks are zeros.
__device__ inline void store_lower(const float (&a)[8][4], unsigned char* tile, int lane,
                                   int warp) {
  const int row = 16 * warp + lane / 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < 2 * warp + 2) {
      const int column = 8 * j + 2 * (lane % 4);
      unsigned char* to = tile + piece_offset(row, j) + 4 * (lane % 4);
      *reinterpret_cast<std::uint32_t*>(to) =
          pack(column <= row ? a[j][0] : 0, column + 1 <= row ? a[j][1] : 0);
      *reinterpret_cast<std::uint32_t*>(to + 8 * 128) =
          pack(column <= row + 8 ? a[j][2] : 0, column + 1 <= row + 8 ? a[j][3] : 0);
    }
  }
}

// Columns `column` and `column` + 8 of a state [keys, values], transposed.
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

// The transpose of this warp's 16 columns of a tile of 16·kSteps rows, as a left operand.
template <int kSteps>
__device__ void load_columns(std::uint32_t (&f)[kSteps][4], std::uint32_t tile) {
  const int thread = read_thread();
  const int lane = thread % 32;
  const int first_piece = thread / 32 * 2;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    load_matrices_transposed(f[k], tile + piece_offset(8 * (2 * k + lane / 16) + lane % 8,
                                                       first_piece + (lane / 8) % 2));
  }
}

// The negated transpose of this warp's 16 columns of a tile of 64 rows as an accumulator.
__device__ inline void load_negated_columns(float (&r)[8][4], std::uint32_t tile) {
  std::uint32_t f[4][4];
  load_columns(f, tile);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(f[j][i]));
      r[2 * j + i / 2][i % 2 * 2] = -pair.x;
      r[2 * j + i / 2][i % 2 * 2 + 1] = -pair.y;
    }
  }
}

// The transpose of this warp's 16 rows of an accumulator, times `factor`, in its 16 columns of a
// tile.
__device__ inline void store_columns_in_tile(const float (&o)[8][4], float factor,
                                             std::uint32_t tile) {
  const int thread = read_thread();
  const int lane = thread % 32;
  const int warp = thread / 32;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const std::uint32_t m[4] = {pack(o[j][0] * factor, o[j][1] * factor),
                                pack(o[j][2] * factor, o[j][3] * factor),
                                pack(o[j + 1][0] * factor, o[j + 1][1] * factor),
                                pack(o[j + 1][2] * factor, o[j + 1][3] * factor)};
    store_matrices_transposed(
        tile + piece_offset(lane / 16 * 8 + lane % 8, 2 * warp + (lane / 8) % 2) + j * 8 * 128, m);
  }
}

// The same, and through these columns to rows of memory: the tile's first element goes to `out`,
// and there are `rows` rows and `columns` columns of it.
__device__ inline void store_columns(const float (&o)[8][4], float factor, std::uint32_t tile,
                                     bf16* out, int stride, int rows, int columns) {
  store_columns_in_tile(o, factor, tile);
  const int thread = read_thread();
  const int lane = thread % 32;
  const int warp = thread / 32;
  __syncwarp();
  const int column = 8 * (2 * warp + lane % 2);
  const int first_row = lane / 2;
  out += static_cast<std::ptrdiff_t>(first_row) * stride + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 data;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
                 : "r"(tile + piece_offset(lane / 2, 2 * warp + lane % 2) + i * 16 * 128)
                 : "memory");
    // Said outright: as an assignment it becomes four stores.
    if (first_row + 16 * i < rows && column < columns) {
      asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(out), "r"(data.x), "r"(data.y),
                   "r"(data.z), "r"(data.w)
                   : "memory");
    }
    out += 16 * static_cast<std::ptrdiff_t>(stride);
  }
}

// o ← rms_norm(factor · o) · w over the values of each row, given this warp's 16 of a block's eight
// times 16 values as transposed rows. All 256 threads take part, at the same call with the same
// `sums` [8, 64] float32, and sums of the next call must be others. w [values] is F32.
__device__ inline void norm_values(float (&o)[8][4], float factor, const float* w, float eps,
                                   int values, float* sums) {
  constexpr int kNormBarrier = 4;  // 0 is __syncthreads, 1 and 2 are the preparing groups'
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float squares[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const float low = factor * o[n / 2][n % 2];
    const float high = factor * o[n / 2][n % 2 + 2];
    squares[n] = fmaf(low, low, high * high);
  }
  // Each step halves what a lane sums up: rows 2l and 2l + 1 are left for lane l.
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int left = 8 >> step;
    const bool upper = (lane & 2 * left) != 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (n >= left) continue;
      const float give = upper ? squares[n] : squares[n + left];
      const float keep = upper ? squares[n + left] : squares[n];
      squares[n] = keep + __shfl_xor_sync(0xffffffffU, give, 2 * left);
    }
  }
  const int value = 16 * warp + lane / 4;
  const float w_low = value < values ? w[value] : 0;
  const float w_high = value + 8 < values ? w[value + 8] : 0;
  *reinterpret_cast<float2*>(sums + 64 * warp + 2 * lane) = make_float2(squares[0], squares[1]);
  asm volatile("bar.sync %0, 256;" ::"n"(kNormBarrier) : "memory");
  float2 scale = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 part = *reinterpret_cast<const float2*>(sums + 64 * i + 2 * lane);
    scale = make_float2(scale.x + part.x, scale.y + part.y);
  }
  const auto width = static_cast<float>(values);
  // To two roundings: what comes of it is rounded to bfloat16.
  scale.x = factor * rsqrtf(scale.x / width + eps);
  scale.y = factor * rsqrtf(scale.y / width + eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float even = __shfl_sync(0xffffffffU, scale.x, 4 * j + lane % 4);
    const float odd = __shfl_sync(0xffffffffU, scale.y, 4 * j + lane % 4);
    o[j][0] *= even * w_low;
    o[j][1] *= odd * w_low;
    o[j][2] *= even * w_high;
    o[j][3] *= odd * w_high;
  }
}

// The row of a transposed state that this lane's first elements of the accumulators belong to.
__device__ inline int state_row() {
  return static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4);
}

// The stages as those who read them see them.
template <int kStageBytes>
struct Stages {
  std::uint32_t tiles;
  std::uint32_t barriers;
  int count;
  int stage = 0;
  int parity = 0;

  // Of the next chunk, once it is there.
  __device__ std::uint32_t wait() const {
    barrier_wait(barriers + 2 * stage * 8, parity);
    return tiles + stage * kStageBytes;
  }
  __device__ void give_back() {
    barrier_arrive(barriers + (2 * stage + 1) * 8);
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ inline std::size_t map_floats(int keys) {
  return static_cast<std::size_t>(kValues + keys) * keys;
}

// One chunk's change of 64 columns of [M | N].
template <class Products, int kKeys, bool kHasValues>
__device__ void advance_map(float (&s)[kKeys / 8][4], std::uint32_t k, std::uint32_t v,
                            std::uint32_t t) {
  float r[8][4];
  std::uint32_t f[4][4];
  if (kHasValues) load_negated_columns(r, v);
    // In parts, lest [M | N] and its rounded copy outgrow the registers.
#pragma unroll
  for (int i = 0; i < kKeys / 64; ++i) {
    const auto& part = reinterpret_cast<const float(&)[8][4]>(s[8 * i]);
    to_operand(f, part);
    Products::begin(r);
    if (i == 0 && !kHasValues) {
      Products::template times_transposed<true>(r, f, k);
    } else {
      Products::template times_transposed<false>(r, f, k + i * kTileBlockBytes);
    }
    Products::commit();
    Products::template wait<0>();
    Products::end(r);
  }
  to_operand(f, r);
  Products::begin(r);
  Products::template times<true>(r, f, t);
  Products::commit();
  Products::template wait<0>();
  Products::end(r);
  to_operand(f, r);
  Products::begin(s);
  Products::template times<false>(s, f, k);
  Products::commit();
  Products::template wait<0>();
  Products::end(s);
}

// The map of a segment, L being the layout of its stages: `n` holds the state before it, or 0.
// Nᵀ [kValues, K'] and, but for a sequence's first segment, Mᵀ [K', K'] go to `map`.
template <class Products, class L, int kKeys>
__device__ void walk_maps(float (&n)[kKeys / 8][4], const Segment& segment,
                          Stages<L::kStage> stages, float* map) {
  const int lane = threadIdx.x % 32;
  const int row = state_row();
  const bool has_map = segment.index > 0 && static_cast<int>(threadIdx.x / 128) * 64 < kKeys;
  float m[kKeys / 8][4];
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      m[j][i] = 8 * j + 2 * (lane % 4) + i % 2 == row + i / 2 * 8 ? 1.0F : 0.0F;
    }
  }
  for (int c = 0; c < segment.chunks; ++c) {
    const std::uint32_t base = stages.wait();
    advance_map<Products, kKeys, true>(n, base + L::kK, base + L::kV, base + L::kT);
    if (has_map) {
      advance_map<Products, kKeys, false>(m, base + L::kK, base + L::kV, base + L::kT);
    }
    stages.give_back();
  }
  store_transposed(n, map, row);
  if (has_map) store_transposed(m, map + kValues * kKeys, row);
}

inline bool has_group_products() {
  return compute_major() == 9;
}

inline int padded_keys(int keys) {
  return keys <= 64 ? 64 : 128;
}

// launch<Products, kKeys>() for the card's products and the padded keys.
template <class Launch>
void for_products_and_keys(int keys, const Launch& launch) {
  const bool group = has_group_products();
  if (padded_keys(keys) == 64) {
    group ? launch.template operator()<GroupProducts, 64>()
          : launch.template operator()<WarpProducts, 64>();
  } else {
    group ? launch.template operator()<GroupProducts, 128>()
          : launch.template operator()<WarpProducts, 128>();
  }
}

}  // namespace deltafox::cuda
