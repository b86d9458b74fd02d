// The gradients of Mamba-2's state space in chunks of 64 rows on the tensor cores (the equations
// are in ops/ssd.h). λ_t is the sum of log a from a chunk's first row to t, L_ts = e^(λ_t − λ_s)
// for s ≤ t, r_s = e^(λ_last − λ_s), u = Δ x; S [N, P] is the state before the chunk and dS the
// gradient of the state behind it. Heads of a group share b and c.
//
// 1. `chunk_sums`: what a chunk adds to the state, Bᵀ diag(Δ r) X, and to its gradient,
//    Cᵀ diag(e^λ) dY; kept transposed and in bfloat16, as products read them.
// 2. chunk_states.cuh: from these S and dS of every chunk.
// 3. `chunk_gradients`: with G = C Bᵀ and E = (dY Uᵀ) ⊙ L (s ≤ t),
//      dU = (G ⊙ L)ᵀ dY + diag(r) B dS,  dX = Δ dU + d dY,
//      dC = Σ_heads E B + diag(e^λ) dY Sᵀ,  dB = Σ_heads Eᵀ C + diag(r) U dSᵀ.
//    What passes row t carries log a_t: with Z = G ⊙ E and the second terms of dC and dB, dC′ and
//    dB′,
//      d log a_t = Σ_{u≥t>s} Z_us + Σ_{u≥t} c_u · dC′_u + Σ_{s<t} b_s · dB′_s + e^λ_last ⟨S, dS⟩.
#include <algorithm>

#include "cuda/batches.h"
#include "cuda/card.h"
#include "cuda/check.h"
#include "cuda/chunk.cuh"
#include "cuda/chunk_states.cuh"
#include "cuda/eight.cuh"
#include "cuda/ssd_backward.cuh"
#include "cuda/ssd_decays.cuh"
#include "cuda/stream.h"
#include "cuda/warp_tiles.cuh"

namespace deltafox::cuda {
namespace {

constexpr const char* kOp = "ssd_backward";
constexpr int kChunk = kTileRows;
constexpr int kHeadDim = 64;  // P
constexpr int kSumThreads = 256;
constexpr int kColumnWarps = 4;  // of 16 rows
constexpr int kThreads = kColumnWarps * kChunk / 16 * 32;
constexpr int kMostHeadsAtOnce = 6;
static_assert(kMostHeadsAtOnce <= kThreads / 32);

struct ChunkParams {
  SsdGradients p;
  bf16* states;    // [chunks, H, P, N], sums and then S
  bf16* d_states;  // [chunks, H, P, N], sums and then dS
  float* decays;   // [chunks, H], e^λ_last
  int heads_at_once;
  SequenceBatch batch;

  __device__ std::ptrdiff_t state_at(int chunk, int head) const {
    return (static_cast<std::ptrdiff_t>(chunk) * p.heads + head) * kHeadDim * p.state_size;
  }
};

// The rows and heads of a block.
struct Block {
  std::ptrdiff_t row;  // the first
  int valid_rows;
  int group;
  int first_head;

  __device__ explicit Block(const ChunkParams& params) {
    const Chunk chunk(params.batch, static_cast<int>(blockIdx.x), kChunk);
    row = chunk.begin;
    valid_rows = chunk.tokens;
    first_head = static_cast<int>(blockIdx.y) * params.heads_at_once;
    group = first_head / (params.p.heads / params.p.groups);
  }
};

template <int kStates>
__device__ void load_b_and_c(const SsdGradients& p, const Block& block, std::uint32_t b,
                             std::uint32_t c) {
  const bf16* xbc = static_cast<const bf16*>(p.xbc.data);
  load_tile<kStates / 8>(b, xbc + p.b_at(block.row, block.group, 0), p.row_size(),
                         block.valid_rows);
  load_tile<kStates / 8>(c, xbc + p.c_at(block.row, block.group, 0), p.row_size(),
                         block.valid_rows);
}

__device__ void load_x_and_dy(const SsdGradients& p, const Block& block, int head, std::uint32_t x,
                              std::uint32_t dy) {
  load_tile<kHeadDim / 8>(x, static_cast<const bf16*>(p.xbc.data) + p.x_at(block.row, head, 0),
                          p.row_size(), block.valid_rows);
  load_tile<kHeadDim / 8>(
      dy, static_cast<const bf16*>(p.dy.data) + p.scalar_at(block.row, head) * kHeadDim,
      static_cast<std::ptrdiff_t>(p.heads) * kHeadDim, block.valid_rows);
}

// By a warp.
__device__ ChunkDecays decays_of(const SsdGradients& p, const Block& block, int head) {
  return find_decays(-expf(p.a_log[head]), block.valid_rows,
                     [&](int t) { return p.step(p.scalar_at(block.row + t, head), head); });
}

template <int kStates>
struct SumLayout {
  static constexpr int kB = 0;
  static constexpr int kC = kB + kStates / 64 * kTileBlockBytes;
  static constexpr int kStages = kC + kStates / 64 * kTileBlockBytes;
  // Of a stage: what a head brings.
  static constexpr int kX = 0;
  static constexpr int kDy = kTileBlockBytes;
  static constexpr int kStage = 2 * kTileBlockBytes;
  static constexpr int kFactors = kStages + 2 * kStage;  // [heads, 2, 64]
  static constexpr int kBytes = kFactors + kMostHeadsAtOnce * 2 * kChunk * 4;
};

__device__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}

// Four warps for the state and four for its gradient; head by head, the next one's rows on the way.
template <int kStates>
__global__ void __launch_bounds__(kSumThreads, 2)
    chunk_sums(const __grid_constant__ ChunkParams params) {
  using L = SumLayout<kStates>;
  unsigned char* base = shared_memory();
  const std::uint32_t at = shared_address(base);
  auto* factors = reinterpret_cast<float(*)[2][kChunk]>(base + L::kFactors);  // Δ r and e^λ
  const SsdGradients& p = params.p;
  const Block block(params);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const bool of_gradient = warp >= 4;
  const int rows = warp % 4;
  const auto load_head = [&](int h) {
    const int head = block.first_head + h;
    const std::uint32_t stage = at + L::kStages + h % 2 * L::kStage;
    load_x_and_dy(p, block, head, stage + L::kX, stage + L::kDy);
    commit_copies();
  };
  load_b_and_c<kStates>(p, block, at + L::kB, at + L::kC);
  load_head(0);
  for (int h = warp; h < params.heads_at_once; h += kSumThreads / 32) {
    const int head = block.first_head + h;
    const ChunkDecays d = decays_of(p, block, head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factors[h][0][2 * lane + i] = d.step[i] * expf(d.last - d.lambda[i]);
      factors[h][1][2 * lane + i] = expf(d.lambda[i]);
    }
    if (lane == 0) params.decays[p.scalar_at(blockIdx.x, head)] = expf(d.last);
  }
  for (int h = 0; h < params.heads_at_once; ++h) {
    const bool last = h + 1 == params.heads_at_once;
    if (!last) load_head(h + 1);
    last ? wait_copies<0>() : wait_copies<1>();
    __syncthreads();
    const std::uint32_t stage = at + L::kStages + h % 2 * L::kStage;
    const float* factor = factors[h][of_gradient ? 1 : 0];
    float sum[kStates / 8][4];
    clear(sum);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      std::uint32_t a[4];
      load_columns(a, stage + (of_gradient ? L::kDy : L::kX), rows, k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = 16 * k + i / 2 * 8 + 2 * (lane % 4);
        a[i] = scale_pair(a[i], *reinterpret_cast<const float2*>(&factor[t]));
      }
      add_times(sum, a, at + (of_gradient ? L::kC : L::kB), k, 0);
    }
    store_tiles((of_gradient ? params.d_states : params.states) +
                    params.state_at(blockIdx.x, block.first_head + h) + 16 * rows * kStates,
                kStates, sum);
    __syncthreads();  // before the stage is filled again
  }
}

// Of a head, by rows.
struct HeadDecays {
  float lambda[kChunk];
  float into[kChunk];    // e^λ
  float step[kChunk];    // Δ
  float behind[kChunk];  // r
};
// Of a head, by rows, in the parts that warps have.
struct HeadSums {
  // Σ_{s<t} Z_ts by t, Σ_{t>s} Z_ts by s
  float z_rows[kColumnWarps][kChunk], z_columns[kChunk / 16][kChunk];
  float c_dc[kColumnWarps][kChunk], b_db[kColumnWarps][kChunk];  // c · dC′, b · dB′
  float du_x[kColumnWarps][kChunk], dy_x[kColumnWarps][kChunk];
  float s_ds[kThreads / 32];  // ⟨S, dS⟩
};

template <int kStates>
struct Layout {
  static constexpr int kStateTile = kStates / 64 * kTileBlockBytes;
  static constexpr int kB = 0;
  static constexpr int kC = kStateTile;
  static constexpr int kE = 2 * kStateTile;
  static constexpr int kA = kE + kTileBlockBytes;  // G ⊙ L
  static constexpr int kStages = kA + kTileBlockBytes;
  // Of a stage: what a head brings.
  static constexpr int kX = 0;
  static constexpr int kDy = kTileBlockBytes;
  static constexpr int kS = 2 * kTileBlockBytes;
  static constexpr int kDs = kS + kStateTile;
  static constexpr int kStage = kDs + kStateTile;
  static constexpr int kDecays = kStages + 2 * kStage;
  static constexpr int kSums = kDecays + kMostHeadsAtOnce * static_cast<int>(sizeof(HeadDecays));
  static constexpr int kBytes = kSums + 2 * static_cast<int>(sizeof(HeadSums));
};

// x summed over the lanes of a row.
__device__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

template <int kCount>
__device__ float sum_of_parts(const float (&parts)[kCount][kChunk], int row) {
  float sum = 0;
#pragma unroll
  for (const auto& part : parts) sum += part[row];
  return sum;
}

// What a row's tokens leave when all products are done. By one warp, two rows a lane.
__device__ void finish_rows(const SsdGradients& p, const Block& block, int head,
                            const HeadDecays& decays, const HeadSums& sums) {
  const int lane = threadIdx.x % 32;
  float forward[2];   // what later rows carry
  float backward[2];  // what this row and those behind it do
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    forward[i] =
        sum_of_parts(sums.b_db, t) + sum_of_parts(sums.z_columns, t) - sum_of_parts(sums.z_rows, t);
    backward[i] = sum_of_parts(sums.c_dc, t);
  }
  float before = forward[0] + forward[1];
  float behind = backward[0] + backward[1];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float lower = __shfl_up_sync(0xffffffffU, before, offset);
    const float upper = __shfl_down_sync(0xffffffffU, behind, offset);
    if (lane >= offset) before += lower;
    if (lane + offset < 32) behind += upper;
  }
  float through = 0;
#pragma unroll
  for (const float part : sums.s_ds) through += part;
  through *= decays.into[kChunk - 1];
  const float d_log_a[2] = {before - forward[0] - forward[1] + behind,
                            before - forward[1] + behind - backward[0]};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = 2 * lane + i;
    if (t >= block.valid_rows) continue;
    p.finish_token(p.scalar_at(block.row + t, head), head, sum_of_parts(sums.du_x, t),
                   sum_of_parts(sums.dy_x, t), d_log_a[i] + through);
  }
}

// Warp w has rows 16 (w % 4) and up, as t and as s, and quarter w / 4 of the columns.
template <int kStates>
__global__ void __launch_bounds__(kThreads, 1)
    chunk_gradients(const __grid_constant__ ChunkParams params) {
  using L = Layout<kStates>;
  // Of a warp, columns eight at a time: of a state, and of a head or a chunk.
  constexpr int kStateTiles = kStates / 8 / kColumnWarps;
  constexpr int kTiles = kHeadDim / 8 / kColumnWarps;
  static_assert(kHeadDim == kChunk && kStateTiles % 2 == 0 && kTiles % 2 == 0);
  unsigned char* base = shared_memory();
  const std::uint32_t at = shared_address(base);
  auto* all_decays = reinterpret_cast<HeadDecays*>(base + L::kDecays);
  auto* two_sums = reinterpret_cast<HeadSums*>(base + L::kSums);  // of this head and the one before
  const SsdGradients& p = params.p;
  const Block block(params);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const int rows = warp % 4;
  const int quarter = warp / 4;
  const int low = 16 * rows + lane / 4;  // this lane's rows
  const int high = low + 8;
  const int pair = 2 * (lane % 4);  // its columns of a tile of eight

  const auto load_head = [&](int h) {
    const int head = block.first_head + h;
    const std::uint32_t stage = at + L::kStages + h % 2 * L::kStage;
    load_x_and_dy(p, block, head, stage + L::kX, stage + L::kDy);
    const std::ptrdiff_t state = params.state_at(blockIdx.x, head);
    load_tile<kStates / 8>(stage + L::kS, params.states + state, kStates, kHeadDim);
    load_tile<kStates / 8>(stage + L::kDs, params.d_states + state, kStates, kHeadDim);
    commit_copies();
  };
  load_b_and_c<kStates>(p, block, at + L::kB, at + L::kC);
  load_head(0);
  for (int h = warp; h < params.heads_at_once; h += kThreads / 32) {
    const ChunkDecays d = decays_of(p, block, block.first_head + h);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = 2 * lane + i;
      all_decays[h].lambda[t] = d.lambda[i];
      all_decays[h].into[t] = expf(d.lambda[i]);
      all_decays[h].step[t] = d.step[i];
      all_decays[h].behind[t] = expf(d.last - d.lambda[i]);
    }
  }
  float g[kTiles][4];  // C Bᵀ
  float dc[kStateTiles][4];
  float db[kStateTiles][4];
  clear(g);
  clear(dc);
  clear(db);
  for (int h = 0; h < params.heads_at_once; ++h) {
    const int head = block.first_head + h;
    unsigned char* stage = base + L::kStages + h % 2 * L::kStage;
    const std::uint32_t stage_at = shared_address(stage);
    const std::uint32_t x = stage_at + L::kX;
    const std::uint32_t dy = stage_at + L::kDy;
    const HeadDecays& decays = all_decays[h];
    HeadSums& sums = two_sums[h % 2];
    wait_copies<0>();
    __syncthreads();
    if (h + 1 < params.heads_at_once) load_head(h + 1);
    if (warp == h && h > 0) {
      finish_rows(p, block, head - 1, all_decays[h - 1], two_sums[(h - 1) % 2]);
    }
    if (h == 0) {
#pragma unroll
      for (int k = 0; k < kStates / 16; ++k) {
        std::uint32_t a[4];
        load_rows(a, at + L::kC, rows, k);
        add_times_transposed(g, a, at + L::kB, k, kTiles / 2 * quarter);
      }
    }
    {
      float sum = 0;
      for (int i = static_cast<int>(threadIdx.x); i < L::kStateTile / 16; i += kThreads) {
        float s[8];
        float ds[8];
        Eight<bf16> bits;
        bits.load(reinterpret_cast<const bf16*>(stage + L::kS) + 8 * i);
        bits.get(s);
        bits.load(reinterpret_cast<const bf16*>(stage + L::kDs) + 8 * i);
        bits.get(ds);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(s[e], ds[e], sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) sums.s_ds[warp] = sum;
    }
    {  // E, A and the sums of Z
      float w[kTiles][4];
      clear(w);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        std::uint32_t a[4];
        load_rows(a, dy, rows, k);
        add_times_transposed(w, a, x, k, kTiles / 2 * quarter);
      }
      const float lambda_low = decays.lambda[low];
      const float lambda_high = decays.lambda[high];
      float z_low = 0;
      float z_high = 0;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int s = 8 * (kTiles * quarter + j) + pair;
        float e[4];
        float scores[4];
        float z[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = i < 2 ? low : high;
          const int from = s + i % 2;
          // Behind the diagonal the exponent may overflow: it is never used there.
          const float decay =
              from <= t ? __expf((i < 2 ? lambda_low : lambda_high) - decays.lambda[from]) : 0;
          e[i] = w[j][i] * decay * decays.step[from];
          scores[i] = g[j][i] * decay;
          z[i] = from < t ? g[j][i] * e[i] : 0;
        }
        z_low += z[0] + z[1];
        z_high += z[2] + z[3];
        const auto store = [&](int tile, int row, float first, float second) {
          *reinterpret_cast<std::uint32_t*>(base + tile + piece_offset(row, s / 8) + 2 * pair) =
              pack(first, second);
        };
        store(L::kE, low, e[0], e[1]);
        store(L::kE, high, e[2], e[3]);
        store(L::kA, low, scores[0], scores[1]);
        store(L::kA, high, scores[2], scores[3]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float column = z[i] + z[i + 2];
#pragma unroll
          for (int offset = 4; offset < 32; offset *= 2) {
            column += __shfl_xor_sync(0xffffffffU, column, offset);
          }
          if (lane < 4) sums.z_columns[rows][s + i] = column;
        }
      }
      z_low = sum_of_row(z_low);
      z_high = sum_of_row(z_high);
      if (lane % 4 == 0) {
        sums.z_rows[quarter][low] = z_low;
        sums.z_rows[quarter][high] = z_high;
      }
    }
    __syncthreads();

    // dC and dB: first what comes from or goes to other chunks, for its own sums.
    const auto add_outer = [&](float(&sum)[kStateTiles][4], std::uint32_t left, std::uint32_t right,
                               int own, float factor_low, float factor_high, float* dots) {
      float outer[kStateTiles][4];
      clear(outer);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        std::uint32_t a[4];
        load_rows(a, left, rows, k);
        add_times(outer, a, right, k, kStateTiles / 2 * quarter);
      }
      scale_rows(outer, factor_low, factor_high);
      float dot_low = 0;
      float dot_high = 0;
      std::uint32_t with[4];  // two tiles of eight columns
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        if (j % 2 == 0) load_rows(with, at + own, rows, kStateTiles / 2 * quarter + j / 2);
        const float2 with_low = unpack(with[j % 2 * 2]);
        const float2 with_high = unpack(with[j % 2 * 2 + 1]);
        dot_low += outer[j][0] * with_low.x + outer[j][1] * with_low.y;
        dot_high += outer[j][2] * with_high.x + outer[j][3] * with_high.y;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] += outer[j][i];
      }
      dot_low = sum_of_row(dot_low);
      dot_high = sum_of_row(dot_high);
      if (lane % 4 == 0) {
        dots[low] = dot_low;
        dots[high] = dot_high;
      }
    };
    const float step_low = decays.step[low];
    const float step_high = decays.step[high];
    const float behind_low = decays.behind[low];
    const float behind_high = decays.behind[high];
    add_outer(dc, dy, stage_at + L::kS, L::kC, decays.into[low], decays.into[high],
              sums.c_dc[quarter]);
    add_outer(db, x, stage_at + L::kDs, L::kB, step_low * behind_low, step_high * behind_high,
              sums.b_db[quarter]);
    float du[kTiles][4];
    clear(du);
#pragma unroll
    for (int k = 0; k < kStates / 16; ++k) {
      std::uint32_t a[4];
      load_rows(a, at + L::kB, rows, k);
      add_times_transposed(du, a, stage_at + L::kDs, k, kTiles / 2 * quarter);
    }
    scale_rows(du, behind_low, behind_high);
    // E and A are zero above the diagonal.
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      std::uint32_t a[4];
      if (k <= rows) {
        load_rows(a, at + L::kE, rows, k);
        add_times(dc, a, at + L::kB, k, kStateTiles / 2 * quarter);
      }
      if (k >= rows) {
        load_columns(a, at + L::kE, rows, k);
        add_times(db, a, at + L::kC, k, kStateTiles / 2 * quarter);
        load_columns(a, at + L::kA, rows, k);
        add_times(du, a, dy, k, kTiles / 2 * quarter);
      }
    }
    {  // dX
      const float skip = p.d[head];
      float du_x[2] = {};
      float dy_x[2] = {};
      bf16* to =
          static_cast<bf16*>(p.dxbc.data) + p.x_at(block.row, head, 8 * kTiles * quarter + pair);
      std::uint32_t own_pairs[4];  // two tiles of eight columns
      std::uint32_t d_pairs[4];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j % 2 == 0) {
          load_rows(own_pairs, x, rows, kTiles / 2 * quarter + j / 2);
          load_rows(d_pairs, dy, rows, kTiles / 2 * quarter + j / 2);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = i == 0 ? low : high;
          const float step = i == 0 ? step_low : step_high;
          const float2 own = unpack(own_pairs[j % 2 * 2 + i]);
          const float2 d = unpack(d_pairs[j % 2 * 2 + i]);
          const float first = du[j][2 * i];
          const float second = du[j][2 * i + 1];
          du_x[i] += first * own.x + second * own.y;
          dy_x[i] += d.x * own.x + d.y * own.y;
          if (row < block.valid_rows) {
            store_pair(to + row * p.row_size() + 8 * j, step * first + skip * d.x,
                       step * second + skip * d.y);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = i == 0 ? low : high;
        const float from_state = sum_of_row(du_x[i]);
        const float from_skip = sum_of_row(dy_x[i]);
        if (lane % 4 == 0) {
          sums.du_x[quarter][row] = from_state;
          sums.dy_x[quarter][row] = from_skip;
        }
      }
    }
  }
  __syncthreads();
  if (warp == 0) {
    const int last = params.heads_at_once - 1;
    finish_rows(p, block, block.first_head + last, all_decays[last], two_sums[last % 2]);
  }
  const auto store_share = [&](const float(&sum)[kStateTiles][4], float* shares) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = i == 0 ? low : high;
      if (row >= block.valid_rows) continue;
      float* to = shares + ((block.row + row) * p.shares + blockIdx.y) * kStates +
                  8 * kStateTiles * quarter + pair;
#pragma unroll
      for (int j = 0; j < kStateTiles; ++j) {
        *reinterpret_cast<float2*>(to + 8 * j) = make_float2(sum[j][2 * i], sum[j][2 * i + 1]);
      }
    }
  };
  store_share(dc, p.dc);
  store_share(db, p.db);
}

template <int kStates>
void launch(const ChunkParams& params, cudaStream_t stream) {
  const SsdGradients& p = params.p;
  const dim3 grid(static_cast<unsigned>(params.batch.blocks), static_cast<unsigned>(p.shares));
  const auto run = [&](auto kernel, int threads, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cudaFuncSetAttribute");
    kernel<<<grid, static_cast<unsigned>(threads), static_cast<std::size_t>(bytes), stream>>>(
        params);
    check_launch(kOp);
  };
  run(chunk_sums<kStates>, kSumThreads, SumLayout<kStates>::kBytes);
  launch_chunk_states(kOp,
                      {.states = params.states,
                       .d_states = params.d_states,
                       .decays = params.decays,
                       .heads = p.heads,
                       .size = kHeadDim * kStates,
                       .alike = kHeadDim * kStates,
                       .batch = params.batch},
                      stream);
  run(chunk_gradients<kStates>, kThreads, Layout<kStates>::kBytes);
}

}  // namespace

int ssd_heads_at_once(int heads_of_group) {
  int heads = std::min(heads_of_group, kMostHeadsAtOnce);
  while (heads_of_group % heads != 0) --heads;
  return heads;
}

bool ssd_backward_chunks_fit(const SsdGradients& p) {
  const int shared = most_shared_bytes();
  return p.xbc.is_bf16 && p.dy.is_bf16 && p.dxbc.is_bf16 && p.xbc.aligned() && p.dy.aligned() &&
         p.dxbc.aligned() && p.head_dim == kHeadDim &&
         ((p.state_size == 64 && shared >= Layout<64>::kBytes) ||
          (p.state_size == 128 && shared >= Layout<128>::kBytes));
}

void ssd_backward_chunks(Context& ctx, const SsdGradients& p, const Sequences& sequences) {
  for_each_batch(
      sequences, {}, [](int length) { return (length + kChunk - 1) / kChunk; },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        const std::int64_t heads = std::int64_t{batch.blocks} * p.heads;
        const auto states = [&] {
          return static_cast<bf16*>(
              scratch.tensor({heads, kHeadDim, p.state_size}, DType::kBF16).data);
        };
        const ChunkParams params{.p = p,
                                 .states = states(),
                                 .d_states = states(),
                                 .decays = scratch.tensor({heads}).f32(),
                                 .heads_at_once = p.heads / p.shares,
                                 .batch = batch};
        p.state_size == 64 ? launch<64>(params, stream_of(ctx))
                           : launch<128>(params, stream_of(ctx));
      });
}

}  // namespace deltafox::cuda
