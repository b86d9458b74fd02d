// delta_inputs and delta_token (ops/delta_mixer.h): memory bound.
//
// delta_inputs: a thread walks some rows of eight channels of q, k or v with the last inputs in
// registers; the lanes that share a head sum its squares row by row. The warp of a sequence's
// first rows also replaces its state, which only it reads. A warp asks for its taps, what lies
// before its rows and its first rows together, so up to some length all of a prompt is under way at
// once. The first blocks have β, a longer way: on the tensor cores where it is not there yet.
//
// delta_token: a block owns a head of a sequence. Its state, 64 KB, is in registers, asked for
// before the block waits for the products of the same step.
#include <algorithm>

#include "cuda/conv_window.cuh"
#include "cuda/delta_inputs.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/delta_mixer.h"

namespace deltafox::cuda {
namespace {

constexpr int kWidth = kConvWidth;

// ---- Prompts ----------------------------------------------------------------------------------

constexpr int kInputThreads = 128;
constexpr int kInputWarps = kInputThreads / 32;
template <typename T>
constexpr int kInputBlocks = sizeof(T) == 2 ? 4 : 3;  // of a multiprocessor
constexpr int kChannels = kConvChannels;              // of a thread
constexpr int kWarpChannels = 32 * kChannels;

struct InputSequence {
  float* states[3];  // of q, k, v
  int begin;         // its first row
  int length;
  int first_group;  // of rows, over the sequences before it
};

struct InputsParams {
  static constexpr int kLimit = 64;
  const void* projected;
  const float* conv[3];
  void* out[3];
  float* beta;
  const void* x;       // [T, C] and
  const void* b_proj;  // [H, C], or null: then beta has the logits
  int width;           // C
  int heads;
  int head_lanes;     // K / 8
  int channels;       // H·K
  int warps_of_part;  // of q, k or v, for a group of rows
  int beta_blocks;    // the first ones
  int rows;           // of a group, a multiple of kWidth
  int groups;
  int first_row;  // of all sequences
  int end_row;
  int count;
  InputSequence sequences[kLimit];
};

template <typename T>
__global__ void __launch_bounds__(kInputThreads, kInputBlocks<T>)
    delta_inputs_kernel(const __grid_constant__ InputsParams p) {
  if (static_cast<int>(blockIdx.x) < p.beta_blocks) {
    __shared__ BetaSums sums;
    wait_for_input();
    for (int row = p.first_row + static_cast<int>(blockIdx.x) * kBetaRows; row < p.end_row;
         row += p.beta_blocks * kBetaRows) {
      const int count = min(kBetaRows, p.end_row - row);
      if (p.b_proj != nullptr) {
        beta_rows<kInputWarps>({.x = static_cast<const bf16*>(p.x),
                                .b_proj = static_cast<const bf16*>(p.b_proj),
                                .width = p.width,
                                .heads = p.heads,
                                .beta = p.beta},
                               row, count, sums);
        continue;
      }
      float* beta = p.beta + static_cast<std::int64_t>(row) * p.heads;
      for (int i = static_cast<int>(threadIdx.x); i < count * p.heads; i += kInputThreads) {
        beta[i] = sigmoid(beta[i]);
      }
    }
    return;
  }
  const int warp = uniform((static_cast<int>(blockIdx.x) - p.beta_blocks) * kInputWarps +
                           static_cast<int>(threadIdx.x) / 32);
  const int columns = 3 * p.warps_of_part;
  const int group = warp / columns;
  if (group >= p.groups) return;
  int low = 0;
  int high = p.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.sequences[middle].first_group <= group ? low : high) = middle;
  }
  const InputSequence& sequence = p.sequences[low];
  const int begin = (group - sequence.first_group) * p.rows;
  const int end = min(begin + p.rows, sequence.length);

  const int part = warp % columns / p.warps_of_part;
  // Lanes behind the last channel repeat it, for the sums over a warp.
  const int wanted = warp % columns % p.warps_of_part * kWarpChannels +
                     static_cast<int>(threadIdx.x) % 32 * kChannels;
  const bool real = wanted < p.channels;
  const int channel = real ? wanted : p.channels - kChannels;
  const std::int64_t stride = 3 * static_cast<std::int64_t>(p.channels);
  const T* x = static_cast<const T*>(p.projected) + sequence.begin * stride +
               static_cast<std::int64_t>(part) * p.channels + channel;
  T* y = static_cast<T*>(p.out[part]) + static_cast<std::int64_t>(sequence.begin) * p.channels +
         channel;

  float w[kChannels][kWidth];
  float window[kWidth][kChannels];  // of row t, input t − 3 + i at [(t + 1 + i) % 4]
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    load_four(w[c], p.conv[part] + (channel + c) * kWidth, kVector);
  }
  wait_for_input();
  // Four rows are asked for before the four ahead of them are computed.
  Eight<T> next[kWidth];
  const auto load = [&](int t) {
#pragma unroll
    for (int r = 0; r < kWidth; ++r) next[r].load(x + min(t + r, end - 1) * stride);
  };
  load(begin);
  if (begin == 0) {
    replace_conv_state(window, sequence.states[part] + channel * kWidth, x, stride, sequence.length,
                       real);
  } else {
    Eight<T> before[kWidth];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) before[i].load(x + (begin - kWidth + i) * stride);
#pragma unroll
    for (int i = 1; i < kWidth; ++i) before[i].get(window[i]);
  }
  scale_taps<T>(w);
  for (int t = begin; t < end; t += kWidth) {
    Eight<T> now[kWidth];
#pragma unroll
    for (int r = 0; r < kWidth; ++r) now[r] = next[r];
    if (t + kWidth < end) load(t + kWidth);
#pragma unroll
    for (int first = 0; first < kWidth; first += kAtOnce) {
      float out[kAtOnce][kChannels];
      convolve_rows<T>(out, now, first, window, w, part < 2 ? p.head_lanes : 0);
#pragma unroll
      for (int a = 0; a < kAtOnce; ++a) {
        const int row = t + first + a;
        if (real && row < end) {
          Eight<T>::store(y + static_cast<std::int64_t>(row) * p.channels, out[a]);
        }
      }
    }
  }
}

template <typename T>
void launch(Context& ctx, const InputsParams& p) {
  const int warps = 3 * p.warps_of_part * p.groups;
  const int blocks = p.beta_blocks + (warps + kInputWarps - 1) / kInputWarps;
  launch_dependent(ctx, "delta_inputs", delta_inputs_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                   kInputThreads, 0, p);
}

// ---- One token of each sequence ---------------------------------------------------------------

constexpr int kDim = static_cast<int>(kDeltaTokenHead);
constexpr int kTokenThreads = 256;
constexpr int kTokenWarps = kTokenThreads / 32;
constexpr int kTokenRows = kDim / kTokenWarps;  // of the state, of a warp

struct TokenParams {
  const void* projected;
  const float4* conv[3];
  float4* const* conv_states[3];
  const void* x;
  const void* b_proj;
  int width;  // C
  float* const* states;
  const float* norm;
  float norm_eps;
  void* o;
  int heads;
};

template <typename T>
__global__ void __launch_bounds__(kTokenThreads, 2)
    delta_token_kernel(const __grid_constant__ TokenParams p) {
  __shared__ __align__(16) float inputs[3][kDim];
  __shared__ __align__(16) float parts[2][kTokenWarps][kDim];  // of Sᵀq and Sᵀk
  __shared__ float recalled[kDim];
  __shared__ __align__(16) float u[kDim];
  __shared__ float squares[kTokenWarps];
  __shared__ float dots[4];
  __shared__ float output_squares[4];
  __shared__ float beta_parts[kTokenWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int head = static_cast<int>(blockIdx.x);
  const int b = static_cast<int>(blockIdx.y);
  const int channels = p.heads * kDim;
  float4* state =
      reinterpret_cast<float4*>(p.states[b] + static_cast<std::int64_t>(head) * kDim * kDim) +
      warp * kTokenRows * (kDim / 4) + lane;
  float4 s[kTokenRows];
#pragma unroll
  for (int i = 0; i < kTokenRows; ++i) s[i] = __ldcs(state + i * (kDim / 4));

  // The first half of the threads has q and then v, the second k.
  const int own = thread % kDim;
  const int channel = head * kDim + own;
  const int first_part = thread / kDim;
  const bool has_v = first_part == 0;
  float4 old[2];
  float4 w[2];
  old[0] = p.conv_states[first_part][b][channel];
  w[0] = p.conv[first_part][channel];
  if (has_v) {
    old[1] = p.conv_states[2][b][channel];
    w[1] = p.conv[2][channel];
  }
  const float norm = p.norm[own];
  wait_for_input();

  const T* x = static_cast<const T*>(p.projected) + static_cast<std::int64_t>(b) * 3 * channels;
  float beta_sum = 0;
  for (int c = thread * 8; c < p.width; c += kTokenThreads * 8) {
    Eight<T> input;
    Eight<T> weight;
    input.load(static_cast<const T*>(p.x) + static_cast<std::int64_t>(b) * p.width + c);
    weight.load(static_cast<const T*>(p.b_proj) + static_cast<std::int64_t>(head) * p.width + c);
    float inputs_of[8];
    float weights_of[8];
    input.get(inputs_of);
    weight.get(weights_of);
#pragma unroll
    for (int e = 0; e < 8; ++e) beta_sum = fmaf(inputs_of[e], weights_of[e], beta_sum);
  }
  beta_sum = warp_sum(beta_sum);
  if (lane == 0) beta_parts[warp] = beta_sum;
  const auto convolve = [&](int part, const float4& before, const float4& taps) {
    const float now = to_float(x[part * channels + channel]);
    p.conv_states[part][b][channel] = make_float4(before.y, before.z, before.w, now);
    return silu<T>(
        fmaf(taps.w, now, fmaf(taps.z, before.w, fmaf(taps.y, before.z, taps.x * before.y))));
  };
  const float key_or_query = convolve(first_part, old[0], w[0]);
  inputs[first_part][own] = key_or_query;
  float v = 0;
  if (has_v) v = convolve(2, old[1], w[1]);
  const float sum = warp_sum(key_or_query * key_or_query);
  if (lane == 0) squares[warp] = sum;
  __syncthreads();

  if (has_v) {
    const float dot = warp_sum(key_or_query * inputs[1][own]);
    if (lane == 0) dots[warp] = dot;
  }
  float4 sums_q{};
  float4 sums_k{};
  float keys[kTokenRows];
#pragma unroll
  for (int i = 0; i < kTokenRows; ++i) {
    const float q = inputs[0][warp * kTokenRows + i];
    keys[i] = inputs[1][warp * kTokenRows + i];
    sums_q.x = fmaf(s[i].x, q, sums_q.x), sums_q.y = fmaf(s[i].y, q, sums_q.y);
    sums_q.z = fmaf(s[i].z, q, sums_q.z), sums_q.w = fmaf(s[i].w, q, sums_q.w);
    sums_k.x = fmaf(s[i].x, keys[i], sums_k.x), sums_k.y = fmaf(s[i].y, keys[i], sums_k.y);
    sums_k.z = fmaf(s[i].z, keys[i], sums_k.z), sums_k.w = fmaf(s[i].w, keys[i], sums_k.w);
  }
  *reinterpret_cast<float4*>(&parts[0][warp][4 * lane]) = sums_q;
  *reinterpret_cast<float4*>(&parts[1][warp][4 * lane]) = sums_k;
  __syncthreads();

  const auto four = [](const float* from) { return (from[0] + from[1]) + (from[2] + from[3]); };
  const float q_scale = 1 / sqrtf(four(squares) + kNormEps);
  const float k_scale = 1 / sqrtf(four(squares + 4) + kNormEps);
  float column = 0;  // of Sᵀq in the first half, of Sᵀk in the second
#pragma unroll
  for (int i = 0; i < kTokenWarps; ++i) column += parts[first_part][i][own];
  if (!has_v) recalled[own] = column * k_scale;
  __syncthreads();
  float o = 0;
  if (has_v) {
    const float beta = sigmoid(four(beta_parts) + four(beta_parts + 4));
    const float own_u = beta * (v - recalled[own]);
    u[own] = own_u;
    o = (column * q_scale + four(dots) * q_scale * k_scale * own_u) *
        (1 / sqrtf(static_cast<float>(kDim)));
    const float sum_of_squares = warp_sum(o * o);
    if (lane == 0) output_squares[warp] = sum_of_squares;
  }
  __syncthreads();
  const float4 update = *reinterpret_cast<const float4*>(&u[4 * lane]);
#pragma unroll
  for (int i = 0; i < kTokenRows; ++i) {
    const float key = keys[i] * k_scale;
    s[i].x = fmaf(key, update.x, s[i].x), s[i].y = fmaf(key, update.y, s[i].y);
    s[i].z = fmaf(key, update.z, s[i].z), s[i].w = fmaf(key, update.w, s[i].w);
    __stcs(state + i * (kDim / 4), s[i]);
  }
  if (has_v) {
    const float mean = four(output_squares) / static_cast<float>(kDim);
    from_float(static_cast<T*>(p.o)[static_cast<std::int64_t>(b) * channels + channel],
               o * (1 / sqrtf(mean + p.norm_eps)) * norm);
  }
}

}  // namespace

void delta_inputs(Context& ctx, const DeltaInputsArgs& args) {
  const DeltaConvolutions& of = args.convolutions;
  InputsParams p{};
  p.projected = args.projected.data;
  p.conv[0] = of.q.f32(), p.conv[1] = of.k.f32(), p.conv[2] = of.v.f32();
  p.out[0] = args.q.data, p.out[1] = args.k.data, p.out[2] = args.v.data;
  p.beta = args.beta.f32();
  p.heads = static_cast<int>(args.q.shape[1]);
  p.head_lanes = static_cast<int>(args.q.shape[2]) / kChannels;
  p.channels = p.heads * static_cast<int>(args.q.shape[2]);
  p.warps_of_part = (p.channels + kWarpChannels - 1) / kWarpChannels;
  if (args.x.data != nullptr) {
    p.x = args.x.data;
    p.b_proj = args.b_proj.data;
    p.width = static_cast<int>(args.x.shape[1]);
  }
  const bool is_bf16 = args.q.dtype == DType::kBF16;
  const int multiprocessors = ctx.stream().multiprocessors();
  const auto tokens = static_cast<int>(args.sequences.tokens());
  const int beta_blocks = std::min((tokens + kBetaRows - 1) / kBetaRows, multiprocessors);
  // As few rows as let all blocks run at once. Of long prompts those would be many, and short walks
  // one after the other are faster.
  constexpr int kMostRows = 32;
  const int blocks_at_once = is_bf16 ? kInputBlocks<bf16> : kInputBlocks<float>;
  const int room = multiprocessors * blocks_at_once - beta_blocks;
  const int groups = std::max(1, room * kInputWarps / (3 * p.warps_of_part));
  p.rows = std::min(((tokens + groups - 1) / groups + kWidth - 1) / kWidth * kWidth, kMostRows);
  const auto run = [&] {
    p.beta_blocks = std::min((p.end_row - p.first_row + kBetaRows - 1) / kBetaRows, beta_blocks);
    is_bf16 ? launch<bf16>(ctx, p) : launch<float>(ctx, p);
    p.count = p.groups = 0;
  };
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const auto at = static_cast<std::size_t>(b);
    const int length = static_cast<int>(args.sequences.length(b));
    if (length == 0) continue;
    const int begin = static_cast<int>(args.sequences.begin(b));
    if (p.count == 0) p.first_row = begin;
    p.end_row = begin + length;
    p.sequences[p.count++] = {.states = {of.q_states[at], of.k_states[at], of.v_states[at]},
                              .begin = begin,
                              .length = length,
                              .first_group = p.groups};
    p.groups += (length + p.rows - 1) / p.rows;
    if (p.count == InputsParams::kLimit) run();
  }
  if (p.count > 0) run();
}

void delta_token(Context& ctx, const DeltaTokenArgs& args) {
  const DeltaConvolutions& of = args.convolutions;
  const auto taps = [](const ConstTensorView& w) { return static_cast<const float4*>(w.data); };
  const auto states = [&](std::span<float* const> pointers) {
    return reinterpret_cast<float4* const*>(upload(ctx, pointers));
  };
  const TokenParams p{
      .projected = args.projected.data,
      .conv = {taps(of.q), taps(of.k), taps(of.v)},
      .conv_states = {states(of.q_states), states(of.k_states), states(of.v_states)},
      .x = args.x.data,
      .b_proj = args.b_proj.data,
      .width = static_cast<int>(args.x.shape[1]),
      .states = upload(ctx, args.states),
      .norm = args.norm.f32(),
      .norm_eps = args.norm_eps,
      .o = args.o.data,
      .heads = static_cast<int>(args.b_proj.shape[0])};
  const dim3 grid(static_cast<unsigned>(args.b_proj.shape[0]),
                  static_cast<unsigned>(args.x.shape[0]));
  const auto kernel =
      args.o.dtype == DType::kBF16 ? delta_token_kernel<bf16> : delta_token_kernel<float>;
  launch_dependent(ctx, "delta_token", kernel, grid, kTokenThreads, 0, p);
}

}  // namespace deltafox::cuda
