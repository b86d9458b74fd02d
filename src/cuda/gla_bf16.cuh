// Gated linear attention and its gradients (the equations are in ops/gla.h) in chunks of 64 rows
// on the tensor cores, for K = V = 128: what the kernels share. S is the state before a chunk, dS
// the gradient of the state behind it; both are kept in bfloat16, as products read them.
//
// A chunk has four parts of 16 rows. With G_J the product of a part's gates, β_t that of the gates
// from the start of t's part to t, ε_s that of the gates behind s to the end of its part,
//   q̃_t = q_t ⊙ β_t,  k̃_s = k_s ⊙ ε_s
// meet, for t in part I and s in part J < I, as Σ q̃_t k̃_s Π_{J<B<I} G_B. All factors are products
// of gates, taken factor by factor: none exceeds 1, none is a quotient, and gates may be zero.
#pragma once

#include "core/context.h"
#include "cuda/chunk.cuh"
#include "cuda/chunk_states.cuh"
#include "cuda/decayed_kernels.h"
#include "cuda/lane_sums.cuh"
#include "cuda/warp_tiles.cuh"

namespace deltafox::cuda::gla_bf16 {

constexpr int kChunk = kGlaBf16Chunk;
static_assert(kChunk == kTileRows);
constexpr int kSize = 128;  // K and V
constexpr int kPart = 16;
constexpr int kParts = kChunk / kPart;
constexpr int kThreads = 256;  // two warps a part; two channels of 16 rows a thread
constexpr int kTileBytes = kSize / 64 * kTileBlockBytes;

struct Params {
  const bf16* q;    // [T, H, K]
  const float* k;   // [T, H, K]
  const float* g;   // [T, H, K]
  const bf16* v;    // [T, H, V]
  const bf16* d_o;  // [T, H, V]; for gradients
  bf16* columns;    // [T, H, V], o or dv
  bf16* dq;         // [T, H, K]
  float* dk;        // [T, H, K]
  float* dg;        // [T, H, K]
  int heads;
  float scale;  // 1 / √K
  ChunkStates states;
  float* decays;  // [chunks, H, K], of whole chunks

  __device__ std::ptrdiff_t row_size() const { return static_cast<std::ptrdiff_t>(heads) * kSize; }
  __device__ std::ptrdiff_t state_at(int chunk, int head) const {
    return (static_cast<std::ptrdiff_t>(chunk) * heads + head) * kSize * kSize;
  }
};

// A block is a head of a chunk.
struct Block {
  Chunk chunk;
  int head;
  std::ptrdiff_t first;  // of the chunk's first row

  __device__ explicit Block(const Params& p)
      : chunk(p.states.batch, static_cast<int>(blockIdx.x), kChunk),
        head(static_cast<int>(blockIdx.y)),
        first(chunk.begin * p.row_size() + head * kSize) {}
};

__device__ inline float2 times(float2 a, float2 b) {
  return make_float2(a.x * b.x, a.y * b.y);
}

// Two neighbouring channels of a part's rows. Where there are no rows nothing comes and nothing
// decays.
struct PartRows {
  int part;
  int channel;
  float2 k[kPart];
  float2 g[kPart];
  std::uint32_t q[kPart];  // pairs of bfloat16

  __device__ PartRows(const Params& p, const Block& block)
      : part(static_cast<int>(threadIdx.x) / (kSize / 2)),
        channel(static_cast<int>(threadIdx.x) % (kSize / 2) * 2) {
#pragma unroll
    for (int r = 0; r < kPart; ++r) {
      const int t = part * kPart + r;
      const bool exists = t < block.chunk.tokens;
      const std::ptrdiff_t at = block.first + t * p.row_size() + channel;
      k[r] = exists ? *reinterpret_cast<const float2*>(p.k + at) : make_float2(0, 0);
      g[r] = exists ? *reinterpret_cast<const float2*>(p.g + at) : make_float2(1, 1);
      q[r] = exists ? *reinterpret_cast<const std::uint32_t*>(p.q + at) : 0;
    }
  }
  __device__ float2 query(int r) const {
    return unpack(q[r]);
  }
  __device__ void store(unsigned char* tile, int r, float2 x) const {
    *reinterpret_cast<std::uint32_t*>(tile + piece_offset(part * kPart + r, channel / 8) +
                                      channel % 8 * 2) = pack(x.x, x.y);
  }
  // q times `decay` and the gates up to it; returns what `decay` has become.
  __device__ float2 store_queries(unsigned char* tile, float2 decay) const {
#pragma unroll
    for (int r = 0; r < kPart; ++r) {
      decay = times(decay, g[r]);
      store(tile, r, times(query(r), decay));
    }
    return decay;
  }
  // k times the gates behind it and `decay`.
  __device__ void store_keys(unsigned char* tile, float2 decay) const {
#pragma unroll
    for (int r = kPart - 1; r >= 0; --r) {
      store(tile, r, times(k[r], decay));
      decay = times(decay, g[r]);
    }
  }
  // As rows meet in the middle of every 2h: those behind it are queries decayed from there on,
  // those before it keys decayed up to there.
  __device__ void store_halves(unsigned char* tile, int h) const {
    const float2 one = make_float2(1, 1);
    float2 decay = one;
#pragma unroll
    for (int r = 0; r < kPart; ++r) {
      if ((r & h) == 0) continue;
      decay = (r & (h - 1)) == 0 ? g[r] : times(decay, g[r]);
      store(tile, r, times(query(r), decay));
    }
#pragma unroll
    for (int r = kPart - 1; r >= 0; --r) {
      if ((r & h) != 0) continue;
      if ((r & (h - 1)) == h - 1) decay = one;
      store(tile, r, times(k[r], decay));
      decay = times(decay, g[r]);
    }
  }
};

using PartDecays = float[kParts][kSize];  // G

// The product of G over parts begin to end − 1 for two neighbouring channels.
__device__ inline float2 decay_over(const PartDecays& decays, int begin, int end, int channel) {
  float2 decay = make_float2(1, 1);
  for (int part = begin; part < end; ++part) {
    const float2 own = *reinterpret_cast<const float2*>(&decays[part][channel]);
    decay = times(decay, own);
  }
  return decay;
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}

// Among the two warps of a part.
__device__ inline void part_sync(int part) {
  asm volatile("bar.sync %0, 64;" ::"r"(part + 1) : "memory");
}

struct SumLayout {
  static constexpr int kKeys = 0;
  static constexpr int kQueries = kKeys + kTileBytes;
  static constexpr int kValues = kQueries + kTileBytes;
  static constexpr int kDo = kValues + kTileBytes;
  static constexpr int kDecays = kDo + kTileBytes;
  static constexpr int kBytes = kDecays + static_cast<int>(sizeof(PartDecays));
};

// What a chunk adds to the state, Σ_s (k_s ⊙ gates behind s) v_sᵀ, and to its gradient,
// Σ_t (q_t ⊙ gates up to t) do_tᵀ. Warp w has channels 16w to 16w + 15.
template <bool kGradients>
__global__ void __launch_bounds__(kThreads, 2) chunk_sums(const __grid_constant__ Params p) {
  using L = SumLayout;
  unsigned char* base = shared_memory();
  const std::uint32_t at = shared_address(base);
  auto& decays = *reinterpret_cast<PartDecays*>(base + L::kDecays);
  const Block block(p);
  load_tile<kSize / 8>(at + L::kValues, p.v + block.first, p.row_size(), block.chunk.tokens);
  if (kGradients) {
    load_tile<kSize / 8>(at + L::kDo, p.d_o + block.first, p.row_size(), block.chunk.tokens);
  }
  commit_copies();
  {
    const PartRows rows(p, block);
    float2 own = make_float2(1, 1);
#pragma unroll
    for (const float2& g : rows.g) own = times(own, g);
    *reinterpret_cast<float2*>(&decays[rows.part][rows.channel]) = own;
    __syncthreads();
    const float2 behind = decay_over(decays, rows.part + 1, kParts, rows.channel);
    rows.store_keys(base + L::kKeys, behind);
    if (kGradients) {
      rows.store_queries(base + L::kQueries, decay_over(decays, 0, rows.part, rows.channel));
    }
    if (rows.part == 0) {
      *reinterpret_cast<float2*>(
          p.decays + (static_cast<std::ptrdiff_t>(blockIdx.x) * p.heads + block.head) * kSize +
          rows.channel) = times(own, behind);
    }
  }
  wait_copies<0>();
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const auto add_up = [&](int left, int right, bf16* to) {
    float sum[kSize / 8][4];
    clear(sum);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      std::uint32_t a[4];
      load_columns(a, at + left, warp, part);
      add_times(sum, a, at + right, part, 0);
    }
    store_tiles(to + p.state_at(blockIdx.x, block.head) + 16 * warp * kSize, kSize, sum);
  };
  add_up(L::kKeys, L::kValues, p.states.states);
  if (kGradients) add_up(L::kQueries, L::kDo, p.states.d_states);
}

struct ColumnLayout {
  static constexpr int kQueries = 0;
  static constexpr int kKeys = kQueries + kTileBytes;
  static constexpr int kLevel = kKeys + kTileBytes;
  static constexpr int kValues = kLevel + kTileBytes;
  static constexpr int kState = kValues + kTileBytes;  // [128, 128], two tiles
  static constexpr int kScores = kState + 2 * kTileBytes;
  static constexpr int kDecays = kScores + kTileBlockBytes;
  static constexpr int kDots = kDecays + static_cast<int>(sizeof(PartDecays));  // [2, 64]
  static constexpr int kBytes = kDots + 2 * kChunk * 4;
};

// o, or dv:
//   o_t = Sᵀ (q_t ⊙ gates up to t) + Σ_{s≤t} A_ts v_s,
//   dv_s = dSᵀ (k_s ⊙ gates behind s) + Σ_{t≥s} A_ts do_t,  A_ts = Σ_i q_ti k_si Π_{s<r≤t} g_ri.
// The two warps of part I have its rows, as t or as s, and 64 columns each. Within a part, rows
// whose numbers differ in bit h first meet in the middle of their 2h rows: a row with the bit is
// its query there, decayed from the middle on, one without is its key, decayed up to the middle.
template <bool kForwards>
__global__ void __launch_bounds__(kThreads, 2) chunk_columns(const __grid_constant__ Params p) {
  using L = ColumnLayout;
  unsigned char* base = shared_memory();
  const std::uint32_t at = shared_address(base);
  auto& decays = *reinterpret_cast<PartDecays*>(base + L::kDecays);
  auto& dots = *reinterpret_cast<float(*)[2][kChunk]>(base + L::kDots);  // q_t · k_t, in halves
  const Block block(p);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  const int part = warp / 2;
  const int half = warp % 2;
  const bf16* values = kForwards ? p.v : p.d_o;
  load_tile<kSize / 8>(at + L::kValues, values + block.first, p.row_size(), block.chunk.tokens);
  const bf16* state =
      (kForwards ? p.states.states : p.states.d_states) + p.state_at(blockIdx.x, block.head);
  for (int i = 0; i < 2; ++i) {
    load_tile<kSize / 8>(at + L::kState + i * kTileBytes, state + i * kTileRows * kSize, kSize,
                         kTileRows);
  }
  commit_copies();

  float scores[4] = {};  // rows lane / 4 and 8 more, columns 8·half + 2 (lane % 4) and 1 more
  {
    const PartRows rows(p, block);
    const float2 one = make_float2(1, 1);
    *reinterpret_cast<float2*>(&decays[part][rows.channel]) =
        rows.store_queries(base + L::kQueries, one);
    rows.store_keys(base + L::kKeys, one);
    float dot[kPart];
#pragma unroll
    for (int r = 0; r < kPart; ++r) {
      const float2 q = rows.query(r);
      dot[r] = q.x * rows.k[r].x + q.y * rows.k[r].y;
    }
    lane_sums<16, 2>(dot);
    dot[0] += __shfl_xor_sync(0xffffffffU, dot[0], 1);
    if (lane % 2 == 0) dots[half][part * kPart + lane_share<16, 2>()] = dot[0];
    const int low = lane / 4;
    const int first = 8 * half + 2 * (lane % 4);
#pragma unroll 1
    for (int h = kPart / 2; h > 0; h /= 2) {
      rows.store_halves(base + L::kLevel, h);
      part_sync(part);
      float met[1][4];
      clear(met);
#pragma unroll
      for (int k = 0; k < kSize / 32; ++k) {
        std::uint32_t b[4];
        load_matrices(
            b, at + L::kLevel + piece_offset(part * kPart + 8 * half + lane % 8, 4 * k + lane / 8));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          std::uint32_t a[4];
          load_rows(a, at + L::kLevel, part, 2 * k + i);
          mma_bf16(met[0], a, b[2 * i], b[2 * i + 1]);
        }
      }
      part_sync(part);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = low + i / 2 * 8;
        const int other = first + i % 2;
        const int later = kForwards ? own : other;
        const bool meets = (own ^ other) >= h && (own ^ other) < 2 * h && (later & h) != 0;
        if (meets) scores[i] = met[0][i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = low + i / 2 * 8;
      if (own == first + i % 2)
        scores[i] = dots[0][part * kPart + own] + dots[1][part * kPart + own];
    }
  }
  const auto store_scores = [&](int other_part, const float(&x)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<std::uint32_t*>(
          base + L::kScores + piece_offset(part * kPart + lane / 4 + 8 * i, 2 * other_part + half) +
          lane % 4 * 4) = pack(x[2 * i], x[2 * i + 1]);
    }
  };
  store_scores(part, scores);
  wait_copies<0>();
  __syncthreads();

  constexpr int kOwn = kForwards ? L::kQueries : L::kKeys;
  constexpr int kOthers = kForwards ? L::kKeys : L::kQueries;
  std::uint32_t own[kSize / 16][4];
  // This part's rows, decayed over `distance` parts.
  const auto load_own = [&](int distance) {
    const int begin = kForwards ? part - distance : part + 1;
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      load_rows(own[k], at + kOwn, part, k);
      if (distance == 0) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 decay =
            decay_over(decays, begin, begin + distance, 16 * k + 8 * i + 2 * (lane % 4));
        own[k][2 * i] = scale_pair(own[k][2 * i], decay);
        own[k][2 * i + 1] = scale_pair(own[k][2 * i + 1], decay);
      }
    }
  };
  const int others = kForwards ? part : kParts - 1 - part;  // parts to meet
  for (int distance = 0; distance < others; ++distance) {
    const int other = kForwards ? part - 1 - distance : part + 1 + distance;
    load_own(distance);
    float met[1][4];
    clear(met);
#pragma unroll
    for (int k = 0; k < kSize / 32; ++k) {
      std::uint32_t b[4];
      load_matrices(
          b, at + kOthers + piece_offset(other * kPart + 8 * half + lane % 8, 4 * k + lane / 8));
      mma_bf16(met[0], own[2 * k], b[0], b[1]);
      mma_bf16(met[0], own[2 * k + 1], b[2], b[3]);
    }
    store_scores(other, met[0]);
  }
  load_own(others);
  part_sync(part);
  float out[8][4];
  clear(out);
#pragma unroll
  for (int k = 0; k < kSize / 16; ++k) {
    add_times(out, own[k], at + L::kState + k / 4 * kTileBytes, k % 4, 4 * half);
  }
  const int first_part = kForwards ? 0 : part;
  for (int other = first_part; other <= first_part + others; ++other) {
    std::uint32_t a[4];
    load_rows(a, at + L::kScores, part, other);
    add_times(out, a, at + L::kValues, other, 4 * half);
  }
  // Through this warp's place in the tile that all of its part have read, to whole rows of 128
  // bytes.
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<std::uint32_t*>(
          base + kOwn + piece_offset(part * kPart + lane / 4 + 8 * i, 8 * half + j) +
          lane % 4 * 4) = pack(p.scale * out[j][2 * i], p.scale * out[j][2 * i + 1]);
    }
  }
  __syncwarp();
  bf16* to = p.columns + block.first + 64 * half + lane % 8 * 8;
#pragma unroll
  for (int i = 0; i < kPart / 4; ++i) {
    const int row = part * kPart + 4 * i + lane / 8;
    if (row >= block.chunk.tokens) continue;
    *reinterpret_cast<uint4*>(to + row * p.row_size()) =
        *reinterpret_cast<const uint4*>(base + kOwn + piece_offset(row, 8 * half + lane % 8));
  }
}

// A block for each head of each chunk.
inline void launch(const char* op, const Params& p, void (*kernel)(Params), int bytes,
                   cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  const dim3 grid(static_cast<unsigned>(p.states.batch.blocks), static_cast<unsigned>(p.heads));
  kernel<<<grid, kThreads, static_cast<std::size_t>(bytes), stream>>>(p);
  check_launch(op);
}

// With room for the states of a batch's chunks, and of their gradients.
inline Params with_states(ScratchScope& scratch, Params p, const SequenceBatch& batch,
                          bool gradients) {
  const std::int64_t heads = std::int64_t{batch.blocks} * p.heads;
  const auto states = [&] {
    return static_cast<bf16*>(scratch.tensor({heads, kSize, kSize}, DType::kBF16).data);
  };
  p.decays = scratch.tensor({heads, kSize}).f32();
  p.states = {.states = states(),
              .d_states = gradients ? states() : nullptr,
              .decays = p.decays,
              .heads = p.heads,
              .size = kSize * kSize,
              .alike = kSize,
              .batch = batch};
  return p;
}

}  // namespace deltafox::cuda::gla_bf16
