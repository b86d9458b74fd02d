// The delta rule of few chunks on sm_90 (the equations are in ops/delta_rule.h;
// delta_rule_chunks.cu is the way of many). There a block prepares the chunks that it walks; here
// all chunks are prepared at once, so that nothing is left on the way from one state to the next
// but two products:
//   prepare  a block for each chunk and head: T = (I + diag(β) G)⁻¹ diag(β), A = tril(Q Kᵀ),
//            W = T K, U₀ = T V. With kInputs it computes q, k and v of its rows before, and its
//            first blocks β, as delta_inputs does (delta_inputs.cuh): the same bits
//   scan     a block for 64 value columns of each head: U = U₀ − W S, S ← S + Kᵀ U, chunk by chunk
//   outputs  a block for each chunk and head: O = (Q S + A U) / √K, and its norm
// Between kernels U₀, U and S lie as the registers of those that read them want them, tiles as
// shared memory does, so that all of it is copied in whole vectors.
//
// Where there are more chunks than blocks at once, the three run beside each other (kBeside): a
// kernel starts once all blocks of the one before have, and what a block needs of a chunk it waits
// for at the chunk's counter. So nobody waits for a block that may still have to wait for room.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/quantized.h"
#include "cuda/delta_inputs.cuh"
#include "cuda/delta_rule_chunks.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm90.cuh"

namespace deltafox::cuda {
namespace {

using Products = GroupProducts;

constexpr int kDim = 128;  // K and V
constexpr int kTile = 2 * kTileBlockBytes;
constexpr int kThreads = 256;
constexpr int kStages = 4;
template <bool kBeside>  // a group for the state, warps for copies
constexpr int kScanThreads = 128 + 32 * (kBeside ? kStages : 1);

// What `prepare` leaves of a chunk and head: −W, K and A.
constexpr int kPairBytes = 2 * kTile;
constexpr int kImageBytes = kPairBytes + kTileBlockBytes;
// What `scan` reads and leaves of a chunk and 64 value columns, each vector of 16 bytes a thread's:
// first U₀ᵀ in float32, then in its place Sᵀ before the chunk in bfloat16, and Uᵀ behind it.
constexpr int kStateVectors = 8 * 128;
constexpr int kHalfVectors = kStateVectors + 4 * 128;
// A stage of `scan`: −W, K and the above.
constexpr int kStageBytes = kPairBytes + 16 * kHalfVectors;

struct ScanParams {
  DeltaRuleProblem problem;
  uint4* images;            // [chunks, H, kImageBytes / 16]
  uint4* halves;            // [chunks, H, 2, kHalfVectors]
  std::int32_t* done;       // [chunks, H]: zeros before and behind; or null
  std::int32_t* beta_done;  // [beta_jobs]: the same, of kBetaRows rows each
  int beta_jobs;
  float scale;
  SequenceBatch batch;
};

// What `prepare` reads instead of q, k and v.
struct InputParams {
  static constexpr int kLimit = 8;
  const bf16* projected;  // [T, 3·H·K]
  const float* conv[3];   // [H·K, 4]
  bf16* q;                // [T, H, K], for `outputs`
  BetaParams beta;
  int tokens;
  const unsigned char* next;  // weights that come next, for the second-level cache
  std::int64_t next_bytes;
  float* states[kLimit][3];  // [H·K, 4] of each sequence
};

// A chunk of a sequence.
struct Chunk {
  const BatchEntry& entry;
  int first;  // its first row, of the sequence's
  int begin;  // and of all
  int rows;
  int slot;   // among those of all sequences and heads
  bool last;  // of its sequence

  __device__ Chunk(const ScanParams& p, int index, int head)
      : entry(find_entry(p.batch, &BatchEntry::first_chunk, index)) {
    first = (index - entry.first_chunk) * kChunk;
    begin = entry.begin + first;
    rows = min(kChunk, entry.length - first);
    slot = index * p.problem.heads + head;
    last = first + kChunk >= entry.length;
  }
  __device__ std::ptrdiff_t element(const ScanParams& p, int head) const {
    return (static_cast<std::ptrdiff_t>(begin) * p.problem.heads + head) * kDim;
  }
};

// What belongs to a chunk, a head and half of its value columns.
__device__ inline uint4* half_of(const ScanParams& p, std::ptrdiff_t slot, int half) {
  return p.halves + (2 * slot + half) * kHalfVectors;
}

// Of a chunk's counter: `prepare` adds one, each half of `scan` one more.
constexpr int kPrepared = 1;
constexpr int kScanned = 3;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// All copies, to and from memory too, see what this thread has seen, and the other way round.
__device__ inline void fence_all_copies() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// What this thread has written or seen is there for those who wait for the counter.
__device__ inline void signal(std::int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_for(const std::int32_t* counter, int count) {
  std::int32_t now;
  while (true) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    if (now >= count) return;
    __nanosleep(40);
  }
}
#endif

// The taps of this thread's channels, of those of a head.
__device__ inline void load_taps(float (&w)[kConvChannels][kConvWidth], const float* taps) {
  taps += static_cast<int>(threadIdx.x) % 16 * kConvChannels * kConvWidth;
#pragma unroll
  for (int c = 0; c < kConvChannels; ++c) load_four(w[c], taps + c * kConvWidth, kVector);
  scale_taps<bf16>(w);
}

// A thread's rows of eight channels of a chunk's q, k or v: the first are asked for when it is
// made.
struct RowWalk {
  static constexpr int kRows = kChunk / 8;
  int piece;
  int begin;
  int rows;  // of the chunk
  std::ptrdiff_t stride;
  const bf16* x;
  bool from_state;
  Eight<bf16> next[kConvWidth];
  Eight<bf16> before[kConvWidth];
  float window[kConvWidth][kConvChannels];

  __device__ RowWalk(const InputParams& in, const ScanParams& p, const Chunk& chunk, int part,
                     int head)
      : piece(static_cast<int>(threadIdx.x) % 16),
        begin(static_cast<int>(threadIdx.x) % 128 / 16 * kRows),
        rows(chunk.rows),
        stride(3 * std::ptrdiff_t{kDim} * p.problem.heads),
        from_state(chunk.first + begin == 0) {
    const int channel = head * kDim + piece * kConvChannels;
    x = in.projected + chunk.begin * stride + part * (p.problem.heads * kDim) + channel;
    load(begin);
    if (from_state) {
      float* state = in.states[&chunk.entry - p.batch.entries][part];
      replace_conv_state(window, state + channel * kConvWidth, x, stride, chunk.entry.length, true);
    } else {
#pragma unroll
      for (int i = 1; i < kConvWidth; ++i) {
        before[i].load(x + min(begin - kConvWidth + i, rows - 1) * stride);
      }
    }
  }
  __device__ void load(int t) {
#pragma unroll
    for (int r = 0; r < kConvWidth; ++r) next[r].load(x + min(t + r, rows - 1) * stride);
  }

  // To a tile, zeros behind the last row; and with `out`, the chunk's first of this thread's
  // elements in memory, there.
  template <bool kNormed>
  __device__ void convolve(const float (&w)[kConvChannels][kConvWidth], unsigned char* tile,
                           bf16* out, int out_stride) {
    if (!from_state) {
#pragma unroll
      for (int i = 1; i < kConvWidth; ++i) before[i].get(window[i]);
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < kRows; t += kConvWidth) {
      Eight<bf16> now[kConvWidth];
#pragma unroll
      for (int r = 0; r < kConvWidth; ++r) now[r] = next[r];
      if (t + kConvWidth < kRows) load(begin + t + kConvWidth);
#pragma unroll
      for (int first = 0; first < kConvWidth; first += kAtOnce) {
        float y[kAtOnce][kConvChannels];
        convolve_rows<bf16>(y, now, first, window, w, kNormed ? kDim / kConvChannels : 0);
#pragma unroll
        for (int a = 0; a < kAtOnce; ++a) {
          const int row = begin + t + first + a;
          Eight<bf16> rounded;
          rounded.set(y[a]);
          if (row >= rows) rounded.pairs = make_uint4(0, 0, 0, 0);
          *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = rounded.pairs;
          if (out != nullptr && row < rows) {
            *reinterpret_cast<uint4*>(out + row * out_stride) = rounded.pairs;
          }
        }
      }
    }
  }
};

struct PrepareLayout {
  static constexpr int kW = 0;
  static constexpr int kK = kW + kTile;
  static constexpr int kA = kK + kTile;
  static constexpr int kT = kA + kTileBlockBytes;
  static constexpr int kQ = kT + kTileBlockBytes;
  static constexpr int kV = kQ + kTile;
  static constexpr int kBeta = kV + kTile;
  static constexpr int kInverse = kBeta + kChunk * 4;
  static constexpr int kBytes = kInverse + 10 * kInverseBlock * 4 + 1024;  // and to align
};
static_assert(PrepareLayout::kW == 0 && PrepareLayout::kA + kTileBlockBytes == kImageBytes);

__device__ inline unsigned char* aligned(unsigned char* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

template <bool kBeside, bool kInputs>
__global__ void __launch_bounds__(kThreads, 2)
    delta_rule_prepare(const __grid_constant__ ScanParams p,
                       const __grid_constant__ InputParams in) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere it is never launched
  using L = PrepareLayout;
  extern __shared__ unsigned char memory[];
  unsigned char* base = aligned(memory);
  const std::uint32_t tiles = shared_address(base);
  auto* beta = reinterpret_cast<float*>(base + L::kBeta);
  auto* blocks = reinterpret_cast<float*>(base + L::kInverse);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = uniform(thread / 128);
  const int warp = uniform(thread / 32 % 4);
  const int lane = thread % 32;
  const int head = static_cast<int>(blockIdx.x);
  // The first blocks have rows of β.
  const int beta_rows_of_grid = kInputs ? static_cast<int>(gridDim.y) - p.batch.chunks : 0;
  if (kInputs && static_cast<int>(blockIdx.y) < beta_rows_of_grid) {
    const int job = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
    wait_for_input();
    if (job < p.beta_jobs) {
      const int row = job * kBetaRows;
      beta_rows<kThreads / 32>(in.beta, row, min(kBetaRows, in.tokens - row),
                               *reinterpret_cast<BetaSums*>(base));
      __syncthreads();
      if (thread == 0) signal(p.beta_done + job);
    }
    constexpr std::int64_t kLine = 128;
    const std::int64_t threads = std::int64_t{kThreads} * beta_rows_of_grid * gridDim.x;
    for (std::int64_t at = kLine * (job * kThreads + thread); at < in.next_bytes;
         at += kLine * threads) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(in.next + at));
    }
    return;
  }
  const Chunk chunk(p, static_cast<int>(blockIdx.y) - beta_rows_of_grid, head);
  const int stride = p.problem.heads * kDim;
  const std::ptrdiff_t at = chunk.element(p, head);
  uint4* const image = p.images + chunk.slot * std::ptrdiff_t{kImageBytes / 16};

  // What lies above the diagonal of A and T stays zero.
  for (int i = thread; i < 2 * kTileBlockBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(base + L::kA)[i] = make_uint4(0, 0, 0, 0);
  }
  if constexpr (kInputs) {
    const int part = group == 0 ? 1 : 0;
    float w[kConvChannels][kConvWidth];
    load_taps(w, in.conv[part] + head * kDim * kConvWidth);
    // Those of v where W will be.
    if (group == 1) {
      copy_piece_async(tiles + L::kW + thread % 128 * 16,
                       in.conv[2] + (head * kDim + thread % 128) * kConvWidth, true);
    }
    commit_copies();
    wait_for_input();
    RowWalk walk(in, p, chunk, part, head);
    bf16* const out = group == 0 ? nullptr : in.q + at + walk.piece * kConvChannels;
    walk.convolve<true>(w, base + (group == 0 ? L::kK : L::kQ), out, stride);
    wait_copies<0>();
  } else {
    wait_for_input();
    const bf16* const rows = static_cast<const bf16*>(group == 0 ? p.problem.k : p.problem.q) + at;
    load_tile<16>(tiles + (group == 0 ? L::kK : L::kQ), rows, stride, kDim, chunk.rows,
                  thread % 128);
    if (thread < kChunk) {
      const auto* from = static_cast<const float*>(p.problem.beta);
      const std::uint32_t to = tiles + L::kBeta + 4 * thread;
      if (from == nullptr) {
        beta[thread] = 1;
      } else {
        const bool valid = thread < chunk.rows;
        from += static_cast<std::ptrdiff_t>(chunk.begin) * p.problem.heads + head;
        copy_word_async(to, valid ? from + thread * p.problem.heads : from, valid);
      }
    }
    commit_copies();
    load_tile<16, kChunk / 2>(
        tiles + L::kV + group * (kChunk / 2) * 128,
        static_cast<const bf16*>(p.problem.v) + at + group * (kChunk / 2) * std::ptrdiff_t{stride},
        stride, kDim, chunk.rows - group * (kChunk / 2), thread % 128);
    commit_copies();
    wait_copies<1>();
  }
  Products::publish();
  __syncthreads();

  float g[8][4];
  Products::begin(g);
  Products::tiles_transposed<kDim / 16>(g, tiles + (group == 0 ? L::kK : L::kQ), tiles + L::kK);
  Products::commit();
  if (group == 0) {
    if constexpr (kInputs) {
      if (thread < kChunk) {
        const bool valid = thread < chunk.rows;
        const int row = chunk.begin + thread;
        if (valid) wait_for(p.beta_done + row / kBetaRows, 1);
        beta[thread] = valid ? in.beta.beta[row * p.problem.heads + head] : 0;
      }
      group_sync(1);
    }
    Products::wait<0>();
    Products::end(g);
    store_scaled_products(g, beta, blocks, lane, warp);
    invert_diagonal(inverse_block(blocks, warp, warp), lane % 16);
    group_sync(1);
    finish_inverse(blocks, beta, base + L::kT, lane, warp);
  } else {
    const auto store_a = [&] {
      Products::wait<0>();
      Products::end(g);
      store_lower(g, base + L::kA, lane, warp);
      Products::publish();
      group_sync(2);
      if (thread == 128) {
        sm90::store_bulk(image + L::kK / 16, base + L::kK, kImageBytes - L::kK);
      }
    };
    if constexpr (kInputs) {
      RowWalk walk(in, p, chunk, 2, head);
      store_a();
      float w[kConvChannels][kConvWidth];
      load_taps(w, reinterpret_cast<const float*>(base + L::kW));
      walk.convolve<false>(w, base + L::kV, nullptr, 0);
    } else {
      store_a();
    }
  }
  wait_copies<0>();
  Products::publish();
  __syncthreads();

  float u[8][4];
  float w[8][4];
  std::uint32_t fu[4][4];
  std::uint32_t fw[4][4];
  load_negated_columns(u, tiles + L::kV);
  to_operand(fu, u);
  load_columns(fw, tiles + L::kK);
  Products::begin(u);
  Products::begin(w);
  Products::times<true>(u, fu, tiles + L::kT);
  Products::commit();
  Products::times<true>(w, fw, tiles + L::kT);
  Products::commit();
  Products::wait<1>();
  Products::end(u);
  auto* values = reinterpret_cast<float4*>(half_of(p, chunk.slot, group)) + thread % 128;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    values[j * 128] = make_float4(u[j][0], u[j][1], u[j][2], u[j][3]);
  }
  Products::wait<0>();
  Products::end(w);
  store_columns_in_tile(w, 1, tiles + L::kW);
  if (thread == 128) sm90::wait_stores();
  __syncthreads();
  for (int i = thread; i < kTile / 16; i += kThreads) {
    image[i] = reinterpret_cast<const uint4*>(base + L::kW)[i];
  }
  if constexpr (kBeside) {
    fence_all_copies();
    __syncthreads();
    if (thread == 0) signal(p.done + chunk.slot);
  }
#endif
}

constexpr int kScanBytes = kStages * kStageBytes + 2 * kStages * 8 + 1024;
static_assert(kScanBytes <= 227 * 1024);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The left operand of products, and here: else the compiler rounds between the fence and a product,
// and must put a wait behind each.
template <int kTiles>
__device__ void to_operand_now(std::uint32_t (&operand)[kTiles / 2][4],
                               const float (&acc)[kTiles][4]) {
  to_operand(operand, acc);
#pragma unroll
  for (auto& four : operand) {
    asm volatile("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]), "+r"(four[3])::"memory");
  }
}

// Said outright: an assignment becomes four of a word.
__device__ inline void store_vector(uint4* to, const std::uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// A thread's part of U₀ᵀ, or of what becomes Uᵀ, of the chunk in `stage`.
__device__ inline void load_values(float (&r)[8][4], const unsigned char* stage) {
  const auto* values = reinterpret_cast<const float4*>(stage + kPairBytes) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 v = values[j * 128];
    r[j][0] = v.x, r[j][1] = v.y, r[j][2] = v.z, r[j][3] = v.w;
  }
}

// The state's group: 64 value columns over all chunks.
template <bool kBeside>
__device__ void scan_chunks(float* state, int chunks, int half, unsigned char* stages,
                            std::uint64_t* full, std::uint64_t* done) {
  const int column = half * 64 + state_row();
  float s[16][4];
  load_state(s, state, kDim, kDim, column);
  if constexpr (!kBeside) wait_for_input();
  float r[8][4];
  sm90::barrier_wait(full, 0);
  load_values(r, stages);
  int stage = 0;
  int parity = 0;
  for (int c = 0; c < chunks; ++c) {
    const int now = stage;
    unsigned char* const base = stages + now * kStageBytes;
    const std::uint32_t w = shared_address(base);
    if (++stage == kStages) stage = 0, parity ^= 1;
    std::uint32_t sf[8][4];
    std::uint32_t f[4][4];
    to_operand_now(sf, s);
    Products::begin(r);
    Products::times_transposed<false>(r, sf, w);
    Products::commit();
    // In the place of U₀, of which each thread has read what it replaces.
    uint4* result = reinterpret_cast<uint4*>(base + kPairBytes) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i) store_vector(result + i * 128, sf[i]);
    if (c + 1 < chunks) sm90::barrier_wait(full + stage, parity);
    Products::wait<0>();
    Products::end(r);
    to_operand_now(f, r);
    Products::begin(s);
    Products::times<false>(s, f, w + kTile);
    Products::commit();
#pragma unroll
    for (int i = 0; i < 4; ++i) store_vector(result + kStateVectors + i * 128, f[i]);
    load_values(r, stages + stage * kStageBytes);  // behind the last chunk nobody uses them
    sm90::fence_async_proxy();
    Products::wait<0>();
    Products::end(s);
    sm90::barrier_arrive(done + now);
  }
  store_state(s, state, kDim, kDim, column);
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// The copies of all chunks, by one thread.
__device__ inline void copy_chunks(const ScanParams& p, std::ptrdiff_t first_slot, int chunks,
                                   int half, unsigned char* stages, std::uint64_t* full,
                                   std::uint64_t* done) {
  wait_for_input();
  const auto load = [&](int c) {
    const int stage = c % kStages;
    const std::ptrdiff_t slot = first_slot + std::ptrdiff_t{c} * p.problem.heads;
    unsigned char* to = stages + stage * kStageBytes;
    sm90::barrier_arrive_expect(full + stage, kPairBytes + 16 * kStateVectors);
    sm90::copy_bulk(to, p.images + slot * (kImageBytes / 16), kPairBytes, full + stage);
    sm90::wait_stores_read();  // what is left of the chunk before
    sm90::copy_bulk(to + kPairBytes, half_of(p, slot, half), 16 * kStateVectors, full + stage);
  };
  for (int c = 0; c < min(chunks, kStages); ++c) load(c);
  for (int c = 0; c < chunks; ++c) {
    const int stage = c % kStages;
    sm90::barrier_wait(done + stage, c / kStages & 1);
    sm90::store_bulk(half_of(p, first_slot + std::ptrdiff_t{c} * p.problem.heads, half),
                     stages + stage * kStageBytes + kPairBytes, 16 * kHalfVectors);
    if (c + kStages < chunks) load(c + kStages);
  }
  sm90::wait_stores();
}

// The same beside `prepare` and `outputs`, by a thread for each stage: of every fourth chunk.
// Fences and waits for memory take longer than the state takes over a chunk.
__device__ inline void copy_stage(const ScanParams& p, std::ptrdiff_t first_slot, int chunks,
                                  int half, int stage, unsigned char* stages, std::uint64_t* full,
                                  std::uint64_t* done) {
  unsigned char* const pair = stages + stage * kStageBytes;
  unsigned char* const values = pair + kPairBytes;
  const auto slot_of = [&](int c) { return first_slot + std::ptrdiff_t{c} * p.problem.heads; };
  const auto wait_prepared = [&](int c) {
    wait_for(p.done + slot_of(c), kPrepared);
    fence_all_copies();
  };
  const auto load = [&](int c) {
    sm90::barrier_arrive_expect(full + stage, kPairBytes + 16 * kStateVectors);
    sm90::copy_bulk(pair, p.images + slot_of(c) * (kImageBytes / 16), kPairBytes, full + stage);
    sm90::copy_bulk(values, half_of(p, slot_of(c), half), 16 * kStateVectors, full + stage);
  };
  if (stage < chunks) {
    wait_prepared(stage);
    load(stage);
  }
  int parity = 0;
  for (int c = stage; c < chunks; c += kStages, parity ^= 1) {
    const int next = c + kStages;
    if (next < chunks) wait_prepared(next);
    sm90::barrier_wait(done + stage, parity);
    sm90::store_bulk(half_of(p, slot_of(c), half), values, 16 * kHalfVectors);
    sm90::wait_stores_read();
    if (next < chunks) load(next);
    sm90::wait_stores();
    fence_all_copies();
    signal(p.done + slot_of(c));
  }
  wait_for_kernel_ahead();
}
#endif

template <bool kBeside>
__global__ void __launch_bounds__(kScanThreads<kBeside>, 1)
    delta_rule_scan(const __grid_constant__ ScanParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere it is never launched
  extern __shared__ unsigned char memory[];
  unsigned char* stages = aligned(memory);
  auto* full = reinterpret_cast<std::uint64_t*>(stages + kStages * kStageBytes);
  auto* done = full + kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(full + s, 1);
      sm90::barrier_init(done + s, 128);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const BatchEntry& entry = p.batch.entries[blockIdx.y];
  const int chunks = chunks_of(entry.length);
  const int heads = p.problem.heads;
  const int head = static_cast<int>(blockIdx.x) / 2;
  const int half = static_cast<int>(blockIdx.x) % 2;  // of the value columns
  const std::ptrdiff_t first_slot = std::ptrdiff_t{entry.first_chunk} * heads + head;
  // Said so that the compiler knows it: a warp does one or the other.
  if (uniform(static_cast<int>(threadIdx.x) / 128) != 0) {
    if constexpr (kBeside) {
      const int stage = uniform(static_cast<int>(threadIdx.x) / 32 % kStages);
      if (threadIdx.x == 128) let_next_start();
      if (threadIdx.x % 32 == 0) {
        copy_stage(p, first_slot, chunks, half, stage, stages, full, done);
      }
    } else {
      if (threadIdx.x == 128) {
        copy_chunks(p, first_slot, chunks, half, stages, full, done);
      } else if (p.beta_jobs > 0 && blockIdx.x + blockIdx.y == 0) {
        wait_for_input();
        for (int i = threadIdx.x - 129; i < p.beta_jobs; i += 31) p.beta_done[i] = 0;
      }
    }
  } else {
    scan_chunks<kBeside>(entry.state + static_cast<std::ptrdiff_t>(head) * kDim * kDim, chunks,
                         half, stages, full, done);
  }
#endif
}

struct OutputLayout {
  static constexpr int kQ = 0;
  static constexpr int kA = kQ + kTile;
  static constexpr int kO = kA + kTileBlockBytes;
  static constexpr int kSums = kO + kTile;
  static constexpr int kBytes = kSums + 8 * 64 * 4 + 1024;  // and to align
};

template <bool kBeside>
__global__ void __launch_bounds__(kThreads, 2)
    delta_rule_outputs(const __grid_constant__ ScanParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere it is never launched
  using L = OutputLayout;
  extern __shared__ unsigned char memory[];
  unsigned char* base = aligned(memory);
  const std::uint32_t tiles = shared_address(base);
  const int thread = static_cast<int>(threadIdx.x);
  const int head = static_cast<int>(blockIdx.x);
  const Chunk chunk(p, static_cast<int>(blockIdx.y), head);
  const int stride = p.problem.heads * kDim;
  const std::ptrdiff_t at = chunk.element(p, head);
  // q is there at the latest when `prepare` has ended, which `scan` has waited for.
  if (thread < 128) {
    load_tile<16>(tiles + L::kQ, static_cast<const bf16*>(p.problem.q) + at, stride, kDim,
                  chunk.rows, thread);
  }
  commit_copies();
  if constexpr (kBeside) {
    if (thread == 0) {
      std::int32_t* const done = p.done + chunk.slot;
      wait_for(done, kScanned);
      *done = 0;
      let_next_start();
    }
    __syncthreads();
  } else {
    wait_for_input();
  }
  // All by way of registers: a wait for copies to shared memory would come before other loads.
  const uint4* from = p.images + chunk.slot * std::ptrdiff_t{kImageBytes / 16} + kPairBytes / 16;
  uint4 a[kTileBlockBytes / 16 / kThreads];
  for (int i = 0; i < static_cast<int>(std::size(a)); ++i) a[i] = from[i * kThreads + thread];
  const uint4* half = half_of(p, chunk.slot, thread / 128) + thread % 128;
  std::uint32_t sf[8][4];
  std::uint32_t f[4][4];
  const auto load = [](std::uint32_t(&to)[4], const uint4& v) {
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  };
#pragma unroll
  for (int i = 0; i < 8; ++i) load(sf[i], half[i * 128]);
#pragma unroll
  for (int i = 0; i < 4; ++i) load(f[i], half[kStateVectors + i * 128]);
  wait_copies<0>();
  for (int i = 0; i < static_cast<int>(std::size(a)); ++i) {
    reinterpret_cast<uint4*>(base + L::kA)[i * kThreads + thread] = a[i];
  }
  Products::publish();
  __syncthreads();

  float o[8][4];
  Products::begin(o);
  Products::times_transposed<true>(o, sf, tiles + L::kQ);
  Products::times_transposed<false>(o, f, tiles + L::kA);
  Products::commit();
  Products::wait<0>();
  Products::end(o);
  float factor = p.scale;
  if (p.problem.norm != nullptr) {
    norm_values(o, factor, p.problem.norm, p.problem.norm_eps, kDim,
                reinterpret_cast<float*>(base + L::kSums));
    factor = 1;
  }
  store_columns(o, factor, tiles + L::kO, static_cast<bf16*>(p.problem.o) + at, stride, chunk.rows,
                kDim);
  // Whoever waits for this kernel waits for those before it too.
  if (kBeside && chunk.last) wait_for_kernel_ahead();
#endif
}

// Chunks of all sequences, a head each.
std::size_t slots_of(const DeltaRuleProblem& problem, const SequenceBatch& batch) {
  return static_cast<std::size_t>(batch.chunks) * static_cast<std::size_t>(problem.heads);
}

template <typename Kernel, typename... Params>
void launch(Context& ctx, Kernel kernel, dim3 grid, unsigned threads, int bytes,
            const Params&... params) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
  launch_dependent(ctx, "delta_rule", kernel, grid, threads, static_cast<std::size_t>(bytes),
                   params...);
}

// Blocks of `prepare` that run at once.
int blocks_at_once(Context& ctx) {
  return 2 * ctx.stream().multiprocessors();
}

// Groups of rows of β, and rows of blocks that compute them.
int beta_jobs_of(const DeltaInputsArgs& inputs) {
  return static_cast<int>((inputs.sequences.tokens() + kBetaRows - 1) / kBetaRows);
}
int beta_rows_of_grid(const DeltaInputsArgs& inputs, int heads) {
  return (beta_jobs_of(inputs) + heads - 1) / heads;
}

InputParams input_params(const DeltaInputsArgs& inputs, const ConstTensorView& next) {
  const DeltaConvolutions& of = inputs.convolutions;
  InputParams in{.projected = static_cast<const bf16*>(inputs.projected.data),
                 .conv = {of.q.f32(), of.k.f32(), of.v.f32()},
                 .q = static_cast<bf16*>(inputs.q.data),
                 .beta = {.x = static_cast<const bf16*>(inputs.x.data),
                          .b_proj = static_cast<const bf16*>(inputs.b_proj.data),
                          .width = static_cast<int>(inputs.x.shape[1]),
                          .heads = static_cast<int>(inputs.b_proj.shape[0]),
                          .beta = inputs.beta.f32()},
                 .tokens = static_cast<int>(inputs.sequences.tokens()),
                 .next = static_cast<const unsigned char*>(next.data),
                 .next_bytes = next.data != nullptr && !is_packed(next.dtype)
                                   ? static_cast<std::int64_t>(bytes_of(next.dtype, next.shape))
                                   : 0,
                 .states = {}};
  for (std::size_t b = 0; b < of.q_states.size(); ++b) {
    in.states[b][0] = of.q_states[b];
    in.states[b][1] = of.k_states[b];
    in.states[b][2] = of.v_states[b];
  }
  return in;
}

}  // namespace

bool delta_rule_scans(const DeltaRuleProblem& problem, int length, int tokens_bucket,
                      int multiprocessors) {
  constexpr int kLeastChunks = 3;
  constexpr int kMostChunks = 48;  // a scan takes 0.9 µs a chunk, segments less of many
  // What is left between kernels passes by memory, and pays only where walks would leave at least
  // three quarters of the card idle, if the batch has the fewest chunks of its bucket.
  constexpr int kLeastIdle = 4;
  const int chunks = chunks_of(length);
  const int chunks_of_batch = std::max(1, tokens_bucket / 2 / kChunk);
  return problem.is_bf16 && problem.key_dim == kDim && problem.value_dim == kDim &&
         chunks >= kLeastChunks && chunks <= kMostChunks &&
         static_cast<std::int64_t>(chunks) * multiprocessors >=
             static_cast<std::int64_t>(kLeastIdle) * chunks_of_batch * problem.heads &&
         has_group_products();
}

std::size_t delta_rule_scan_bytes(const DeltaRuleProblem& problem, const SequenceBatch& batch) {
  return slots_of(problem, batch) * (kImageBytes + 2 * 16 * kHalfVectors);
}

bool delta_rule_scan_takes(Context& ctx, const DeltaInputsArgs& inputs) {
  const Sequences& sequences = inputs.sequences;
  const auto heads = static_cast<int>(inputs.q.shape[1]);
  int chunks = 0;
  for (std::int64_t b = 0; b < sequences.count(); ++b) {
    chunks += chunks_of(static_cast<int>(sequences.length(b)));
  }
  return sequences.count() <= InputParams::kLimit && inputs.x.data != nullptr &&
         heads * (chunks + beta_rows_of_grid(inputs, heads)) <= blocks_at_once(ctx);
}

void launch_delta_rule_scan(Context& ctx, const DeltaRuleProblem& problem,
                            const SequenceBatch& batch, void* workspace,
                            const DeltaInputsArgs* inputs, const ConstTensorView& next) {
  const std::size_t slots = slots_of(problem, batch);
  const bool beside = slots > static_cast<std::size_t>(blocks_at_once(ctx));
  const int beta_jobs = inputs != nullptr ? beta_jobs_of(*inputs) : 0;
  auto* images = static_cast<uint4*>(workspace);
  const ScanParams params{
      .problem = problem,
      .images = images,
      .halves = images + slots * (kImageBytes / 16),
      .done = beside ? ctx.stream().zeros(static_cast<std::int64_t>(slots)) : nullptr,
      .beta_done = beta_jobs > 0 ? ctx.stream().zeros(beta_jobs) : nullptr,
      .beta_jobs = beta_jobs,
      .scale = 1 / std::sqrt(static_cast<float>(kDim)),
      .batch = batch};
  const auto heads = static_cast<unsigned>(problem.heads);
  const dim3 chunks(heads, static_cast<unsigned>(batch.chunks));
  const dim3 halves(2 * heads, static_cast<unsigned>(batch.count));
  const auto launch_all = [&]<bool kBeside>() {
    if (inputs == nullptr) {
      launch(ctx, delta_rule_prepare<kBeside, false>, chunks, kThreads, PrepareLayout::kBytes,
             params, InputParams{});
    } else if constexpr (!kBeside) {
      const dim3 grid(heads,
                      chunks.y + static_cast<unsigned>(beta_rows_of_grid(*inputs, problem.heads)));
      launch(ctx, delta_rule_prepare<false, true>, grid, kThreads, PrepareLayout::kBytes, params,
             input_params(*inputs, next));
    }
    launch(ctx, delta_rule_scan<kBeside>, halves, kScanThreads<kBeside>, kScanBytes, params);
    launch(ctx, delta_rule_outputs<kBeside>, chunks, kThreads, OutputLayout::kBytes, params);
  };
  beside ? launch_all.operator()<true>() : launch_all.operator()<false>();
}

}  // namespace deltafox::cuda
