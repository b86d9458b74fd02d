// The gradients of gated linear attention in chunks on the tensor cores (gla_bf16.cuh has the
// notation). dv is what o is backwards in time; chunk_rows finds dq, dk and dg. Let S_I be the
// state before part I of a chunk and dS_I the gradient of the state behind it. Of all that comes
// from outside of a part, a channel i of its rows needs
//   f(u) = Σ_j S_I,ij do_uj,  x_s = Σ_j dS_I,ij v_sj,  f(*) = Σ_j S_I,ij dS_I,ij,
// which the tensor cores find while a warp walks with its channels' S and dS through the parts:
//   S_{I+1} = G_I S_I + K̃_Iᵀ V_I,  dS_{I−1} = G_I dS_I + Q̃_Iᵀ dO_I,
//   f(*) = ⟨S_I, dS_3⟩ Π_{B>I} G_B + Σ_{J>I} Π_{I<B<J} G_B Σ_{u∈J} q̃_u (S_I do_u),
//   ⟨S_{I+1}, dS_3⟩ = G_I ⟨S_I, dS_3⟩ + Σ_{s∈I} k̃_s (dS_3 v_s).
// Within the part follows, a thread a channel, what decayed_backward.cuh says, with the same
// letters.
#include <cmath>

#include "cuda/batches.h"
#include "cuda/decayed_kernels.h"
#include "cuda/gla_bf16.cuh"
#include "cuda/stream.h"
#include "ops/gla.h"

namespace deltafox::cuda {
namespace {

using namespace gla_bf16;

constexpr const char* kOp = "gla_backward";
constexpr int kWarpChannels = 16;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps * kWarpChannels == kSize);

// A warp's f(u) or x_s of a chunk. Rows of 144 bytes: eight of them share no bank.
using WarpSums = bf16[kWarpChannels][kChunk + 8];

struct RowLayout {
  static constexpr int kQueries = 0;
  static constexpr int kKeys = kQueries + kTileBytes;
  static constexpr int kValues = kKeys + kTileBytes;
  static constexpr int kDo = kValues + kTileBytes;
  static constexpr int kF = kDo + kTileBytes;
  static constexpr int kX = kF + kWarps * static_cast<int>(sizeof(WarpSums));
  static constexpr int kEnd = kX + kWarps * static_cast<int>(sizeof(WarpSums));  // f(*)
  static constexpr int kDecays = kEnd + static_cast<int>(sizeof(PartDecays));
  static constexpr int kProducts =
      kDecays + static_cast<int>(sizeof(PartDecays));  // w_us at [s][u]
  static constexpr int kBytes = kProducts + kParts * kPart * kPart * 4;
};

// Σ over the lanes of a row.
__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffU, x, 1);
  return x + __shfl_xor_sync(0xffffffffU, x, 2);
}

// 16 channels of a state, as an accumulator has them: this lane's are `low` = 16·warp + lane / 4
// and 8 more, and columns 8j + 2 (lane % 4) and 1 more.
struct WarpState {
  float s[kSize / 8][4];

  __device__ static float2 pair(const bf16* state, int low, int j, int i) {
    const int lane = threadIdx.x % 32;
    return unpack(*reinterpret_cast<const std::uint32_t*>(state + (low + 8 * i) * kSize + 8 * j +
                                                          2 * (lane % 4)));
  }
  __device__ void load(const bf16* state, int low) {
#pragma unroll
    for (int j = 0; j < kSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 x = pair(state, low, j, i);
        s[j][2 * i] = x.x;
        s[j][2 * i + 1] = x.y;
      }
    }
  }
  // sums [16 channels, 16 rows] = state · (rows of a part)ᵀ
  __device__ void meet(float (&sums)[2][4], std::uint32_t tile, int part) const {
    clear(sums);
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      const std::uint32_t a[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                                  pack(s[2 * k + 1][0], s[2 * k + 1][1]),
                                  pack(s[2 * k + 1][2], s[2 * k + 1][3])};
      add_times_transposed(sums, a, tile, k, part);
    }
  }
  // state = decay · state + (rows of a part of `left`)ᵀ (those of `right`)
  __device__ void pass(std::uint32_t left, std::uint32_t right, int warp, int part, float decay_low,
                       float decay_high) {
    scale_rows(s, decay_low, decay_high);
    std::uint32_t a[4];
    load_columns(a, left, warp, part);
    add_times(s, a, right, part, 0);
  }
};

// This lane's part of Σ_rows (row of the tile) · sums, for its two channels.
__device__ float2 dot_rows(const float (&sums)[2][4], std::uint32_t tile, int warp, int part) {
  std::uint32_t a[4];
  load_columns(a, tile, warp, part);
  float2 dot = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 low = unpack(a[2 * i]);
    const float2 high = unpack(a[2 * i + 1]);
    dot.x += low.x * sums[i][0] + low.y * sums[i][1];
    dot.y += high.x * sums[i][2] + high.y * sums[i][3];
  }
  return dot;
}

__device__ void store_sums(WarpSums& to, const float (&sums)[2][4], int part) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_pair(&to[lane / 4 + 8 * i][part * kPart + 8 * n + 2 * (lane % 4)], sums[n][2 * i],
                 sums[n][2 * i + 1]);
    }
  }
}

__device__ void load_sums(float (&to)[kPart], const WarpSums& from, int channel, int part) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    Eight<bf16> eight;
    eight.load(&from[channel][part * kPart + 8 * n]);
    float x[8];
    eight.get(x);
#pragma unroll
    for (int e = 0; e < 8; ++e) to[8 * n + e] = x[e];
  }
}

// dq, dk and dg of a part's rows for one channel.
__device__ void finish_part(const Params& p, const Block& block, int part, int channel,
                            float (&f)[kPart], const float (&x)[kPart], float f_end,
                            const float (*w)[kPart]) {
  float q[kPart];
  float k[kPart];
  float g[kPart];
  const std::ptrdiff_t at = block.first + part * kPart * p.row_size() + channel;
  const int rows = block.chunk.tokens - part * kPart;
#pragma unroll
  for (int t = 0; t < kPart; ++t) {
    const bool exists = t < rows;
    q[t] = exists ? to_float(p.q[at + t * p.row_size()]) : 0;
    k[t] = exists ? p.k[at + t * p.row_size()] : 0;
    g[t] = exists ? p.g[at + t * p.row_size()] : 1;
  }
#pragma unroll
  for (int t = 0; t < kPart; ++t) {
    float decay = 1;
    float dg = 0;
    float dk = 0;
#pragma unroll
    for (int u = t / 4 * 4; u < kPart; u += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&w[t][u]);
      const float products[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (u + e < t) continue;
        if (u + e > t) decay *= g[u + e];
        const float query = decay * q[u + e];
        dg = fmaf(query, f[u + e], dg);
        dk = fmaf(query, products[e], dk);
        f[u + e] = fmaf(k[t], products[e], g[t] * f[u + e]);
      }
    }
    dg = fmaf(decay, f_end, dg);
    dk = fmaf(decay, x[t], dk);
    f_end = fmaf(k[t], x[t], g[t] * f_end);
    if (t >= rows) continue;
    from_float(p.dq[at + t * p.row_size()], p.scale * f[t]);
    p.dk[at + t * p.row_size()] = p.scale * dk;
    p.dg[at + t * p.row_size()] = p.scale * dg;
  }
}

__global__ void __launch_bounds__(kThreads, 2) chunk_rows(const __grid_constant__ Params p) {
  using L = RowLayout;
  unsigned char* base = shared_memory();
  const std::uint32_t at = shared_address(base);
  auto& decays = *reinterpret_cast<PartDecays*>(base + L::kDecays);
  auto& ends = *reinterpret_cast<PartDecays*>(base + L::kEnd);
  auto* products = reinterpret_cast<float(*)[kPart][kPart]>(base + L::kProducts);
  const Block block(p);
  const int lane = threadIdx.x % 32;
  const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
  WarpSums& f = reinterpret_cast<WarpSums*>(base + L::kF)[warp];
  WarpSums& x = reinterpret_cast<WarpSums*>(base + L::kX)[warp];
  load_tile<kSize / 8>(at + L::kValues, p.v + block.first, p.row_size(), block.chunk.tokens);
  load_tile<kSize / 8>(at + L::kDo, p.d_o + block.first, p.row_size(), block.chunk.tokens);
  commit_copies();
  {
    const PartRows rows(p, block);
    const float2 one = make_float2(1, 1);
    *reinterpret_cast<float2*>(&decays[rows.part][rows.channel]) =
        rows.store_queries(base + L::kQueries, one);
    rows.store_keys(base + L::kKeys, one);
  }
  wait_copies<0>();
  __syncthreads();
  {
    // v_s · do_u: rows s of part warp / 2, eight columns u.
    const int part = warp / 2;
    const int half = warp % 2;
    float w[4] = {};
#pragma unroll
    for (int k = 0; k < kSize / 32; ++k) {
      std::uint32_t b[4];
      load_matrices(
          b, at + L::kDo + piece_offset(part * kPart + 8 * half + lane % 8, 4 * k + lane / 8));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        std::uint32_t a[4];
        load_rows(a, at + L::kValues, part, 2 * k + i);
        mma_bf16(w, a, b[2 * i], b[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<float2*>(&products[part][lane / 4 + 8 * i][8 * half + 2 * (lane % 4)]) =
          make_float2(w[2 * i], w[2 * i + 1]);
    }
  }

  const int low = kWarpChannels * warp + lane / 4;
  const bf16* states = p.states.states + p.state_at(blockIdx.x, block.head);
  const bf16* d_states = p.states.d_states + p.state_at(blockIdx.x, block.head);
  WarpState state;
  float2 met_keys[kParts - 1];  // Σ k̃_s (dS_3 v_s)
  state.load(d_states, low);
#pragma unroll
  for (int part = kParts - 1; part >= 0; --part) {
    float sums[2][4];
    if (part == kParts - 1) {
#pragma unroll
      for (int other = 0; other < kParts - 1; ++other) {
        state.meet(sums, at + L::kValues, other);
        met_keys[other] = dot_rows(sums, at + L::kKeys, warp, other);
      }
    }
    state.meet(sums, at + L::kValues, part);
    store_sums(x, sums, part);
    if (part > 0) {
      state.pass(at + L::kQueries, at + L::kDo, warp, part, decays[part][low],
                 decays[part][low + 8]);
    }
  }
  state.load(states, low);
  float2 through = make_float2(0, 0);  // ⟨S_I, dS_3⟩, this lane's columns
#pragma unroll
  for (int j = 0; j < kSize / 8; ++j) {
    const float2 d_low = WarpState::pair(d_states, low, j, 0);
    const float2 d_high = WarpState::pair(d_states, low, j, 1);
    through.x += state.s[j][0] * d_low.x + state.s[j][1] * d_low.y;
    through.y += state.s[j][2] * d_high.x + state.s[j][3] * d_high.y;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float2 end = through;
#pragma unroll
    for (int other = kParts - 1; other > part; --other) {
      float sums[2][4];
      state.meet(sums, at + L::kDo, other);
      const float2 met = dot_rows(sums, at + L::kQueries, warp, other);
      end = make_float2(decays[other][low] * end.x + met.x, decays[other][low + 8] * end.y + met.y);
    }
    end = make_float2(quad_sum(end.x), quad_sum(end.y));
    if (lane % 4 == 0) {
      ends[part][low] = end.x;
      ends[part][low + 8] = end.y;
    }
    float sums[2][4];
    state.meet(sums, at + L::kDo, part);
    store_sums(f, sums, part);
    if (part + 1 < kParts) {
      const float decay_low = decays[part][low];
      const float decay_high = decays[part][low + 8];
      through = make_float2(decay_low * through.x + met_keys[part].x,
                            decay_high * through.y + met_keys[part].y);
      state.pass(at + L::kKeys, at + L::kValues, warp, part, decay_low, decay_high);
    }
  }
  __syncthreads();  // for the products of v and do; all else is the warp's own
  const int own = lane % kWarpChannels;
  const int channel = kWarpChannels * warp + own;
  for (int part = lane / kWarpChannels; part < kParts; part += 32 / kWarpChannels) {
    float from_state[kPart];
    float from_d_state[kPart];
    load_sums(from_state, f, own, part);
    load_sums(from_d_state, x, own, part);
    finish_part(p, block, part, channel, from_state, from_d_state, ends[part][channel],
                products[part]);
  }
}

}  // namespace

void launch_gla_backward_bf16(Context& ctx, const GlaBackwardArgs& args) {
  Params all{};
  all.q = static_cast<const bf16*>(args.q.data);
  all.k = args.k.f32();
  all.g = args.g.f32();
  all.v = static_cast<const bf16*>(args.v.data);
  all.d_o = static_cast<const bf16*>(args.d_o.data);
  all.columns = static_cast<bf16*>(args.dv.data);
  all.dq = static_cast<bf16*>(args.dq.data);
  all.dk = args.dk.f32();
  all.dg = args.dg.f32();
  all.heads = static_cast<int>(args.q.shape[1]);
  all.scale = 1 / std::sqrt(static_cast<float>(kSize));
  const auto chunks = [](int length) { return (length + kChunk - 1) / kChunk; };
  for_each_batch(args.sequences, {}, chunks, [&](const SequenceBatch& batch) {
    ScratchScope scratch(ctx);
    const Params p = with_states(scratch, all, batch, true);
    cudaStream_t stream = stream_of(ctx);
    launch(kOp, p, chunk_sums<true>, SumLayout::kBytes, stream);
    launch_chunk_states(kOp, p.states, stream);
    launch(kOp, p, chunk_rows, RowLayout::kBytes, stream);
    launch(kOp, p, chunk_columns<false>, ColumnLayout::kBytes, stream);
  });
}

}  // namespace deltafox::cuda
