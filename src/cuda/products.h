// Matrix products of linear and its backward.
#pragma once

#include "core/context.h"

namespace deltafox::cuda {

// c = op(a) op(b), or c += op(a) op(b), all row-major; op is the transpose where it is asked for.
// Rows may be longer than what is used of them: shape[1] is their stride.
struct Product {
  ConstTensorView a;  // [M, K], transposed [K, M]; F32 or BF16
  ConstTensorView b;  // [K, N], transposed [N, K]; the same dtype
  TensorView c;       // [M, N] F32 or BF16
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;
};

// On cuBLASLt: false where it has no algorithm. The algorithm is chosen once for `algorithm_rows`
// rows of c and used for every m that comes with it.
bool product_blas(Context& ctx, const Product& product, std::int64_t algorithm_rows);

// Any shape, any dtypes; slow.
void product_plain(Context& ctx, const Product& product);

// to = from, rounded to bfloat16.
void round_to_bf16(Context& ctx, const ConstTensorView& from, const TensorView& to);

// out_n += Σ_t x_tn; x [T, N'], N' >= N
void add_column_sums(Context& ctx, const ConstTensorView& x, const TensorView& out);

}  // namespace deltafox::cuda
