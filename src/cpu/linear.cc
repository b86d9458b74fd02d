// Which kernel, and: y = x wᵀ by dot products: both operands are read along K, so weights are used
// as they lie in the file. A tile of kRows × kColumns sums is kept in registers; each sum is one
// vector accumulated over K in steps of a vector and added up across lanes at the end, whatever the
// tile.
#include "core/float_convert.h"
#include "cpu/isa.h"
#include "cpu/linear_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/linear.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// K in stretches of 512 for a block of rows: six rows of w are then 12 KB.
constexpr std::int64_t kDepthBlock = 512;
// 4 × 6 sums, 4 + 1 operands: within the 32 registers of AVX-512; a smaller tile for the 16 of
// AVX2.
#if HWY_TARGET <= HWY_AVX3
constexpr int kTileRows = 4;
constexpr int kTileColumns = 6;
#else
constexpr int kTileRows = 3;
constexpr int kTileColumns = 4;
#endif

// sums += x w over k in [begin, end), for kRows rows of x and kColumns rows of w.
template <int kRows, int kColumns, typename W>
HWY_INLINE void accumulate_tile(const float* x, const W* w, std::int64_t depth, std::int64_t begin,
                                std::int64_t end, VF32 (&sums)[kRows][kColumns]) {
  const auto step = [&](auto&& load_vector, std::int64_t k) HWY_ATTR {
    VF32 xs[kRows];
    for (int r = 0; r < kRows; ++r) xs[r] = load_vector(x + r * depth + k);
    for (int c = 0; c < kColumns; ++c) {
      const VF32 column = load_vector(w + c * depth + k);
      for (int r = 0; r < kRows; ++r) sums[r][c] = hn::MulAdd(xs[r], column, sums[r][c]);
    }
  };
  std::int64_t k = begin;
  for (; k + lanes() <= end; k += lanes()) {
    step([](const auto* p) HWY_ATTR { return load(p); }, k);
  }
  if (k < end) {
    step([n = end - k](const auto* p) HWY_ATTR { return load_first(p, n); }, k);
  }
}

template <int kRows, int kColumns>
HWY_INLINE void finish_tile(const VF32 (&sums)[kRows][kColumns], float* y, std::int64_t stride,
                            bool accumulate) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      float& out = y[r * stride + c];
      const float sum = sum_of(sums[r][c]);
      out = accumulate ? out + sum : sum;
    }
  }
}

template <int kRows, int kColumns, typename W>
HWY_INLINE void tile(const float* x, const W* w, float* y, std::int64_t depth, std::int64_t stride,
                     bool accumulate) {
  VF32 sums[kRows][kColumns];
  for (auto& row : sums) {
    for (VF32& sum : row) sum = hn::Zero(kF32);
  }
  accumulate_tile(x, w, depth, 0, depth, sums);
  finish_tile(sums, y, stride, accumulate);
}

// The same sums for `rows` rows, a multiple of kTileRows, by stretches of K short enough that w
// stays in the first-level cache while the rows pass by; the vectors of sums wait in `partial`.
template <typename W>
HWY_INLINE void column_of_tiles(const float* x, const W* w, float* y, std::int64_t rows,
                                std::int64_t depth, std::int64_t stride, bool accumulate,
                                float* partial) {
  for (std::int64_t begin = 0; begin < depth; begin += kDepthBlock) {
    const std::int64_t end = std::min(depth, begin + kDepthBlock);
    float* waiting = partial;
    for (std::int64_t m = 0; m < rows; m += kTileRows) {
      VF32 sums[kTileRows][kTileColumns];
      float* next = waiting;
      for (auto& row : sums) {
        for (VF32& sum : row) {
          sum = begin == 0 ? hn::Zero(kF32) : load(next);
          next += lanes();
        }
      }
      accumulate_tile(x + m * depth, w, depth, begin, end, sums);
      if (end == depth) {
        finish_tile(sums, y + m * stride, stride, accumulate);
      } else {
        for (auto& row : sums) {
          for (VF32& sum : row) {
            store(sum, waiting);
            waiting += lanes();
          }
        }
      }
      waiting = next;
    }
  }
}

template <int kRows, typename W>
HWY_INLINE void row_of_tiles(const float* x, const W* w, float* y, std::int64_t depth,
                             std::int64_t columns, std::int64_t stride, bool accumulate) {
  std::int64_t n = 0;
  for (; n + kTileColumns <= columns; n += kTileColumns) {
    tile<kRows, kTileColumns>(x, w + n * depth, y + n, depth, stride, accumulate);
  }
  for (; n < columns; ++n) tile<kRows, 1>(x, w + n * depth, y + n, depth, stride, accumulate);
}

// Rows [0, rows) × columns [0, columns) of y. The rows of x stay in the second-level cache while w
// passes by once.
template <typename W>
void block(const float* x, const W* w, float* y, std::int64_t rows, std::int64_t depth,
           std::int64_t columns, std::int64_t stride, bool accumulate, float* partial) {
  const std::int64_t whole_rows = rows / kTileRows * kTileRows;
  for (std::int64_t n = 0; n < columns; n += kTileColumns) {
    const std::int64_t width = std::min<std::int64_t>(kTileColumns, columns - n);
    std::int64_t m = 0;
    if (width == kTileColumns && depth > kDepthBlock && whole_rows > kTileRows) {
      column_of_tiles(x, w + n * depth, y + n, whole_rows, depth, stride, accumulate, partial);
      m = whole_rows;
    }
    for (; m < whole_rows; m += kTileRows) {
      row_of_tiles<kTileRows>(x + m * depth, w + n * depth, y + m * stride + n, depth, width,
                              stride, accumulate);
    }
    for (; m < rows; ++m) {
      row_of_tiles<1>(x + m * depth, w + n * depth, y + m * stride + n, depth, width, stride,
                      accumulate);
    }
  }
}

template <typename W>
void linear_of(Context& ctx, const LinearArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t columns = args.w.shape[0];
  constexpr std::int64_t kCacheFloats = 512 * 1024 / 4;  // half of a common second-level cache
  const std::int64_t block_rows =
      std::max<std::int64_t>(kTileRows, kCacheFloats / depth / kTileRows * kTileRows);
  constexpr std::int64_t kBlockColumns = 16 * kTileColumns;
  const std::int64_t row_blocks = (rows + block_rows - 1) / block_rows;
  const std::int64_t column_blocks = (columns + kBlockColumns - 1) / kBlockColumns;
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = std::min(block_rows, rows) * kTileColumns * lanes();
  float* partial = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  ctx.threads().parallel_for(row_blocks * column_blocks, [&](std::int64_t task, int slot) {
    const std::int64_t m = task / column_blocks * block_rows;
    const std::int64_t n = task % column_blocks * kBlockColumns;
    block(args.x.f32() + m * depth, static_cast<const W*>(args.w.data) + n * depth,
          args.y.f32() + m * columns + n, std::min(block_rows, rows - m), depth,
          std::min(kBlockColumns, columns - n), columns, args.accumulate,
          partial + slot * slot_floats);
  });
}

void linear_target(Context& ctx, const LinearArgs& args) {
  switch (args.w.dtype) {
    case DType::kF32:
      return linear_of<float>(ctx, args);
    case DType::kBF16:
      return linear_of<hwy::bfloat16_t>(ctx, args);
    case DType::kF16:
      return linear_of<hwy::float16_t>(ctx, args);
    default:
      assert(false);
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(linear_target);

void linear_widened(Context& ctx, const LinearArgs& args) {
  HWY_DYNAMIC_DISPATCH(linear_target)(ctx, args);
}

namespace {

// y = bias [+ y], for the products to be added to.
void begin_with_bias(Context& ctx, const LinearArgs& args) {
  const std::int64_t columns = args.y.shape[1];
  const float* bias = args.bias.f32();
  ctx.threads().parallel_for(args.y.shape[0], [&](std::int64_t t) {
    float* y = args.y.f32() + t * columns;
    for (std::int64_t n = 0; n < columns; ++n) y[n] = args.accumulate ? y[n] + bias[n] : bias[n];
  });
}

}  // namespace

ConstTensorView rounded_to_bf16(Context& ctx, ScratchScope& scratch, const ConstTensorView& x) {
  const TensorView rounded = scratch.tensor(x.shape);
  const std::int64_t width = x.shape[1];
  ctx.threads().parallel_for(x.shape[0], [&](std::int64_t t) {
    const float* from = x.f32() + t * width;
    float* to = rounded.f32() + t * width;
    for (std::int64_t k = 0; k < width; ++k) to[k] = bf16_to_f32(f32_to_bf16(from[k]));
  });
  return rounded;
}

bool has_fast_bf16_products() {
  return isa().amx_bf16;
}

void linear(Context& ctx, const LinearArgs& args) {
  ScratchScope scratch(ctx);
  LinearArgs products = args;
  if (args.bias.data != nullptr) {
    begin_with_bias(ctx, args);
    products.accumulate = true;
  }
  if (is_packed(args.w.dtype)) return linear_packed(ctx, products);
#if defined(__x86_64__)
  if (args.w.dtype == DType::kBF16Tiles) return linear_bf16_amx(ctx, products);
  if (args.w.dtype == DType::kF32 && isa().avx512) return linear_f32_avx512(ctx, products);
  if (args.w.dtype == DType::kBF16 && isa().amx_bf16) return linear_bf16_amx(ctx, products);
  if (args.w.dtype == DType::kBF16 && isa().avx512_bf16) return linear_bf16_avx512(ctx, products);
#endif
  if (args.w.dtype == DType::kBF16) products.x = rounded_to_bf16(ctx, scratch, args.x);
  linear_widened(ctx, products);
}

bool linear_glu(Context& ctx, const LinearGluArgs& args) {
  if (is_packed(args.w.dtype)) return linear_glu_packed(ctx, args);
#if defined(__x86_64__)
  if (args.w.dtype == DType::kF32 && isa().avx512) return linear_glu_f32_avx512(ctx, args);
  if (args.w.dtype == DType::kBF16Tiles || (args.w.dtype == DType::kBF16 && isa().amx_bf16)) {
    return linear_glu_bf16_amx(ctx, args);
  }
  if (args.w.dtype == DType::kBF16 && isa().avx512_bf16) return linear_glu_bf16_avx512(ctx, args);
#endif
  return false;
}
}  // namespace deltafox::cpu
#endif
