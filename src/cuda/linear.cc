// y = x wᵀ, and its backward. The algorithm of cuBLASLt is chosen once for a bucket of T (a power
// of two) and used for every T in it, so that what a row gets does not depend on how many rows are
// beside it. Backward, where T is one for a whole run, has one for each T.
#include "cuda/linear.h"

#include <bit>
#include <type_traits>

#include "core/error.h"
#include "cuda/glu_product.h"
#include "cuda/packed.h"
#include "cuda/products.h"
#include "cuda/small_linear.h"

namespace deltafox::cuda {
namespace {

constexpr std::int64_t kMinBucket = 32;
// From so many rows on one pass is faster than two on cuBLASLt; they begin a bucket.
constexpr std::int64_t kLeastGluRows = 257;

// A matrix from its `elements`th element on, with the same rows.
template <typename View>
View behind(const View& matrix, std::int64_t elements) {
  if (matrix.data == nullptr) return matrix;
  using Byte = std::conditional_t<std::is_same_v<View, TensorView>, std::byte, const std::byte>;
  return {
      static_cast<Byte*>(matrix.data) + static_cast<std::size_t>(elements) * size_of(matrix.dtype),
      matrix.dtype, matrix.shape};
}

// By how many elements a product's matrices go on with its m, n or k.
struct Steps {
  std::int64_t a, b, c;
};

// Products over a vocabulary's odd number of classes are several times as slow as those over whole
// vectors: these first, the rest by itself. False where cuBLASLt has no algorithm for what needs no
// parts.
bool product_in_parts(Context& ctx, const Product& p, std::int64_t Product::*size,
                      const Steps& steps, std::int64_t algorithm_rows) {
  constexpr std::int64_t kWhole = 64;
  if (p.*size % 8 == 0 || p.*size < 16 * kWhole) return product_blas(ctx, p, algorithm_rows);
  Product whole = p;
  whole.*size -= p.*size % kWhole;
  Product rest = p;
  rest.*size %= kWhole;
  rest.a = behind(p.a, whole.*size * steps.a);
  rest.b = behind(p.b, whole.*size * steps.b);
  rest.c = behind(p.c, whole.*size * steps.c);
  if (size == &Product::k) rest.accumulate = true;
  for (const Product& part : {whole, rest}) {
    const std::int64_t rows = size == &Product::m ? part.m : algorithm_rows;
    if (!product_blas(ctx, part, rows)) product_plain(ctx, part);
  }
  return true;
}

bool linear_product(Context& ctx, const LinearArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t inputs = args.w.shape[1];
  const auto bucket = std::max<std::int64_t>(
      kMinBucket, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(tokens))));
  return product_in_parts(ctx,
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

// Without the bias.
void multiply(Context& ctx, const LinearArgs& args) {
  const bool small = fits_small_linear(args);
  ScratchScope scratch(ctx);
  LinearArgs product = args;
  if (is_packed(args.w.dtype) && !small) product.w = unpacked(ctx, scratch, args.w);
  if (args.x.shape[0] <= kSmallLinearRows || !linear_product(ctx, product)) {
    small ? small_linear(ctx, product) : linear_plain(ctx, product);
  }
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  if (args.x.shape[0] == 0) return;
  const bool packed = is_packed(args.w.dtype);
  if ((packed ? DType::kBF16 : args.w.dtype) != args.x.dtype) {
    fail("linear: x is {} and w {}, on a GPU they must be the same, or x BF16 and w packed",
         name_of(args.x.dtype), name_of(args.w.dtype));
  }
  const bool few = args.x.shape[0] <= kSmallLinearRows;
  if (!packed || few || !packed_product(ctx, args)) multiply(ctx, args);
  if (args.bias.data != nullptr) add_bias(ctx, args.y, args.bias);
}

bool linear_glu(Context& ctx, const LinearGluArgs& args) {
  if (args.activation != Activation::kSilu || args.x.shape[0] < kLeastGluRows) return false;
  ScratchScope scratch(ctx);
  const bool packed = is_packed(args.w.dtype);
  return glu_product(ctx, args.x, packed ? unpacked(ctx, scratch, args.w) : args.w, args.gate_up,
                     args.y, !packed);
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  if (tokens == 0) {
    if (args.dw.begins) ctx.zero(args.dw.data, bytes_of(args.dw.dtype, args.dw.shape));
    return;
  }
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
    const Product p{.a = dy,
                    .b = args.w,
                    .c = args.dx,
                    .m = tokens,
                    .n = inputs,
                    .k = outputs,
                    .accumulate = args.accumulate_dx};
    const Steps steps{.a = 1, .b = inputs, .c = 0};
    if (!product_in_parts(ctx, p, &Product::k, steps, tokens)) product_plain(ctx, p);
  }
  if (args.dw.data != nullptr) {
    const Product p{.a = dy,
                    .b = args.x,
                    .c = args.dw,
                    .m = outputs,
                    .n = inputs,
                    .k = tokens,
                    .transpose_a = true,
                    .accumulate = !args.dw.begins};
    const Steps steps{.a = 1, .b = 0, .c = inputs};
    if (!product_in_parts(ctx, p, &Product::m, steps, outputs)) product_plain(ctx, p);
  }
  if (args.dbias.data != nullptr) add_column_sums(ctx, args.dy, args.dbias);
}

}  // namespace deltafox::cuda
