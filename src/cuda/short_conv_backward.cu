// Backward of the short convolution (ops/short_conv.h): one pass over x and dy, bound by memory. A
// thread walks kRows rows of four channels with the last inputs and the last gradients of sums in
// registers; three more rows give what the last of its rows get. Sums for the filter are taken row
// by row within a block's rows, then block by block.
#include <algorithm>

#include "cuda/batches.h"
#include "cuda/column_sums.cuh"
#include "cuda/rows.cuh"
#include "ops/short_conv.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;     // of a sequence that a block walks
constexpr int kWidth = 4;     // taps of the fast kernel
constexpr int kChannels = 4;  // its channels

struct Params {
  Elements x, dy, dx;
  const float* w;     // [C, W]
  const float* bias;  // [C] or null
  float* dw;          // [blocks, C, W] or null
  float* dbias;       // [blocks, C] or null
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

__global__ void __launch_bounds__(kThreads)
    width_4_kernel(const __grid_constant__ Params p, const __grid_constant__ SequenceBatch batch) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) * kChannels;
  if (channel >= p.channels) return;
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  const auto at = [&](int t) { return (rows.first + t) * p.channels + channel; };
  float w[kChannels][kWidth];
  float bias[kChannels] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) load_four(w[c], p.w + (channel + c) * kWidth, kVector);
  if (p.bias != nullptr) load_four(bias, p.bias + channel, kVector);
  // Of row t, at [(t − begin) % 4]: the input, and the gradient of the sum before the activation.
  float x[kWidth][kChannels] = {};
  float ds[kWidth][kChannels] = {};
#pragma unroll
  for (int i = 1; i < kWidth; ++i) {
    const int t = rows.begin - kWidth + i;
    if (t >= 0) p.x.load(x[i], at(t), kVector);
  }
  float dw[kChannels][kWidth] = {};
  float dbias[kChannels] = {};
  for (int t = rows.begin; t < rows.end + kWidth - 1; t += kWidth) {
    uint4 x_bits[kWidth] = {};
    uint4 dy_bits[kWidth] = {};
#pragma unroll
    for (int r = 0; r < kWidth; ++r) {
      if (t + r >= rows.length) break;
      x_bits[r] = p.x.fetch(at(t + r), kVector);
      dy_bits[r] = p.dy.fetch(at(t + r), kVector);
    }
#pragma unroll
    for (int r = 0; r < kWidth; ++r) {
      float dx[kChannels] = {};
      p.x.widen(x[r], x_bits[r]);
      p.dy.widen(ds[r], dy_bits[r]);  // zeros behind the end
      const float own = t + r < rows.end ? 1 : 0;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = bias[c];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum = fmaf(w[c][i], x[(r + 1 + i) % kWidth][c], sum);
        ds[r][c] *= activation_slope(p.activation, sum);
        dbias[c] += own * ds[r][c];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          dw[c][i] = fmaf(own * ds[r][c], x[(r + 1 + i) % kWidth][c], dw[c][i]);
          // Of row t + r − 3, whose tap i fed row t + r − i.
          dx[c] = fmaf(w[c][i], ds[(r + kWidth - i) % kWidth][c], dx[c]);
        }
      }
      const int to = t + r - (kWidth - 1);
      if (to >= rows.begin && to < rows.end) p.dx.store(dx, at(to), kVector);
    }
  }
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  if (p.dw != nullptr) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) store_four(p.dw + (sums + c) * kWidth, dw[c], kVector);
  }
  if (p.dbias != nullptr) store_four(p.dbias + sums, dbias, kVector);
}

// Any width and any number of channels, one a thread.
__global__ void __launch_bounds__(kThreads)
    any_width_kernel(const __grid_constant__ Params p,
                     const __grid_constant__ SequenceBatch batch) {
  const int channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= p.channels) return;
  const Rows rows(batch, static_cast<int>(blockIdx.y));
  const auto load = [&](const Elements& from, int t) {
    if (t < 0 || t >= rows.length) return 0.0F;
    float v[4];
    from.load(v, (rows.first + t) * p.channels + channel, 1);
    return v[0];
  };
  const float* w = p.w + channel * p.width;
  const auto gradient_of_sum = [&](int t) {
    float sum = p.bias == nullptr ? 0 : p.bias[channel];
    for (int i = 0; i < p.width; ++i) sum = fmaf(w[i], load(p.x, t - p.width + 1 + i), sum);
    return load(p.dy, t) * activation_slope(p.activation, sum);
  };
  const std::int64_t sums = static_cast<std::int64_t>(blockIdx.y) * p.channels + channel;
  float dbias = 0;
  for (int t = rows.begin; t < rows.end; ++t) {
    float dx[4] = {};
    for (int i = 0; i < p.width; ++i) {
      dx[0] = fmaf(w[i], gradient_of_sum(t + p.width - 1 - i), dx[0]);
    }
    p.dx.store(dx, (rows.first + t) * p.channels + channel, 1);
    const float ds = gradient_of_sum(t);
    dbias += ds;
    if (p.dw == nullptr) continue;
    float* dw = p.dw + sums * p.width;
    for (int i = 0; i < p.width; ++i) {
      dw[i] = fmaf(ds, load(p.x, t - p.width + 1 + i), t == rows.begin ? 0 : dw[i]);
    }
  }
  if (p.dbias != nullptr) p.dbias[sums] = dbias;
}

}  // namespace

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  Params p{.x = Elements(args.x),
           .dy = Elements(args.dy),
           .dx = Elements(args.dx),
           .w = args.w.f32(),
           .bias = static_cast<const float*>(args.bias.data),
           .dw = nullptr,
           .dbias = nullptr,
           .channels = static_cast<int>(args.x.shape[1]),
           .width = static_cast<int>(args.w.shape[1]),
           .activation = args.activation};
  const bool fast = p.width == kWidth && p.channels % kChannels == 0 && p.x.aligned() &&
                    p.dy.aligned() && p.dx.aligned() && Elements(args.w).aligned() &&
                    Elements(args.bias).aligned();
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
        (fast ? width_4_kernel : any_width_kernel)<<<grid, kThreads, 0, stream_of(ctx)>>>(p, batch);
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
