// Decoding steps of up to 16 sequences: step_linear and delta_rule_step (ops/step.h).
//
// A step is bound by the weights, which are read once from device memory straight into the
// registers that the tensor cores multiply from. A thread block takes tiles of 8 rows of w; its 8
// warps share K between them, in blocks of 32 elements dealt out in turn, and their sums are added
// in order. A lane's 16 bytes of a block of 32 serve as operands of two products of 16: which
// elements are called k = 0, 1, ... does not matter to a sum as long as x has them in the same
// places. Before the input is there, weights are on their way: the first into registers, more into
// the L2 cache.
#include "core/quantized.h"
#include "cuda/packed.cuh"
#include "cuda/step_frame.cuh"
#include "cuda/step_packed.h"
#include "cuda/step_program.h"

namespace deltafox::cuda {
namespace {

using namespace step;

constexpr int kTileRows = 8;  // of w
using Tile = step::Tile<kTileRows>;

// Of the lane's row of a tile; rows behind the last are the last, and not stored.
__device__ inline const bf16* weights_of(const Params& p, const Tile& tile, int row_in_tile) {
  const Part& of = p.parts[tile.part];
  const int row = min(tile.first_row(p) + row_in_tile, of.rows - 1) + tile.half * of.rows;
  return static_cast<const bf16*>(of.w) + static_cast<std::int64_t>(row) * p.k;
}

// kChunk blocks of each warp are in registers ahead of those being multiplied; it divides
// K / (kBlock · kWarps). kHalves: 8 rows of x each.
template <int kChunk, int kHalves>
__global__ void __launch_bounds__(kThreads, 2)
    step_linear_kernel(const __grid_constant__ Params p) {
  constexpr int kRows = 8 * kHalves;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* staged = reinterpret_cast<bf16*>(shared);
  __shared__ float partial[2][kWarps][kRows][kTileRows];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row_in_tile = lane / 4;
  const int offset = warp * kBlock + lane % 4 * 8;  // of this lane's elements in K
  const int chunks = p.k / (kBlock * kWarps * kChunk);

  Tile loading(p, static_cast<int>(blockIdx.x));
  const bf16* from = weights_of(p, loading, row_in_tile) + offset;
  int loading_chunk = 0;
  uint4 ahead[kChunk];
  const auto load_chunk = [&] {
    if (!loading.exists(p)) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      ahead[i] = load_stream(from + (loading_chunk * kChunk + i) * (kBlock * kWarps));
    }
    if (++loading_chunk == chunks) {
      loading_chunk = 0;
      loading.next(p);
      if (loading.exists(p)) from = weights_of(p, loading, row_in_tile) + offset;
    }
  };
  load_chunk();
  // One lane of each 64 bytes asks for the tiles to come.
  Tile coming = loading;
  const auto prefetch_tile = [&] {
    if (!coming.exists(p)) return;
    if (lane % 4 == 0) {
      const bf16* weights = weights_of(p, coming, row_in_tile) + offset;
      for (int i = 0; i < chunks * kChunk; ++i) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(weights + i * (kBlock * kWarps)));
      }
    }
    coming.next(p);
  };
  const int tile_bytes = kTileRows * p.k * 2;
  for (int bytes = 0; bytes < kPrefetchBytes; bytes += tile_bytes) prefetch_tile();

  wait_for_input();
  stage_input<kRows>(p, staged);

  float held = 0;
  int buffer = 0;
  const int stride = p.staged + kPadding;
  const bf16* x = staged + row_in_tile * stride + offset;
  for (Tile tile(p, static_cast<int>(blockIdx.x)); tile.exists(p); tile.next(p)) {
    prefetch_tile();
    float c[4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint4 w[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) w[i] = ahead[i];
      load_chunk();
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const bf16* at = x + (chunk * kChunk + i) * (kBlock * kWarps);
        const uint4 low = *reinterpret_cast<const uint4*>(at);
        uint4 high{};
        if constexpr (kHalves == 2) high = *reinterpret_cast<const uint4*>(at + 8 * stride);
        multiply(c, low.x, high.x, low.y, high.y, w[i].x, w[i].y);
        multiply(c, low.z, high.z, low.w, high.w, w[i].z, w[i].w);
      }
    }
    const int column = lane % 4 * 2;
    auto& sums_of_tile = partial[buffer];
    *reinterpret_cast<float2*>(&sums_of_tile[warp][row_in_tile][column]) = make_float2(c[0], c[1]);
    if constexpr (kHalves == 2) {
      *reinterpret_cast<float2*>(&sums_of_tile[warp][row_in_tile + 8][column]) =
          make_float2(c[2], c[3]);
    }
    __syncthreads();
    if (threadIdx.x < kRows * kTileRows) {
      const int b = static_cast<int>(threadIdx.x) / kTileRows;
      const int n = static_cast<int>(threadIdx.x) % kTileRows;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums_of_tile[w][b][n];
      finish(p, tile, b, n, sum, held);
    }
    buffer ^= 1;  // so that one barrier a tile is enough
  }
}

using Kernel = void (*)(Params);

template <int kHalves>
Kernel kernel_for(int chunk) {
  switch (chunk) {
    case 11:
      return step_linear_kernel<11, kHalves>;
    case 8:
      return step_linear_kernel<8, kHalves>;
    case 6:
      return step_linear_kernel<6, kHalves>;
    case 4:
      return step_linear_kernel<4, kHalves>;
    case 3:
      return step_linear_kernel<3, kHalves>;
    default:
      return step_linear_kernel<1, kHalves>;
  }
}

int chunk_for(int blocks_of_a_warp) {
  for (const int chunk : {11, 8, 6, 4, 3}) {
    if (blocks_of_a_warp % chunk == 0) return chunk;
  }
  return 1;
}

// One thread block: 16 columns of a head's state. A thread holds four rows of four columns.
constexpr int kStepColumns = 16;
constexpr int kStepThreads = 128;

struct DeltaStepParams {
  const float* q;  // [B, H, 128]
  const float* k;
  const float* v;
  const float* beta;     // [B, H]
  float* const* states;  // [B]
  float* o;
  int heads;
};

__global__ void __launch_bounds__(kStepThreads) delta_rule_step_kernel(const DeltaStepParams p) {
  constexpr int kDim = static_cast<int>(kStepHeadDim);
  __shared__ float sq[4][kStepColumns];
  __shared__ float sk[4][kStepColumns];
  __shared__ float dots[4][3];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int column = static_cast<int>(blockIdx.x) * kStepColumns + lane % 4 * 4;
  const int row = warp * 32 + lane / 4;  // and 8, 16, 24 rows on
  const int head = static_cast<int>(blockIdx.y);
  const int b = static_cast<int>(blockIdx.z);
  float* state = p.states[b] + static_cast<std::int64_t>(head) * kDim * kDim + column;
  float4 s[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    s[i] = *reinterpret_cast<const float4*>(state + (row + i * 8) * kDim);
  }
  wait_for_input();
  const std::int64_t base = (static_cast<std::int64_t>(b) * p.heads + head) * kDim;
  const float q_own = p.q[base + threadIdx.x];
  const float k_own = p.k[base + threadIdx.x];
  float q[4];
  float k[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    q[i] = p.q[base + row + i * 8];
    k[i] = p.k[base + row + i * 8];
  }
  const float4 v = *reinterpret_cast<const float4*>(p.v + base + column);
  const float beta = p.beta[b * p.heads + head];
  const float qq = warp_sum(q_own * q_own);
  const float kk = warp_sum(k_own * k_own);
  const float qk = warp_sum(q_own * k_own);
  float4 sums_q{};
  float4 sums_k{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums_q.x = fmaf(s[i].x, q[i], sums_q.x), sums_q.y = fmaf(s[i].y, q[i], sums_q.y);
    sums_q.z = fmaf(s[i].z, q[i], sums_q.z), sums_q.w = fmaf(s[i].w, q[i], sums_q.w);
    sums_k.x = fmaf(s[i].x, k[i], sums_k.x), sums_k.y = fmaf(s[i].y, k[i], sums_k.y);
    sums_k.z = fmaf(s[i].z, k[i], sums_k.z), sums_k.w = fmaf(s[i].w, k[i], sums_k.w);
  }
  const auto over_rows = [](float& x) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  };
  over_rows(sums_q.x), over_rows(sums_q.y), over_rows(sums_q.z), over_rows(sums_q.w);
  over_rows(sums_k.x), over_rows(sums_k.y), over_rows(sums_k.z), over_rows(sums_k.w);
  if (lane < 4) {
    *reinterpret_cast<float4*>(&sq[warp][lane * 4]) = sums_q;
    *reinterpret_cast<float4*>(&sk[warp][lane * 4]) = sums_k;
  }
  if (lane == 0) dots[warp][0] = qq, dots[warp][1] = kk, dots[warp][2] = qk;
  __syncthreads();
  const auto all = [&](int which) {
    return dots[0][which] + dots[1][which] + dots[2][which] + dots[3][which];
  };
  const float q_scale = 1 / sqrtf(all(0) + 1e-6F);
  const float k_scale = 1 / sqrtf(all(1) + 1e-6F);
  const float q_dot_k = all(2) * q_scale * k_scale;
  const auto column_sum = [&](const float(&x)[4][kStepColumns], int c) {
    return x[0][c] + x[1][c] + x[2][c] + x[3][c];
  };
  const int c = lane % 4 * 4;
  const float u[4] = {beta * (v.x - column_sum(sk, c) * k_scale),
                      beta * (v.y - column_sum(sk, c + 1) * k_scale),
                      beta * (v.z - column_sum(sk, c + 2) * k_scale),
                      beta * (v.w - column_sum(sk, c + 3) * k_scale)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float key = k[i] * k_scale;
    s[i].x = fmaf(key, u[0], s[i].x), s[i].y = fmaf(key, u[1], s[i].y);
    s[i].z = fmaf(key, u[2], s[i].z), s[i].w = fmaf(key, u[3], s[i].w);
    *reinterpret_cast<float4*>(state + (row + i * 8) * kDim) = s[i];
  }
  if (threadIdx.x < 4) {
    const float scale = 1 / sqrtf(static_cast<float>(kDim));
    float4 o;
    o.x = (column_sum(sq, c) * q_scale + q_dot_k * u[0]) * scale;
    o.y = (column_sum(sq, c + 1) * q_scale + q_dot_k * u[1]) * scale;
    o.z = (column_sum(sq, c + 2) * q_scale + q_dot_k * u[2]) * scale;
    o.w = (column_sum(sq, c + 3) * q_scale + q_dot_k * u[3]) * scale;
    *reinterpret_cast<float4*>(p.o + base + column) = o;
  }
}

// Of the parts whose weights have one form.
Params params_of(Context& ctx, const StepLinearArgs& args, DType form) {
  Params p{};
  p.x = args.x.data;
  p.x_is_bf16 = args.x.dtype == DType::kBF16;
  p.batch = static_cast<int>(args.x.shape[0]);
  p.k = static_cast<int>(args.x.shape[1]);
  p.x_is_aligned = p.k % 4 == 0 && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0;
  p.staged = (p.k + kBlocks - 1) / kBlocks * kBlocks;
  if (args.norm.data != nullptr) {
    p.norm = args.norm.f32();
    p.norm_eps = args.norm_eps;
    p.norm_width = static_cast<int>(args.norm.shape.size());
  }
  const int tile_rows = is_packed(form) ? kPackedRows : kTileRows;
  int count = 0;
  for (const StepLinearPart& part : args.parts) {
    if (part.w.dtype != form) continue;
    const int rows = static_cast<int>(outputs_of(part));
    p.groups += (rows + tile_rows - 1) / tile_rows;
    Part& to = p.parts[count++];
    to.w = part.w.data;
    to.y = part.y.data;
    to.rows = rows;
    to.stride = static_cast<int>(part.y.shape[1]);
    to.end_group = p.groups;
    to.y_is_bf16 = part.y.dtype == DType::kBF16;
    to.epilogue = part.epilogue;
    if (part.epilogue == StepEpilogue::kConvSilu) {
      to.conv = static_cast<const float4*>(part.conv.data);
      to.conv_bias = static_cast<const float*>(part.conv_bias.data);
      to.conv_states = reinterpret_cast<float4* const*>(upload(ctx, part.conv_states));
    }
  }
  return p;
}

void launch_step(Context& ctx, const Params& p) {
  const bool two = p.batch > 8;
  const int chunk = chunk_for(p.k / kBlocks);
  const Kernel kernel = two ? kernel_for<2>(chunk) : kernel_for<1>(chunk);
  // Two thread blocks a multiprocessor have more loads under way. With 16 rows of x the second
  // costs more, as it stages x again and takes the registers in which the next kernel would start
  // loading.
  launch_frame(ctx, kernel, p, two ? 1 : 2);
}

}  // namespace

void step_linear(Context& ctx, const StepLinearArgs& args) {
  if (add_to_program(ctx, args)) return;
  run_step_program(ctx);  // what comes before
  // A launch has weights of one form.
  for (const DType form : {DType::kQ8, DType::kQ4, DType::kBF16}) {
    const Params p = params_of(ctx, args, form);
    if (p.groups == 0) continue;
    form == DType::kBF16 ? launch_step(ctx, p) : launch_packed_step(ctx, p, form);
  }
}

void delta_rule_step(Context& ctx, const DeltaRuleStepArgs& args) {
  if (add_to_program(ctx, args)) return;
  run_step_program(ctx);
  const DeltaStepParams p{.q = args.q.f32(),
                          .k = args.k.f32(),
                          .v = args.v.f32(),
                          .beta = args.beta.f32(),
                          .states = upload(ctx, args.states),
                          .o = args.o.f32(),
                          .heads = static_cast<int>(args.q.shape[1])};
  const dim3 grid(kStepHeadDim / kStepColumns, static_cast<unsigned>(args.q.shape[1]),
                  static_cast<unsigned>(args.q.shape[0]));
  launch_dependent(ctx, "delta_rule_step", delta_rule_step_kernel, grid, kStepThreads, 0, p);
}

}  // namespace deltafox::cuda
