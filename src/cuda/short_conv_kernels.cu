// The short convolution (ops/short_conv.h): memory bound. A thread walks kShortConvRows rows of
// eight channels (or one, where width or alignment are unusual) with the last inputs in registers.
// The block of a sequence's first rows also replaces its state, which only it reads.
#include "cuda/check.h"
#include "cuda/conv_window.cuh"
#include "cuda/short_conv_kernels.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 64;

// The rows of a block: part of one sequence.
struct Rows {
  const BatchEntry* entry;
  int begin;  // within the sequence
  int end;
};

__device__ Rows find_rows(const SequenceBatch& batch, int block) {
  int low = 0;
  int high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_block <= block ? low : high) = middle;
  }
  const BatchEntry& entry = batch.entries[low];
  const int begin = (block - entry.first_block) * kShortConvRows;
  return {&entry, begin, min(begin + kShortConvRows, entry.length)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    short_conv_width_4(const __grid_constant__ ShortConvProblem p,
                       const __grid_constant__ SequenceBatch batch) {
  constexpr int kWidth = 4;
  constexpr int kChannels = 8;
  const int channel = (blockIdx.x * kThreads + threadIdx.x) * kChannels;
  if (channel >= p.channels) return;
  const Rows rows = find_rows(batch, blockIdx.y);
  const std::ptrdiff_t first =
      static_cast<std::ptrdiff_t>(rows.entry->begin) * p.channels + channel;
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  const auto at = [&](int row) { return static_cast<std::ptrdiff_t>(row) * p.channels; };

  float w[kChannels][kWidth];
  float window[kWidth][kChannels];  // of row t, input t − 3 + i at [(t + 1 + i) % 4]
  float bias[kChannels] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) load_four(w[c], p.w + (channel + c) * kWidth, kVector);
  if (p.bias != nullptr) {
    Eight<float> loaded;
    loaded.load(p.bias + channel);
    loaded.get(bias);
  }

  if (rows.begin == 0) {
    replace_conv_state(window, rows.entry->state + channel * kWidth, x, p.channels,
                       rows.entry->length, true);
  } else {
#pragma unroll
    for (int i = 1; i < kWidth; ++i) {
      Eight<T> loaded;
      loaded.load(x + at(rows.begin - kWidth + i));
      loaded.get(window[i]);
    }
  }
  // Four rows are asked for before the four ahead of them are computed.
  Eight<T> next[kWidth];
  const auto load = [&](int t) {
#pragma unroll
    for (int r = 0; r < kWidth; ++r) next[r].load(x + at(min(t + r, rows.end - 1)));
  };
  load(rows.begin);
  for (int t = rows.begin; t < rows.end; t += kWidth) {
    Eight<T> now[kWidth];
#pragma unroll
    for (int r = 0; r < kWidth; ++r) now[r] = next[r];
    if (t + kWidth < rows.end) load(t + kWidth);
#pragma unroll
    for (int r = 0; r < kWidth; ++r) {
      if (t + r >= rows.end) break;
      now[r].get(window[r]);
      float out[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        float sum = bias[c];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum += w[c][i] * window[(r + 1 + i) % kWidth][c];
        out[c] = activate<sizeof(T) == 2>(p.activation, sum);
      }
      Eight<T>::store(y + at(t + r), out);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    short_conv_any_width(const __grid_constant__ ShortConvProblem p,
                         const __grid_constant__ SequenceBatch batch) {
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= p.channels) return;
  const Rows rows = find_rows(batch, blockIdx.y);
  const std::ptrdiff_t first =
      static_cast<std::ptrdiff_t>(rows.entry->begin) * p.channels + channel;
  const T* x = static_cast<const T*>(p.x) + first;
  T* y = static_cast<T*>(p.y) + first;
  float* state = rows.entry->state + channel * p.width;
  const auto input = [&](int row) {
    return row < 0 ? state[p.width + row]
                   : to_float(x[static_cast<std::ptrdiff_t>(row) * p.channels]);
  };
  for (int t = rows.begin; t < rows.end; ++t) {
    float sum = p.bias != nullptr ? p.bias[channel] : 0;
    for (int i = 0; i < p.width; ++i) {
      sum += p.w[channel * p.width + i] * input(t - p.width + 1 + i);
    }
    from_float(y[static_cast<std::ptrdiff_t>(t) * p.channels], activate<false>(p.activation, sum));
  }
  if (rows.begin == 0) {
    // Oldest first: no entry is replaced before it has been moved.
    for (int i = 0; i < p.width; ++i) state[i] = input(rows.entry->length - p.width + i);
  }
}

template <typename T>
void launch(const ShortConvProblem& p, const SequenceBatch& batch, cudaStream_t stream) {
  const auto grid = [&](int channels) {
    const int block = kThreads * channels;
    return dim3((p.channels + block - 1) / block, batch.blocks);
  };
  if (p.width == 4 && p.channels % 8 == 0) {
    short_conv_width_4<T><<<grid(8), kThreads, 0, stream>>>(p, batch);
  } else {
    short_conv_any_width<T><<<grid(1), kThreads, 0, stream>>>(p, batch);
  }
  check_launch("short_conv");
}

}  // namespace

void launch_short_conv(const ShortConvProblem& problem, const SequenceBatch& batch,
                       cudaStream_t stream) {
  problem.is_bf16 ? launch<bf16>(problem, batch, stream) : launch<float>(problem, batch, stream);
}

}  // namespace deltafox::cuda
