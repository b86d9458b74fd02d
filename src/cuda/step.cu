// Decoding steps of up to 16 sequences: step_linear and delta_rule_step (ops/step.h).
//
// A step is bound by the weights, which are read once from device memory straight into the
// registers that the tensor cores multiply from. A thread block takes tiles of 8 rows of w; its 8
// warps share K between them, in blocks of 32 elements dealt out in turn, and their sums are added
// in order. A lane's 16 bytes of a block of 32 serve as operands of two products of 16: which
// elements are called k = 0, 1, ... does not matter to a sum as long as x has them in the same
// places. Before the input is there, weights are on their way: the first into registers, more into
// the L2 cache.
#include <cuda_bf16.h>

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/step_program.h"
#include "ops/step.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 8;  // of w
constexpr int kBlock = 32;    // elements of K
constexpr int kParts = static_cast<int>(kStepLinearParts);
constexpr int kPadding = 8;               // elements behind each row of x in shared memory
constexpr int kPrefetchBytes = 96 << 10;  // into the L2 cache, by each thread block

struct Part {
  const bf16* w;
  void* y;
  const float4* conv;          // [N]
  const float* conv_bias;      // [N] or null
  float4* const* conv_states;  // [B] in device memory, each [N]
  int rows;                    // N
  int stride;                  // N'
  int end_group;               // of tiles, over all parts so far
  bool y_is_bf16;
  StepEpilogue epilogue;
};

struct Params {
  const void* x;
  const float* norm;
  const float* gate;  // [B, K] or null
  float norm_eps;
  int norm_width;  // 0: none
  bool x_is_bf16;
  int batch;
  int k;
  int groups;  // in all
  Part parts[kParts];
};

__device__ inline uint4 load_stream(const bf16* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

__device__ inline void multiply(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A thread block's next tile: with kGlu each group is two tiles, the gate's rows and up's.
struct Tile {
  int part = 0;
  int group;
  int half = 0;

  __device__ explicit Tile(int first) : group(first) {}
  __device__ bool exists(const Params& p) const { return group < p.groups; }
  __device__ void find_part(const Params& p) {
    while (group >= p.parts[part].end_group) ++part;
  }
  __device__ bool is_glu(const Params& p) const {
    return p.parts[part].epilogue == StepEpilogue::kGlu;
  }
  __device__ void next(const Params& p) {
    if (is_glu(p) && half == 0) {
      half = 1;
      return;
    }
    half = 0;
    group += static_cast<int>(gridDim.x);
    if (exists(p)) find_part(p);
  }
  __device__ int first_row(const Params& p) const {
    return (group - (part == 0 ? 0 : p.parts[part - 1].end_group)) * kTileRows;
  }
  // Of the lane's row; rows behind the last are the last, and not stored.
  __device__ const bf16* weights(const Params& p, int row_in_tile) const {
    const Part& of = p.parts[part];
    const int row = min(first_row(p) + row_in_tile, of.rows - 1) + half * of.rows;
    return of.w + static_cast<std::int64_t>(row) * p.k;
  }
};

// x to shared memory [kRows][k + kPadding], normed; zeros behind the batch. What waits for memory
// is loaded before any of it is used: there is little else to do meanwhile.
template <int kRows>
__device__ void stage_input(const Params& p, bf16* staged) {
  constexpr int kKept = 12;  // vectors of a row that a lane keeps
  const int stride = p.k + kPadding;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const auto load = [&](float(&v)[4], int b, int i) {
    const std::int64_t at = static_cast<std::int64_t>(b) * p.k + i;
    if (b >= p.batch) {
      v[0] = v[1] = v[2] = v[3] = 0;
    } else if (p.x_is_bf16) {
      load_four(v, static_cast<const bf16*>(p.x) + at, kVector);
    } else {
      load_four(v, static_cast<const float*>(p.x) + at, kVector);
    }
  };
  const auto apply_gate = [&](float(&v)[4], int b, int i) {
    if (p.gate == nullptr || b >= p.batch) return;
    float z[4];
    load_four(z, p.gate + static_cast<std::int64_t>(b) * p.k + i, kVector);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] *= z[e] * sigmoid(z[e]);
  };
  if (p.norm_width == p.k) {  // a warp a row
    for (int b = warp; b < kRows; b += kWarps) {
      float kept[kKept][4];
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        if ((n * 32 + lane) * 4 < p.k) load(kept[n], b, (n * 32 + lane) * 4);
      }
      float sum = 0;
      const auto add = [&](const float(&v)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(v[e], v[e], sum);
      };
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        const int i = (n * 32 + lane) * 4;
        if (i >= p.k) continue;
        apply_gate(kept[n], b, i);
        add(kept[n]);
      }
      for (int i = (kKept * 32 + lane) * 4; i < p.k; i += 128) {
        float v[4];
        load(v, b, i);
        apply_gate(v, b, i);
        add(v);
      }
      const float scale = 1 / sqrtf(warp_sum(sum) / static_cast<float>(p.k) + p.norm_eps);
      const auto store = [&](float(&v)[4], int i) {
        float w[4];
        load_four(w, p.norm + i, kVector);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = v[e] * scale * w[e];
        store_four(staged + b * stride + i, v, kVector);
      };
#pragma unroll
      for (int n = 0; n < kKept; ++n) {
        if ((n * 32 + lane) * 4 < p.k) store(kept[n], (n * 32 + lane) * 4);
      }
      for (int i = (kKept * 32 + lane) * 4; i < p.k; i += 128) {
        float v[4];
        load(v, b, i);
        apply_gate(v, b, i);
        store(v, i);
      }
    }
    __syncthreads();
    return;
  }
  // A warp's turn is 128 elements of a row: one group of a norm in groups.
  constexpr int kTurns = 4;  // at a time
  const int turns_of_a_row = p.k / 128;
  const int turns = kRows * turns_of_a_row;
  for (int first = warp; first < turns; first += kWarps * kTurns) {
    float v[kTurns][4];
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const int turn = first + n * kWarps;
      if (turn < turns) load(v[n], turn / turns_of_a_row, turn % turns_of_a_row * 128 + lane * 4);
    }
#pragma unroll
    for (int n = 0; n < kTurns; ++n) {
      const int turn = first + n * kWarps;
      if (turn >= turns) continue;
      const int i = turn % turns_of_a_row * 128 + lane * 4;
      if (p.norm_width != 0) {
        const float sum =
            warp_sum(v[n][0] * v[n][0] + v[n][1] * v[n][1] + v[n][2] * v[n][2] + v[n][3] * v[n][3]);
        const float scale = 1 / sqrtf(sum / static_cast<float>(kStepHeadDim) + p.norm_eps);
        float w[4];
        load_four(w, p.norm + lane * 4, kVector);
#pragma unroll
        for (int e = 0; e < 4; ++e) v[n][e] = v[n][e] * scale * w[e];
      }
      store_four(staged + turn / turns_of_a_row * stride + i, v[n], kVector);
    }
  }
  __syncthreads();
}

__device__ inline void finish(const Params& p, const Tile& tile, int b, int column, float sum,
                              float& held) {
  const Part& part = p.parts[tile.part];
  const int row = tile.first_row(p) + column;
  if (b >= p.batch || row >= part.rows) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * part.stride + row;
  switch (part.epilogue) {
    case StepEpilogue::kStore:
      break;
    case StepEpilogue::kAdd:
      sum += static_cast<const float*>(part.y)[at];
      break;
    case StepEpilogue::kSigmoid:
      sum = sigmoid(sum);
      break;
    case StepEpilogue::kGlu:
      if (tile.half == 0) {
        held = sum;
        return;
      }
      sum *= held * sigmoid(held);
      break;
    case StepEpilogue::kConvSilu: {
      float4* state = part.conv_states[b] + row;
      const float4 old = *state;
      const float4 w = part.conv[row];
      *state = make_float4(old.y, old.z, old.w, sum);
      sum = fmaf(w.w, sum, fmaf(w.z, old.w, fmaf(w.y, old.z, w.x * old.y)));
      if (part.conv_bias != nullptr) sum += part.conv_bias[row];
      sum *= sigmoid(sum);
      break;
    }
  }
  if (part.y_is_bf16) {
    static_cast<bf16*>(part.y)[at] = __float2bfloat16(sum);
  } else {
    static_cast<float*>(part.y)[at] = sum;
  }
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

  Tile loading(static_cast<int>(blockIdx.x));
  loading.find_part(p);
  const bf16* from = loading.weights(p, row_in_tile) + offset;
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
      if (loading.exists(p)) from = loading.weights(p, row_in_tile) + offset;
    }
  };
  load_chunk();
  // One lane of each 64 bytes asks for the tiles to come.
  Tile coming = loading;
  const auto prefetch_tile = [&] {
    if (!coming.exists(p)) return;
    if (lane % 4 == 0) {
      const bf16* weights = coming.weights(p, row_in_tile) + offset;
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
  const int stride = p.k + kPadding;
  const bf16* x = staged + row_in_tile * stride + offset;
  for (Tile tile =
           [&] {
             Tile t(static_cast<int>(blockIdx.x));
             t.find_part(p);
             return t;
           }();
       tile.exists(p); tile.next(p)) {
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

}  // namespace

void step_linear(Context& ctx, const StepLinearArgs& args) {
  if (add_to_program(ctx, args)) return;
  run_step_program(ctx);  // what comes before
  Params p{};
  p.x = args.x.data;
  p.x_is_bf16 = args.x.dtype == DType::kBF16;
  p.batch = static_cast<int>(args.x.shape[0]);
  p.k = static_cast<int>(args.x.shape[1]);
  if (args.norm.data != nullptr) {
    p.norm = args.norm.f32();
    p.norm_eps = args.norm_eps;
    p.norm_width = static_cast<int>(args.norm.shape.size());
  }
  p.gate = static_cast<const float*>(args.gate.data);
  for (std::size_t i = 0; i < args.parts.size(); ++i) {
    const StepLinearPart& part = args.parts[i];
    const int rows = static_cast<int>(outputs_of(part));
    p.groups += (rows + kTileRows - 1) / kTileRows;
    Part& to = p.parts[i];
    to.w = static_cast<const bf16*>(part.w.data);
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
  const bool two = p.batch > 8;
  const int chunk = chunk_for(p.k / (kBlock * kWarps));
  const Kernel kernel = two ? kernel_for<2>(chunk) : kernel_for<1>(chunk);
  const std::size_t shared = static_cast<std::size_t>(two ? 16 : 8) *
                             static_cast<std::size_t>(p.k + kPadding) * sizeof(bf16);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        "cudaFuncSetAttribute");
  // Two thread blocks a multiprocessor have more loads under way. With 16 rows of x the second
  // costs more, as it stages x again and takes the registers in which the next kernel would start
  // loading.
  const int grid = std::min(p.groups, (two ? 1 : 2) * ctx.stream().multiprocessors());
  launch_dependent(ctx, "step_linear", kernel, dim3(static_cast<unsigned>(grid)), kThreads, shared,
                   p);
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
