// What products need besides cuBLASLt. See cuda/products.h.
#include "cuda/column_sums.cuh"
#include "cuda/each_four.cuh"
#include "cuda/products.h"

namespace deltafox::cuda {
namespace {

constexpr int kTile = 16;

struct Plain {
  Elements a, b, c;
  int m, n, k;
  std::int64_t a_stride, b_stride, c_stride;
  bool transpose_a, transpose_b, accumulate;
};

__device__ float element(const Elements& x, std::int64_t i) {
  float v[4];
  x.load(v, i, 1);
  return v[0];
}

__global__ void __launch_bounds__(kTile* kTile) product_plain_kernel(const Plain p) {
  __shared__ float a[kTile][kTile + 1];
  __shared__ float b[kTile][kTile + 1];
  const int x = static_cast<int>(threadIdx.x) % kTile;
  const int y = static_cast<int>(threadIdx.x) / kTile;
  const int first_row = static_cast<int>(blockIdx.y) * kTile;
  const int first_column = static_cast<int>(blockIdx.x) * kTile;
  float sum = 0;
  for (int k = 0; k < p.k; k += kTile) {
    // Neighbouring threads read neighbouring elements of a row as it is stored.
    const int a_row = first_row + (p.transpose_a ? x : y);
    const int a_k = k + (p.transpose_a ? y : x);
    const bool a_exists = a_row < p.m && a_k < p.k;
    const float a_value =
        a_exists ? element(p.a, p.transpose_a ? a_k * p.a_stride + a_row : a_row * p.a_stride + a_k)
                 : 0;
    const int b_column = first_column + (p.transpose_b ? y : x);
    const int b_k = k + (p.transpose_b ? x : y);
    const bool b_exists = b_column < p.n && b_k < p.k;
    const float b_value = b_exists ? element(p.b, p.transpose_b ? b_column * p.b_stride + b_k
                                                                : b_k * p.b_stride + b_column)
                                   : 0;
    __syncthreads();
    a[a_row - first_row][a_k - k] = a_value;
    b[b_k - k][b_column - first_column] = b_value;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTile; ++i) sum = fmaf(a[y][i], b[i][x], sum);
  }
  const int row = first_row + y;
  const int column = first_column + x;
  if (row >= p.m || column >= p.n) return;
  const std::int64_t at = row * p.c_stride + column;
  float out[4] = {p.accumulate ? element(p.c, at) + sum : sum};
  p.c.store(out, at, 1);
}

struct ColumnsOf {
  Elements x;
  std::int64_t stride;
  __device__ float operator()(std::int64_t r, int n) const { return element(x, r * stride + n); }
};

}  // namespace

void product_plain(Context& ctx, const Product& product) {
  const Plain p{.a = Elements(product.a),
                .b = Elements(product.b),
                .c = Elements(product.c),
                .m = static_cast<int>(product.m),
                .n = static_cast<int>(product.n),
                .k = static_cast<int>(product.k),
                .a_stride = product.a.shape[1],
                .b_stride = product.b.shape[1],
                .c_stride = product.c.shape[1],
                .transpose_a = product.transpose_a,
                .transpose_b = product.transpose_b,
                .accumulate = product.accumulate};
  const dim3 grid(blocks_for(product.n, kTile), blocks_for(product.m, kTile));
  product_plain_kernel<<<grid, kTile * kTile, 0, stream_of(ctx)>>>(p);
  check_launch("product");
}

void round_to_bf16(Context& ctx, const ConstTensorView& from, const TensorView& to) {
  const Elements source(from);
  const Elements target(to);
  each_four(ctx, "round_to_bf16", from.shape.size(), source.aligned() && target.aligned(),
            [=] __device__(std::int64_t i, int count) {
              float v[4];
              source.load(v, i, count);
              target.store(v, i, count);
            });
}

void add_column_sums(Context& ctx, const ConstTensorView& x, const TensorView& out) {
  add_column_sums(ctx, "linear_backward", x.shape[0], static_cast<int>(out.shape[0]), out.f32(),
                  ColumnsOf{Elements(x), x.shape[1]});
}

}  // namespace deltafox::cuda
