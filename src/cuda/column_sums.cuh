// out_n += Σ_r f(r, n), in an order that depends on the shape alone: rows in stretches, whose sums
// are added in turn.
#pragma once

#include <algorithm>

#include "core/context.h"
#include "cuda/check.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

constexpr int kSumColumns = 32;  // of a block, one a lane
constexpr int kSumWarps = 32;
constexpr std::int64_t kSumStretch = 1024;  // rows of a block

// Block (x, y): columns x·32 and up, rows of stretch y. To sums [stretches, width], or added to it.
template <typename F>
__global__ void __launch_bounds__(kSumColumns* kSumWarps)
    column_sums_kernel(std::int64_t rows, std::int64_t stretch, int width, F f, float* sums,
                       bool add) {
  __shared__ float parts[kSumWarps][kSumColumns];
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns;
  const int warp = static_cast<int>(threadIdx.x) / kSumColumns;
  const int n = static_cast<int>(blockIdx.x) * kSumColumns + lane;
  const std::int64_t begin = blockIdx.y * stretch;
  const std::int64_t end = min(rows, begin + stretch);
  float sum = 0;
  if (n < width) {
#pragma unroll 8
    for (std::int64_t r = begin + warp; r < end; r += kSumWarps) sum += f(r, n);
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || n >= width) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += parts[w][lane];
  float& to = sums[static_cast<std::int64_t>(blockIdx.y) * width + n];
  to = add ? to + sum : sum;
}

// A matrix [R, width] as f.
struct MatrixElements {
  const float* x;
  int width;
  __device__ float operator()(std::int64_t r, int n) const { return x[r * width + n]; }
};

// f may write what belongs to (r, n) too: it is called once for each.
template <typename F>
void add_column_sums(Context& ctx, const char* op, std::int64_t rows, int width, float* out, F f) {
  if (rows == 0 || width == 0) return;
  const auto columns = static_cast<unsigned>((width + kSumColumns - 1) / kSumColumns);
  const std::int64_t stretches = (rows + kSumStretch - 1) / kSumStretch;
  const unsigned threads = kSumColumns * kSumWarps;
  if (stretches == 1) {
    column_sums_kernel<<<columns, threads, 0, stream_of(ctx)>>>(rows, rows, width, f, out, true);
    check_launch(op);
    return;
  }
  ScratchScope scratch(ctx);
  float* parts = scratch.tensor({stretches, width}).f32();
  column_sums_kernel<<<dim3(columns, static_cast<unsigned>(stretches)), threads, 0,
                       stream_of(ctx)>>>(rows, kSumStretch, width, f, parts, false);
  check_launch(op);
  column_sums_kernel<<<columns, threads, 0, stream_of(ctx)>>>(
      stretches, stretches, width, MatrixElements{parts, width}, out, true);
  check_launch(op);
}

}  // namespace deltafox::cuda
