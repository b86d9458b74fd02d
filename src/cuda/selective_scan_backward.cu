// The gradients of the selective scan in chunks. chunk_gradients keeps the states of kSub tokens at
// a time in registers: it walks through the chunk once for the states before each part of it, and
// then from the last part to the first, through each forwards for its states and backwards for the
// gradients. db and dc, sums over channels, are added up over the channels of a block and written
// as its share.
#include "cuda/batches.h"
#include "cuda/column_sums.cuh"
#include "cuda/lane_sums.cuh"
#include "cuda/selective_scan_chunks.cuh"
#include "ops/selective_scan.h"

namespace deltafox::cuda {
namespace {

using namespace scan;

struct ScanGradients {
  Elements dx{nullptr, false};     // [T, C]
  Elements dgate{nullptr, false};  // [T, C]
  float* ddt = nullptr;            // [T, C]
  float* shares = nullptr;         // [T, blocks, lanes, db and dc of a lane's states]
  float* d_dt_bias = nullptr;      // [chunks, C], each chunk's share
  float* dd = nullptr;             // [chunks, C]
  float* d_a_log = nullptr;        // [chunks, C, N]
};

struct GradientParams {
  ScanParams scan;
  ScanGradients out;
};

template <int kStates>
struct GradientMemory {
  using S = Sizes<kStates>;
  Tiles<kStates> tiles;
  float starts[S::kSubs][kStates][kThreads];  // states before each part
  float parts[kWarps][S::kSub][kLanes * S::kSums];
};

template <int kStates>
__global__ void __launch_bounds__(kThreads, kStates > 4 ? 1 : 2)
    chunk_gradients(const __grid_constant__ GradientParams params) {
  const ScanParams& p = params.scan;
  const ScanGradients& out = params.out;
  using S = Sizes<kStates>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<GradientMemory<kStates>*>(shared);
  Tiles<kStates>& tiles = memory.tiles;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.y), S::kChunk);
  const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
  tiles.template load<true>(p.in, chunk, first_channel);
  const Lane<kStates> lane(p.in);
  const bool exists = lane.channel < p.in.channels;
  const float skip = exists ? p.in.d[lane.channel] : 0;
  float h[kStates];
  float dh[kStates];
  lane.load(h, p.in, p.workspace.h);
  lane.load(dh, p.in, p.workspace.dh);
  __syncthreads();
  for (int sub = 0; sub < S::kSubs; ++sub) {
#pragma unroll
    for (int n = 0; n < kStates; ++n) memory.starts[sub][n][thread] = h[n];
    if (sub + 1 == S::kSubs) break;
#pragma unroll 4
    for (int i = 0; i < S::kSub; ++i) lane.advance(h, tiles, sub * S::kSub + i);
  }

  float d_a_log[kStates] = {};
  float d_dt_bias = 0;
  float dd = 0;
  for (int sub = S::kSubs - 1; sub >= 0; --sub) {
    float after[S::kSub][kStates];
#pragma unroll
    for (int n = 0; n < kStates; ++n) h[n] = memory.starts[sub][n][thread];
#pragma unroll
    for (int i = 0; i < S::kSub; ++i) {
      lane.advance(h, tiles, sub * S::kSub + i);
#pragma unroll
      for (int n = 0; n < kStates; ++n) after[i][n] = h[n];
    }
#pragma unroll
    for (int i = S::kSub - 1; i >= 0; --i) {
      const int t = sub * S::kSub + i;
      const float step = tiles.step[t][lane.own];
      const float x = tiles.x[t][lane.own];
      const float dy = tiles.y[t][lane.own];
      const float input = step * x;
      float y = 0;
      float d_input = 0;  // of Δ x
      float d_step = 0;   // in units of log 2
      float sums[S::kSums];
#pragma unroll
      for (int n = 0; n < kStates; ++n) {
        const float c = tiles.c[t][lane.first + n];
        const float before = i > 0 ? after[i - 1][n] : memory.starts[sub][n][thread];
        dh[n] = fmaf(c, dy, dh[n]);
        sums[n] = dh[n] * input;
        sums[kStates + n] = after[i][n] * dy;
        y = fmaf(c, after[i][n], y);
        d_input = fmaf(dh[n], tiles.b[t][lane.first + n], d_input);
        dh[n] *= exp2_of(lane.rates[n] * step);
        const float d_exponent = dh[n] * before * lane.rates[n];
        d_step += d_exponent;
        d_a_log[n] = fmaf(d_exponent, step, d_a_log[n]);
      }
      lane_sums<16, kLanes>(sums);  // over the channels of the warp
#pragma unroll
      for (int n = 0; n < S::kSums / 8; ++n) {
        const int place = lane_share<16, kLanes>() * (S::kSums / 8) + n;
        memory.parts[warp][i][thread % kLanes * S::kSums + place] = sums[n];
      }
      y = channel_sum(y) + skip * x;
      d_input = channel_sum(d_input);
      d_step = fmaf(channel_sum(d_step), kLogOf2, d_input * x);
      const float ddt = d_step * -expm1f(-step);  // sigmoid(log(e^Δ − 1)) = 1 − e^−Δ
      d_dt_bias += ddt;
      dd = fmaf(dy, x, dd);
      __syncwarp();
      if (lane.first == 0) {
        tiles.x[t][lane.own] = fmaf(d_input, step, skip * dy);
        tiles.step[t][lane.own] = ddt;
        tiles.y[t][lane.own] = y * tiles.slope[t][lane.own];
      }
    }
    __syncthreads();
    constexpr int kAll = kLanes * S::kSums;
    for (int i = thread; i < S::kSub * kAll; i += kThreads) {
      const int t = sub * S::kSub + i / kAll;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += memory.parts[w][i / kAll][i % kAll];
      if (t < chunk.tokens) {
        out.shares[((chunk.begin + t) * gridDim.x + blockIdx.x) * kAll + i % kAll] = sum;
      }
    }
    __syncthreads();
  }

  store_tile(
      tiles.x, p.in, chunk, first_channel,
      [&](const float(&four)[4], std::int64_t at, int count) { out.dx.store(four, at, count); });
  store_tile(tiles.step, p.in, chunk, first_channel,
             [&](const float(&four)[4], std::int64_t at, int count) {
               store_four(out.ddt + at, four, count);
             });
  if (p.in.gate.data != nullptr) {
    store_tile(tiles.y, p.in, chunk, first_channel,
               [&](const float(&four)[4], std::int64_t at, int count) {
                 out.dgate.store(four, at, count);
               });
  }
  if (!exists) return;
  const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(blockIdx.y) * p.in.channels + lane.channel;
  if (lane.first == 0) {
    out.d_dt_bias[at] = d_dt_bias;
    out.dd[at] = dd;
  }
#pragma unroll
  for (int n = 0; n < kStates; ++n) {
    if (lane.exists(p.in, n)) {
      out.d_a_log[at * p.in.states + lane.first + n] = d_a_log[n] * kLogOf2;
    }
  }
}

// db and dc of token i / N and state i % N: the blocks' shares in turn.
struct ShareSums {
  const float* shares;
  Elements db, dc;
  int blocks;
  int states;       // N
  int lane_states;  // of a lane

  __device__ void operator()(std::int64_t first, int count) const {
    const int all = kLanes * 2 * lane_states;
    for (std::int64_t i = first; i < first + min(count, 4); ++i) {
      const int n = static_cast<int>(i % states);
      const float* from =
          shares + i / states * blocks * all + n / lane_states * 2 * lane_states + n % lane_states;
      float of_b = 0;
      float of_c = 0;
#pragma unroll 8
      for (int block = 0; block < blocks; ++block) {
        of_b += from[block * all];
        of_c += from[block * all + lane_states];
      }
      db.put(i, of_b);
      dc.put(i, of_c);
    }
  }
};

}  // namespace

void launch_selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const int channels = static_cast<int>(args.x.shape[1]);
  const int states = static_cast<int>(args.a_log.shape[1]);
  GradientParams p{
      .scan = {.in = {.x = Elements(args.x),
                      .b = Elements(args.b),
                      .c = Elements(args.c),
                      .gate = Elements(args.gate),
                      .y = Elements(args.dy),
                      .dt = args.dt.f32(),
                      .dt_bias = args.dt_bias.f32(),
                      .a_log = args.a_log.f32(),
                      .d = args.d.f32(),
                      .channels = channels,
                      .states = states}},
      .out = {.dx = Elements(args.dx), .dgate = Elements(args.dgate), .ddt = args.ddt.f32()}};
  p.scan.in.aligned = all_aligned({p.scan.in.x, p.scan.in.gate, p.scan.in.y, p.out.dx, p.out.dgate,
                                   Elements(args.dt), Elements(args.ddt)});
  with_lane_states(states, [&](auto lane_states) {
    constexpr int kStates = lane_states();
    const int blocks = blocks_of(channels);
    ScratchScope shares(ctx);
    p.out.shares = shares.tensor({tokens, blocks, kLanes * Sizes<kStates>::kSums}).f32();
    for_each_batch(
        args.sequences, {}, [&](int length) { return selective_scan_chunks(states, length); },
        [&](const SequenceBatch& batch) {
          ScratchScope scratch(ctx);
          p.scan.batch = batch;
          p.scan.workspace = workspace_of(scratch, p.scan.in, batch.blocks, true);
          p.out.d_dt_bias = scratch.tensor({batch.blocks, channels}).f32();
          p.out.dd = scratch.tensor({batch.blocks, channels}).f32();
          p.out.d_a_log = scratch.tensor({batch.blocks, channels, states}).f32();
          launch(ctx, chunk_sums<kStates, true>, p.scan, channels, batch.blocks,
                 sizeof(Tiles<kStates>));
          launch_scan<true>(ctx, p.scan);
          launch_scan<false>(ctx, p.scan);
          launch(ctx, chunk_gradients<kStates>, p, channels, batch.blocks,
                 sizeof(GradientMemory<kStates>));
          const auto add = [&](const float* sums, int width, const TensorView& to) {
            add_column_sums(ctx, kOp, batch.blocks, width, to.f32(), MatrixElements{sums, width});
          };
          add(p.out.d_dt_bias, channels, args.d_dt_bias);
          add(p.out.dd, channels, args.dd);
          add(p.out.d_a_log, channels * states, args.d_a_log);
        });
    each_four(
        ctx, kOp, tokens * states, false,
        ShareSums{p.out.shares, Elements(args.db), Elements(args.dc), blocks, states, kStates});
  });
}

}  // namespace deltafox::cuda
