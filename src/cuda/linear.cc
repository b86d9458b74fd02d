// y = x wᵀ, and its backward. The algorithm of cuBLASLt is chosen once for a bucket of T (a power
// of two) and used for every T in it, so that what a row gets does not depend on how many rows are
// beside it. Backward, where T is one for a whole run, has one for each T.
#include "cuda/linear.h"

#include <bit>

#include "core/error.h"
#include "cuda/products.h"
#include "cuda/small_linear.h"

namespace deltafox::cuda {
namespace {

constexpr std::int64_t kMinBucket = 32;

bool linear_blas(Context& ctx, const LinearArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const auto bucket = std::max<std::int64_t>(
      kMinBucket, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(tokens))));
  return product_blas(ctx,
                      {.a = args.x,
                       .b = args.w,
                       .c = args.y,
                       .m = tokens,
                       .n = args.w.shape[0],
                       .k = args.w.shape[1],
                       .transpose_b = true,
                       .accumulate = args.accumulate,
                       .added = args.added},
                      bucket);
}

void product(Context& ctx, const Product& p) {
  if (!product_blas(ctx, p, p.m)) product_plain(ctx, p);
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  if (args.x.shape[0] == 0) return;
  if (args.w.dtype != args.x.dtype) {
    fail("linear: x is {} and w {}, on a GPU they must be the same", name_of(args.x.dtype),
         name_of(args.w.dtype));
  }
  if (args.x.shape[0] <= kSmallLinearRows || !linear_blas(ctx, args)) {
    if (args.added.data != nullptr && args.added.data != args.y.data) {
      ctx.copy(args.y.data, args.added.data, bytes_of(args.y.dtype, args.y.shape));
    }
    fits_small_linear(args) ? small_linear(ctx, args) : linear_plain(ctx, args);
  }
  if (args.bias.data != nullptr) add_bias(ctx, args.y, args.bias);
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  if (tokens == 0) return;
  ScratchScope scratch(ctx);
  ConstTensorView dy = args.dy;
  if (dy.dtype != args.x.dtype) {
    if (dy.dtype != DType::kF32) fail("linear_backward: dy is {}, x F32", name_of(dy.dtype));
    const TensorView rounded = scratch.tensor(dy.shape, DType::kBF16);
    round_to_bf16(ctx, dy, rounded);
    dy = rounded;
  }
  const std::int64_t outputs = args.w.shape[0];
  const std::int64_t inputs = args.w.shape[1];
  if (args.dx.data != nullptr) {
    product(ctx, {.a = dy,
                  .b = args.w,
                  .c = args.dx,
                  .m = tokens,
                  .n = inputs,
                  .k = outputs,
                  .accumulate = args.accumulate_dx});
  }
  if (args.dw.data != nullptr) {
    product(ctx, {.a = dy,
                  .b = args.x,
                  .c = args.dw,
                  .m = outputs,
                  .n = inputs,
                  .k = tokens,
                  .transpose_a = true,
                  .accumulate = true});
  }
  if (args.dbias.data != nullptr) add_column_sums(ctx, args.dy, args.dbias);
}

}  // namespace deltafox::cuda
