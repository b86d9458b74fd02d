// Backward of the short convolution (ops/short_conv.h) and of delta_inputs (ops/delta_mixer.h),
// which is three of them at once: one pass over x and dy, bound by memory. A thread walks kRows
// rows of eight channels with the last inputs and the last gradients of sums in registers; three
// more rows give what the last of its rows get. Sums for the filter are taken row by row within a
// block's rows, then block by block.
#include <algorithm>
#include <span>

#include "cuda/batches.h"
#include "cuda/column_sums.cuh"
#include "cuda/eight.cuh"
#include "cuda/rows.cuh"
#include "ops/delta_mixer.h"
#include "ops/short_conv.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kRows = 64;     // of a sequence that a block walks
constexpr int kWidth = 4;     // taps of the fast kernel
constexpr int kChannels = 8;  // its channels, of a thread

// One convolution, blockIdx.z of a launch.
struct Part {
  const void* x;
  const void* dy;
  void* dx;
  const float* w;     // [C, W]
  const float* bias;  // [C] or null
  float* dw;          // [blocks, C, W] or null
  float* dbias;       // [blocks, C] or null
  int norm_width;     // or 0
};

// Of delta_inputs, β: of its logits' gradient `to` is the first element, and of zeros behind.
struct BetaPart {
  const float* logits;  // [T, H]
  const float* d;       // [T, H], or null where there is none
  void* to;
  int heads, columns;  // with the zeros
};

struct Params {
  static constexpr int kParts = 3;
  Part parts[kParts];
  BetaPart beta;
  bool is_bf16;           // x, dy and dx
  std::int64_t x_stride;  // of x
  std::int64_t dx_stride;
  int channels;
  int width;
  Activation activation;
};

// The rows of a block: [begin, end) of a sequence.
struct Rows {
  std::int64_t first;  // of the sequence, in the batch
  int length;          // of the sequence
  int begin;
  int end;

  __device__ Rows(const SequenceBatch& batch, int block) {
    int low = 0;
    int high = batch.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (batch.entries[middle].first_block <= block ? low : high) = middle;
    }
    const BatchEntry& entry = batch.entries[low];
    first = entry.begin;
    length = entry.length;
    begin = (block - entry.first_block) * kRows;
    end = min(begin + kRows, length);
  }
};

// Sums over the threads of a head, `lanes` of them, the same in all.
__device__ float2 head_sum(float2 sums, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sums.x += __shfl_xor_sync(0xffffffffU, sums.x, offset);
    sums.y += __shfl_xor_sync(0xffffffffU, sums.y, offset);
  }
  return sums;
}

template <typename T>
__device__ void beta_gradient(const Params& p, const Rows& rows) {
  const BetaPart& beta = p.beta;
  const int count = (rows.end - rows.begin) * beta.columns;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const std::int64_t row = rows.first + rows.begin + i / beta.columns;
    const int column = i % beta.columns;
    float d = 0;
    if (column < beta.heads) {
      const std::int64_t at = row * beta.heads + column;
      d = beta.d[at] * activation_slope(Activation::kSigmoid, beta.logits[at]);
    }
    from_float(static_cast<T*>(beta.to)[row * p.dx_stride + column], d);
  }
}

// kSilu: known as it is compiled, the activations of a row's channels are computed side by side.
template <typename T, bool kSilu, bool kNorm, bool kBias>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && !kBias ? 6 : 4)
    width_4_kernel(const __grid_constant__ Params p, const __grid_constant__ SequenceBatch batch) {
  const int own_channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kChannels;
  const bool exists = own_channel < p.channels;  // all threads of a warp take part in its sums
  const int channel = exists ? own_channel : 0;
  const Part& part = p.parts[blockIdx.z];
  const Activation activation = kSilu ? Activation::kSilu : p.activation;
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  if (p.beta.d != nullptr && blockIdx.x == 0 && blockIdx.z == 0) beta_gradient<T>(p, rows);
  const T* x_rows = static_cast<const T*>(part.x) + rows.first * p.x_stride + channel;
  const T* dy_rows = static_cast<const T*>(part.dy) + rows.first * p.channels + channel;
  T* dx_rows = static_cast<T*>(part.dx) + rows.first * p.dx_stride + channel;
  const bool has_norm = kNorm && part.norm_width > 0;
  float w[kChannels][kWidth];
  float bias[kChannels] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) load_four(w[c], part.w + (channel + c) * kWidth, kVector);
  if constexpr (kBias) {
    Eight<float> bits;
    bits.load(part.bias + channel);
    bits.get(bias);
  }
  // Of row t, at [(t − begin) % 4]: the input, and the gradient of the sum before the activation.
  float x[kWidth][kChannels] = {};
  float ds[kWidth][kChannels] = {};
#pragma unroll
  for (int i = 1; i < kWidth; ++i) {
    const int t = rows.begin - kWidth + i;
    if (t < 0) continue;
    Eight<T> bits;
    bits.load(x_rows + t * p.x_stride);
    bits.get(x[i]);
  }
  float dw[kChannels][kWidth] = {};
  float dbias[kChannels] = {};
  // Two rows are under way while two are worked on.
  constexpr int kAhead = kWidth / 2;
  Eight<T> x_bits[2][kAhead];
  Eight<T> dy_bits[2][kAhead];
  const auto fetch = [&](int half, int t) {
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      x_bits[half][r] = {};  // zeros behind the end
      dy_bits[half][r] = {};
      if (t + r >= rows.length) continue;
      x_bits[half][r].load(x_rows + (t + r) * p.x_stride);
      dy_bits[half][r].load(dy_rows + static_cast<std::ptrdiff_t>(t + r) * p.channels);
    }
  };
  fetch(0, rows.begin);
  for (int t = rows.begin; t < rows.end + kWidth - 1; t += kWidth) {
#pragma unroll
    for (int r = 0; r < kWidth; ++r) {
      if (r % kAhead == 0) fetch(1 - r / kAhead, t + r + kAhead);
      x_bits[r / kAhead][r % kAhead].get(x[r]);
      dy_bits[r / kAhead][r % kAhead].get(ds[r]);
      float act[kChannels];
      float slope[kChannels];
      float2 sums = make_float2(0, 0);  // of act², and of act · dy
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = bias[c];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum = fmaf(w[c][i], x[(r + 1 + i) % kWidth][c], sum);
        const float2 both = activate_with_slope<sizeof(T) == 2>(activation, sum);
        act[c] = both.x;
        slope[c] = both.y;
        if (has_norm) {
          sums.x = fmaf(act[c], act[c], sums.x);
          sums.y = fmaf(act[c], ds[r][c], sums.y);
        }
      }
      if (has_norm) {
        sums = head_sum(sums, part.norm_width / kChannels);
        const float scale = 1 / sqrtf(sums.x + 1e-6F);
        const float share = scale * scale * sums.y;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) ds[r][c] = scale * (ds[r][c] - share * act[c]);
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) ds[r][c] *= slope[c];
      if (t + r < rows.end) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if constexpr (kBias) dbias[c] += ds[r][c];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            dw[c][i] = fmaf(ds[r][c], x[(r + 1 + i) % kWidth][c], dw[c][i]);
          }
        }
      }
      const int to = t + r - (kWidth - 1);
      if (to < rows.begin || to >= rows.end) continue;
      float dx[kChannels] = {};
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          // Of row t + r − 3, whose tap i fed row t + r − i.
          dx[c] = fmaf(w[c][i], ds[(r + kWidth - i) % kWidth][c], dx[c]);
        }
      }
      if (exists) Eight<T>::store(dx_rows + to * p.dx_stride, dx);
    }
  }
  if (!exists) return;
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  if (part.dw != nullptr) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) store_four(part.dw + (sums + c) * kWidth, dw[c], kVector);
  }
  if (kBias && part.dbias != nullptr) Eight<float>::store(part.dbias + sums, dbias);
}

// Any width and any number of channels, one a thread.
__global__ void __launch_bounds__(kThreads)
    any_width_kernel(const __grid_constant__ Params p,
                     const __grid_constant__ SequenceBatch batch) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= p.channels) return;
  const Part& part = p.parts[0];
  const Elements x(part.x, p.is_bf16);
  const Elements dy(part.dy, p.is_bf16);
  const Elements to(part.dx, p.is_bf16);
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  const auto load = [&](const Elements& from, std::int64_t stride, int t) {
    if (t < 0 || t >= rows.length) return 0.0F;
    float v[4];
    from.load(v, (rows.first + t) * stride + channel, 1);
    return v[0];
  };
  const float* w = part.w + channel * p.width;
  const auto gradient_of_sum = [&](int t) {
    float sum = part.bias == nullptr ? 0 : part.bias[channel];
    for (int i = 0; i < p.width; ++i)
      sum = fmaf(w[i], load(x, p.x_stride, t - p.width + 1 + i), sum);
    return load(dy, p.channels, t) * activation_slope(p.activation, sum);
  };
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  float dbias = 0;
  for (int t = rows.begin; t < rows.end; ++t) {
    float dx[4] = {};
    for (int i = 0; i < p.width; ++i) {
      dx[0] = fmaf(w[i], gradient_of_sum(t + p.width - 1 - i), dx[0]);
    }
    to.store(dx, (rows.first + t) * p.dx_stride + channel, 1);
    const float ds = gradient_of_sum(t);
    dbias += ds;
    if (part.dw == nullptr) continue;
    float* dw = part.dw + sums * p.width;
    for (int i = 0; i < p.width; ++i) {
      dw[i] = fmaf(ds, load(x, p.x_stride, t - p.width + 1 + i), t == rows.begin ? 0 : dw[i]);
    }
  }
  if (part.dbias != nullptr) part.dbias[sums] = dbias;
}

using Kernel = void (*)(Params, SequenceBatch);

template <typename T, bool kSilu>
Kernel width_4_kernel_of(const Params& p) {
  if (p.parts[0].norm_width > 0) return width_4_kernel<T, kSilu, true, false>;
  return p.parts[0].bias != nullptr ? width_4_kernel<T, kSilu, false, true>
                                    : width_4_kernel<T, kSilu, false, false>;
}

template <typename T>
Kernel width_4_kernel_of(const Params& p) {
  return p.activation == Activation::kSilu ? width_4_kernel_of<T, true>(p)
                                           : width_4_kernel_of<T, false>(p);
}

// Whether the fast kernel takes it.
bool has_width_4(const ShortConvBackwardArgs& args) {
  return args.w.shape[1] == kWidth && args.w.shape[0] % kChannels == 0 &&
         args.x.shape[1] % kChannels == 0 && args.dy.dtype == args.x.dtype &&
         args.dx.dtype == args.x.dtype && Elements(args.x).aligned() &&
         Elements(args.dy).aligned() && Elements(args.dx).aligned() && Elements(args.w).aligned() &&
         Elements(args.bias).aligned();
}

}  // namespace

bool short_conv_backward_has_norm(const ShortConvBackwardArgs& args) {
  const std::int64_t lanes = args.norm_width / kChannels;
  return has_width_4(args) && args.bias.data == nullptr && args.norm_width % kChannels == 0 &&
         lanes <= 32 && (lanes & (lanes - 1)) == 0;
}

namespace {

// Where the gradients of a part's parameters are added.
struct Sums {
  float* dw;     // [C, W] or null
  float* dbias;  // [C] or null
};

// `fast`: on whole vectors, by the kernel of four taps.
void launch(Context& ctx, const char* op, const Sequences& sequences, Params p,
            std::span<const Sums> sums, bool fast) {
  const Kernel fast_kernel = p.is_bf16 ? width_4_kernel_of<bf16>(p) : width_4_kernel_of<float>(p);
  const Kernel kernel = fast ? fast_kernel : any_width_kernel;
  const auto block_channels = static_cast<unsigned>(kThreads * (fast ? kChannels : 1));
  const int taps = p.channels * p.width;
  for_each_batch(
      sequences, {}, [](int length) { return (length + kRows - 1) / kRows; },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          Part& part = p.parts[i];
          if (sums[i].dw != nullptr) part.dw = scratch.tensor({batch.blocks, taps}).f32();
          if (sums[i].dbias != nullptr) {
            part.dbias = scratch.tensor({batch.blocks, p.channels}).f32();
          }
        }
        const dim3 grid((static_cast<unsigned>(p.channels) + block_channels - 1) / block_channels,
                        static_cast<unsigned>(batch.blocks), static_cast<unsigned>(sums.size()));
        kernel<<<grid, kThreads, 0, stream_of(ctx)>>>(p, batch);
        check_launch(op);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          const Part& part = p.parts[i];
          if (part.dw != nullptr) {
            add_column_sums(ctx, op, batch.blocks, taps, sums[i].dw, MatrixElements{part.dw, taps});
          }
          if (part.dbias != nullptr) {
            add_column_sums(ctx, op, batch.blocks, p.channels, sums[i].dbias,
                            MatrixElements{part.dbias, p.channels});
          }
        }
      });
}

}  // namespace

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  Params p{};
  p.parts[0] = {.x = args.x.data,
                .dy = args.dy.data,
                .dx = args.dx.data,
                .w = args.w.f32(),
                .bias = static_cast<const float*>(args.bias.data),
                .dw = nullptr,
                .dbias = nullptr,
                .norm_width = static_cast<int>(args.norm_width)};
  p.is_bf16 = args.x.dtype == DType::kBF16;
  p.x_stride = args.x.shape[1];
  p.dx_stride = args.dx.shape[1];
  p.channels = static_cast<int>(args.w.shape[0]);
  p.width = static_cast<int>(args.w.shape[1]);
  p.activation = args.activation;
  const Sums sums{static_cast<float*>(args.dw.data), static_cast<float*>(args.dbias.data)};
  launch(ctx, "short_conv_backward", args.sequences, p, {&sums, 1}, has_width_4(args));
}

void delta_inputs_backward(Context& ctx, const DeltaInputsBackwardArgs& args) {
  const std::int64_t keys = args.dq.shape[2];
  const std::int64_t channels = args.dq.shape[1] * keys;
  const auto column = [&](const ConstTensorView& of, std::int64_t first) {
    return static_cast<std::byte*>(const_cast<void*>(of.data)) +
           static_cast<std::size_t>(first) * size_of(of.dtype);
  };
  Params p{};
  const auto part = [&](int index, const ConstTensorView& dy, const ConstTensorView& w,
                        std::int64_t norm_width) {
    p.parts[index] = {.x = column(args.projected, index * channels),
                      .dy = dy.data,
                      .dx = column(args.d_projected, index * channels),
                      .w = w.f32(),
                      .bias = nullptr,
                      .dw = nullptr,
                      .dbias = nullptr,
                      .norm_width = static_cast<int>(norm_width)};
  };
  part(0, args.dq, args.q, keys);
  part(1, args.dk, args.k, keys);
  part(2, args.dv, args.v, 0);
  p.beta = {.logits = args.beta_logits.f32(),
            .d = args.dbeta.f32(),
            .to = column(args.d_projected, 3 * channels),
            .heads = static_cast<int>(args.dq.shape[1]),
            .columns = static_cast<int>(args.d_projected.shape[1] - 3 * channels)};
  p.is_bf16 = args.projected.dtype == DType::kBF16;
  p.x_stride = 3 * channels;
  p.dx_stride = args.d_projected.shape[1];
  p.channels = static_cast<int>(channels);
  p.width = kWidth;
  p.activation = Activation::kSilu;
  const Sums sums[] = {
      {args.dq_conv.f32(), nullptr}, {args.dk_conv.f32(), nullptr}, {args.dv_conv.f32(), nullptr}};
  launch(ctx, "delta_inputs_backward", args.sequences, p, sums, true);
}

}  // namespace deltafox::cuda
