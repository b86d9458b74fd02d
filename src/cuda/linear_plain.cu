// y = x wᵀ with a warp for each element's sum over K. See cuda/linear.h.
#include "cuda/check.h"
#include "cuda/linear.h"
#include "cuda/rows.cuh"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;

__global__ void __launch_bounds__(kWarps * 32)
    linear_plain_kernel(Elements x, Elements w, Elements y, int tokens, int outputs, int stride,
                        int k, bool aligned, bool accumulate) {
  const int lane = threadIdx.x % 32;
  const int n = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.y) * kRows;
  if (n >= outputs) return;
  float sums[kRows] = {};
  for (int i = lane * 4; i < k; i += 128) {
    const int count = aligned ? kVector : min(4, k - i);
    float weights[4];
    w.load(weights, static_cast<std::int64_t>(n) * k + i, count);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= tokens) continue;
      float values[4];
      x.load(values, static_cast<std::int64_t>(first + r) * k + i, count);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r] = fmaf(values[e], weights[e], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= tokens) continue;
    float sum[4] = {warp_sum(sums[r])};
    if (lane != 0) continue;
    const std::int64_t at = static_cast<std::int64_t>(first + r) * stride + n;
    if (accumulate) {
      float old[4];
      y.load(old, at, 1);
      sum[0] += old[0];
    }
    y.store(sum, at, 1);
  }
}

__global__ void add_bias_kernel(Elements y, const float* bias, std::int64_t size, int width,
                                int stride) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const std::int64_t at = i / width * stride + i % width;
  float v[4];
  y.load(v, at, 1);
  v[0] += bias[i % width];
  y.store(v, at, 1);
}

}  // namespace

void linear_plain(Context& ctx, const LinearArgs& args) {
  const auto tokens = static_cast<int>(args.x.shape[0]);
  const auto outputs = static_cast<int>(args.w.shape[0]);
  const auto k = static_cast<int>(args.w.shape[1]);
  const Elements x(args.x);
  const Elements w(args.w);
  const dim3 grid((outputs + kWarps - 1) / kWarps, (tokens + kRows - 1) / kRows);
  linear_plain_kernel<<<grid, kWarps * 32, 0, stream_of(ctx)>>>(
      x, w, Elements(args.y), tokens, outputs, static_cast<int>(args.y.shape[1]), k,
      k % 4 == 0 && x.aligned() && w.aligned(), args.accumulate);
  check_launch("linear");
}

void add_bias(Context& ctx, const TensorView& y, const ConstTensorView& bias) {
  const std::int64_t width = bias.shape[0];
  const std::int64_t size = y.shape[0] * width;
  add_bias_kernel<<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream_of(ctx)>>>(
      Elements(y), bias.f32(), size, static_cast<int>(width), static_cast<int>(y.shape[1]));
  check_launch("add_bias");
}

}  // namespace deltafox::cuda
