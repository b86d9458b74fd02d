// Outputs of the selective scan in chunks.
#include "cuda/selective_scan_chunks.cuh"

namespace deltafox::cuda {
namespace {

using namespace scan;

template <int kStates>
__global__ void __launch_bounds__(kThreads) chunk_outputs(const __grid_constant__ ScanParams p) {
  constexpr int kChunk = Sizes<kStates>::kChunk;
  Tiles<kStates>& tiles = shared_tiles<kStates>();
  const Chunk chunk(p.batch, static_cast<int>(blockIdx.y), kChunk);
  const int first_channel = static_cast<int>(blockIdx.x) * kChannels;
  tiles.template load<false>(p.in, chunk, first_channel);
  const Lane<kStates> lane(p.in);
  const float skip = lane.channel < p.in.channels ? p.in.d[lane.channel] : 0;
  float h[kStates];
  lane.load(h, p.in, p.workspace.h);
  __syncthreads();
#pragma unroll 4
  for (int t = 0; t < kChunk; ++t) {
    lane.advance(h, tiles, t);
    float y = 0;
#pragma unroll
    for (int n = 0; n < kStates; ++n) y = fmaf(tiles.c[t][lane.first + n], h[n], y);
    y = channel_sum(y) + skip * tiles.x[t][lane.own];
    if (lane.first == 0) tiles.y[t][lane.own] *= y;
  }
  __syncthreads();
  store_tile(
      tiles.y, p.in, chunk, first_channel,
      [&](const float(&four)[4], std::int64_t at, int count) { p.in.y.store(four, at, count); });
}

}  // namespace

int selective_scan_chunks(int states, int length) {
  int chunks = 0;
  with_lane_states(states, [&](auto lane_states) {
    constexpr int kChunk = Sizes<lane_states()>::kChunk;
    chunks = (length + kChunk - 1) / kChunk;
  });
  return chunks;
}

void launch_selective_scan_chunks(Context& ctx, const SelectiveScanProblem& problem,
                                  const SequenceBatch& batch) {
  const auto elements = [&](const void* data) { return Elements(data, problem.is_bf16); };
  ScanParams p{.in = {.x = elements(problem.x),
                      .b = elements(problem.b),
                      .c = elements(problem.c),
                      .gate = elements(problem.gate),
                      .y = elements(problem.y),
                      .dt = problem.dt,
                      .dt_bias = problem.dt_bias,
                      .a_log = problem.a_log,
                      .d = problem.d,
                      .channels = problem.channels,
                      .states = problem.states}};
  p.in.aligned = all_aligned({p.in.x, p.in.gate, p.in.y, Elements(problem.dt, false)});
  p.batch = batch;
  ScratchScope scratch(ctx);
  p.workspace = workspace_of(scratch, p.in, batch.blocks, false);
  with_lane_states(problem.states, [&](auto lane_states) {
    constexpr int kStates = lane_states();
    const auto run = [&](void (*kernel)(ScanParams)) {
      launch(ctx, kernel, p, problem.channels, batch.blocks, sizeof(Tiles<kStates>));
    };
    run(chunk_sums<kStates, false>);
    launch_scan<true>(ctx, p);
    run(chunk_outputs<kStates>);
  });
}

}  // namespace deltafox::cuda
