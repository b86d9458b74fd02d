// Backward of the short convolution (ops/short_conv.h): one pass over x and dy, bound by memory. A
// thread walks kRows rows of eight channels with the last inputs and the last gradients of sums in
// registers; three more rows give what the last of its rows get. Sums for the filter are taken row
// by row within a block's rows, then block by block.
#include <algorithm>

#include "cuda/batches.h"
#include "cuda/column_sums.cuh"
#include "cuda/eight.cuh"
#include "cuda/rows.cuh"
#include "ops/short_conv.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kRows = 64;     // of a sequence that a block walks
constexpr int kWidth = 4;     // taps of the fast kernel
constexpr int kChannels = 8;  // its channels

struct Params {
  Elements x, dy, dx;
  const float* w;         // [C, W]
  const float* bias;      // [C] or null
  float* dw;              // [blocks, C, W] or null
  float* dbias;           // [blocks, C] or null
  std::int64_t x_stride;  // of x and dx
  int channels;
  int width;
  int norm_width;  // or 0
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

// kSilu: known as it is compiled, the activations of a row's channels are computed side by side.
template <typename T, bool kSilu, bool kNorm, bool kBias>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && !kBias ? 6 : 4)
    width_4_kernel(const __grid_constant__ Params p, const __grid_constant__ SequenceBatch batch) {
  const int own_channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kChannels;
  const bool exists = own_channel < p.channels;  // all threads of a warp take part in its sums
  const int channel = exists ? own_channel : 0;
  const Activation activation = kSilu ? Activation::kSilu : p.activation;
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  const std::ptrdiff_t first = rows.first * p.x_stride + channel;
  const T* x_rows = static_cast<const T*>(p.x.data) + first;
  const T* dy_rows = static_cast<const T*>(p.dy.data) + rows.first * p.channels + channel;
  T* dx_rows = static_cast<T*>(p.dx.data) + first;
  const auto at = [&](int t) { return t * p.x_stride; };
  float w[kChannels][kWidth];
  float bias[kChannels] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) load_four(w[c], p.w + (channel + c) * kWidth, kVector);
  if constexpr (kBias) {
    Eight<float> bits;
    bits.load(p.bias + channel);
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
    bits.load(x_rows + at(t));
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
      x_bits[half][r].load(x_rows + at(t + r));
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
        if constexpr (kNorm) {
          sums.x = fmaf(act[c], act[c], sums.x);
          sums.y = fmaf(act[c], ds[r][c], sums.y);
        }
      }
      if constexpr (kNorm) {
        sums = head_sum(sums, p.norm_width / kChannels);
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
      if (exists) Eight<T>::store(dx_rows + at(to), dx);
    }
  }
  if (!exists) return;
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  if (p.dw != nullptr) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) store_four(p.dw + (sums + c) * kWidth, dw[c], kVector);
  }
  if (kBias && p.dbias != nullptr) Eight<float>::store(p.dbias + sums, dbias);
}

// Any width and any number of channels, one a thread.
__global__ void __launch_bounds__(kThreads)
    any_width_kernel(const __grid_constant__ Params p,
                     const __grid_constant__ SequenceBatch batch) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= p.channels) return;
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  const auto load = [&](const Elements& from, std::int64_t stride, int t) {
    if (t < 0 || t >= rows.length) return 0.0F;
    float v[4];
    from.load(v, (rows.first + t) * stride + channel, 1);
    return v[0];
  };
  const float* w = p.w + channel * p.width;
  const auto gradient_of_sum = [&](int t) {
    float sum = p.bias == nullptr ? 0 : p.bias[channel];
    for (int i = 0; i < p.width; ++i)
      sum = fmaf(w[i], load(p.x, p.x_stride, t - p.width + 1 + i), sum);
    return load(p.dy, p.channels, t) * activation_slope(p.activation, sum);
  };
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  float dbias = 0;
  for (int t = rows.begin; t < rows.end; ++t) {
    float dx[4] = {};
    for (int i = 0; i < p.width; ++i) {
      dx[0] = fmaf(w[i], gradient_of_sum(t + p.width - 1 - i), dx[0]);
    }
    p.dx.store(dx, (rows.first + t) * p.x_stride + channel, 1);
    const float ds = gradient_of_sum(t);
    dbias += ds;
    if (p.dw == nullptr) continue;
    float* dw = p.dw + sums * p.width;
    for (int i = 0; i < p.width; ++i) {
      dw[i] = fmaf(ds, load(p.x, p.x_stride, t - p.width + 1 + i), t == rows.begin ? 0 : dw[i]);
    }
  }
  if (p.dbias != nullptr) p.dbias[sums] = dbias;
}

using Kernel = void (*)(Params, SequenceBatch);

template <typename T, bool kSilu>
Kernel width_4_kernel_of(const Params& p) {
  if (p.norm_width > 0) return width_4_kernel<T, kSilu, true, false>;
  return p.bias != nullptr ? width_4_kernel<T, kSilu, false, true>
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

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  Params p{.x = Elements(args.x),
           .dy = Elements(args.dy),
           .dx = Elements(args.dx),
           .w = args.w.f32(),
           .bias = static_cast<const float*>(args.bias.data),
           .dw = nullptr,
           .dbias = nullptr,
           .x_stride = args.x.shape[1],
           .channels = static_cast<int>(args.w.shape[0]),
           .width = static_cast<int>(args.w.shape[1]),
           .norm_width = static_cast<int>(args.norm_width),
           .activation = args.activation};
  const bool fast = has_width_4(args);
  const Kernel fast_kernel =
      args.x.dtype == DType::kBF16 ? width_4_kernel_of<bf16>(p) : width_4_kernel_of<float>(p);
  const Kernel kernel = fast ? fast_kernel : any_width_kernel;
  const auto block_channels = static_cast<unsigned>(kThreads * (fast ? kChannels : 1));
  for_each_batch(
      args.sequences, {}, [](int length) { return (length + kRows - 1) / kRows; },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        if (args.dw.data != nullptr) {
          p.dw = scratch.tensor({batch.blocks, p.channels, p.width}).f32();
        }
        if (args.dbias.data != nullptr) {
          p.dbias = scratch.tensor({batch.blocks, p.channels}).f32();
        }
        const dim3 grid((static_cast<unsigned>(p.channels) + block_channels - 1) / block_channels,
                        static_cast<unsigned>(batch.blocks));
        kernel<<<grid, kThreads, 0, stream_of(ctx)>>>(p, batch);
        check_launch("short_conv_backward");
        const int taps = p.channels * p.width;
        if (p.dw != nullptr) {
          add_column_sums(ctx, "short_conv_backward", batch.blocks, taps, args.dw.f32(),
                          MatrixElements{p.dw, taps});
        }
        if (p.dbias != nullptr) {
          add_column_sums(ctx, "short_conv_backward", batch.blocks, p.channels, args.dbias.f32(),
                          MatrixElements{p.dbias, p.channels});
        }
      });
}

}  // namespace deltafox::cuda
