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

ConstTensorView behind(const ConstTensorView& matrix, std::int64_t elements) {
  return {static_cast<const std::byte*>(matrix.data) +
              static_cast<std::size_t>(elements) * size_of(matrix.dtype),
          matrix.dtype, matrix.shape};
}

// By how many elements a product's matrices go on with its m, n or k.
struct Steps {
  std::int64_t a, b, c;
};

// Products over a vocabulary's odd number of classes are several times as slow as those over whole
// vectors: these first, the rest by itself.
void product_in_parts(Context& ctx, const Product& p, std::int64_t Product::*size,
                      const Steps& steps, std::int64_t algorithm_rows) {
  constexpr std::int64_t kWhole = 64;
  const auto run = [&](const Product& part) {
    const std::int64_t rows = size == &Product::m ? part.m : algorithm_rows;
    if (!product_blas(ctx, part, rows)) product_plain(ctx, part);
  };
  const std::int64_t rest = p.*size % 8 == 0 || p.*size < 16 * kWhole ? 0 : p.*size % kWhole;
  Product whole = p;
  whole.*size -= rest;
  run(whole);
  if (rest == 0) return;
  Product last = p;
  last.*size = rest;
  last.a = behind(p.a, whole.*size * steps.a);
  last.b = behind(p.b, whole.*size * steps.b);
  last.c.data = const_cast<void*>(behind(p.c, whole.*size * steps.c).data);
  if (size == &Product::k) last.accumulate = true;
  run(last);
}

void linear_blas(Context& ctx, const LinearArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t inputs = args.w.shape[1];
  const auto bucket = std::max<std::int64_t>(
      kMinBucket, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(tokens))));
  product_in_parts(ctx,
                   {.a = args.x,
                    .b = args.w,
                    .c = args.y,
                    .m = tokens,
                    .n = args.w.shape[0],
                    .k = inputs,
                    .transpose_b = true,
                    .accumulate = args.accumulate},
                   &Product::n, {.a = 0, .b = inputs, .c = 1}, bucket);
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  if (args.x.shape[0] == 0) return;
  if (args.w.dtype != args.x.dtype) {
    fail("linear: x is {} and w {}, on a GPU they must be the same", name_of(args.x.dtype),
         name_of(args.w.dtype));
  }
  const std::int64_t tokens = args.x.shape[0];
  if (fits_small_linear(args)) {
    small_linear(ctx, args);
  } else if (tokens <= kSmallLinearRows) {
    linear_plain(ctx, args);
  } else {
    linear_blas(ctx, args);
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
    product_in_parts(ctx,
                     {.a = dy,
                      .b = args.w,
                      .c = args.dx,
                      .m = tokens,
                      .n = inputs,
                      .k = outputs,
                      .accumulate = args.accumulate_dx},
                     &Product::k, {.a = 1, .b = inputs, .c = 0}, tokens);
  }
  if (args.dw.data != nullptr) {
    product_in_parts(ctx,
                     {.a = dy,
                      .b = args.x,
                      .c = args.dw,
                      .m = outputs,
                      .n = inputs,
                      .k = tokens,
                      .transpose_a = true,
                      .accumulate = true},
                     &Product::m, {.a = 1, .b = 0, .c = inputs}, outputs);
  }
  if (args.dbias.data != nullptr) add_column_sums(ctx, args.dy, args.dbias);
}

}  // namespace deltafox::cuda
