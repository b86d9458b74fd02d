// dx = dy w and dw = dyᵀ x, both by one matrix product C [+]= A B with B in rows.
//
// A and B are packed piece by piece: A in panels of kTileRows rows with the rows of a step of the
// inner dimension side by side, B in panels of two vectors of columns. A tile of sums stays in
// registers while a panel of A, in the caches next to it, meets a panel of B. Each element of C is
// the sum of its products in order, by stretches of kDepth that are added up one after the other:
// the same for any place in the matrix and any number of threads.
#include "core/float_convert.h"
#include "cpu/isa.h"
#include "cpu/linear_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/linear_backward.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

// 14 × 2 sums, 2 + 1 operands: within the 32 registers of AVX-512; a smaller tile for 16.
#if HWY_TARGET <= HWY_AVX3
constexpr std::int64_t kTileRows = 14;
#else
constexpr std::int64_t kTileRows = 6;
#endif
constexpr std::int64_t kTileVectors = 2;
// A panel of A is then 56 KB, more than most first-level caches have; but sums go to memory and
// back half as often as with half of it, which is worth more where memory is slow.
constexpr std::int64_t kDepth = 1024;
// Of a task: panels of B of 1 MB, in the second-level cache.
constexpr std::int64_t kTaskRows = 8 * kTileRows;
constexpr std::int64_t kTaskColumns = 256;
// Packed at a time: 8 and 16 MB.
constexpr std::int64_t kPackedRows = 18 * kTaskRows;
constexpr std::int64_t kPackedColumns = 16 * kTaskColumns;

std::int64_t tile_columns() {
  return kTileVectors * lanes();
}

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) {
  return (n + by - 1) / by;
}

// An element (i, j) is at data[i · row_stride + j · column_stride].
struct Matrix {
  const float* data;
  std::int64_t row_stride;
  std::int64_t column_stride;

  const float* at(std::int64_t i, std::int64_t j) const {
    return data + i * row_stride + j * column_stride;
  }
};

struct Product {
  std::int64_t rows, columns, depth;
  Matrix a;        // [rows, depth]
  const float* b;  // [depth, columns]
  float* c;        // [rows, columns]
  bool accumulate;
};

// to[k][r] = A(row + r, begin + k), zeros for rows that A does not have.
void pack_a(const Product& product, std::int64_t row, std::int64_t begin, std::int64_t depth,
            float* to) {
  const std::int64_t rows = std::min(kTileRows, product.rows - row);
  if (rows < kTileRows) std::fill(to, to + kTileRows * depth, 0.0f);
  const Matrix& a = product.a;
  if (rows == kTileRows && a.row_stride == 1) {
    for (std::int64_t k = 0; k < depth; ++k) {
      std::copy_n(a.at(row, begin + k), kTileRows, to + k * kTileRows);
    }
    return;
  }
  // A cache line of each row at a time.
  constexpr std::int64_t kStretch = 16;
  for (std::int64_t k = 0; k < depth; k += kStretch) {
    const std::int64_t stretch = std::min(kStretch, depth - k);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* from = a.at(row + r, begin + k);
      for (std::int64_t i = 0; i < stretch; ++i) {
        to[(k + i) * kTileRows + r] = from[i * a.column_stride];
      }
    }
  }
}

// to[k][n] = B(begin + k, column + n), zeros for columns that B does not have.
void pack_b(const Product& product, std::int64_t column, std::int64_t begin, std::int64_t depth,
            float* to) {
  const std::int64_t width = tile_columns();
  const std::int64_t columns = std::min(width, product.columns - column);
  for (std::int64_t k = 0; k < depth; ++k) {
    const float* from = product.b + (begin + k) * product.columns + column;
    std::copy_n(from, columns, to + k * width);
    std::fill(to + k * width + columns, to + (k + 1) * width, 0.0f);
  }
}

// c [kTileRows, two vectors] = or += the product of two panels.
HWY_INLINE void multiply_panels(const float* a, const float* b, std::int64_t depth, float* c,
                                std::int64_t c_stride, bool accumulate) {
  VF32 sums[kTileRows][kTileVectors];
  for (auto& row : sums) {
    for (VF32& sum : row) sum = hn::Zero(kF32);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    // The second-level cache, where panels come from, is not fast enough by itself.
    constexpr std::int64_t kStepsAhead = 8;
    __builtin_prefetch(b + kStepsAhead * kTileVectors * lanes());
    __builtin_prefetch(b + (kStepsAhead * kTileVectors + 1) * lanes());
    __builtin_prefetch(a + kStepsAhead * kTileRows);
    const VF32 left = load(b);
    const VF32 right = load(b + lanes());
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      const VF32 x = hn::Set(kF32, a[r]);
      sums[r][0] = hn::MulAdd(x, left, sums[r][0]);
      sums[r][1] = hn::MulAdd(x, right, sums[r][1]);
    }
    a += kTileRows;
    b += kTileVectors * lanes();
  }
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    for (std::int64_t v = 0; v < kTileVectors; ++v) {
      float* out = c + r * c_stride + v * lanes();
      store(accumulate ? hn::Add(load(out), sums[r][v]) : sums[r][v], out);
    }
  }
}

// The same where C has only `rows` rows and `columns` columns of the tile.
HWY_INLINE void multiply_edge(const float* a, const float* b, std::int64_t depth, float* c,
                              std::int64_t c_stride, bool accumulate, std::int64_t rows,
                              std::int64_t columns) {
  HWY_ALIGN float tile[kTileRows * kTileVectors * 16];
  multiply_panels(a, b, depth, tile, tile_columns(), false);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t n = 0; n < columns; ++n) {
      const float sum = tile[r * tile_columns() + n];
      float& out = c[r * c_stride + n];
      out = accumulate ? out + sum : sum;
    }
  }
}

// Rows [row, row_end) × columns [column, column_end) of C, from what is packed of A from row
// `a_begin` on and of B from column `b_begin` on.
void multiply_block(const Product& product, const float* packed_a, std::int64_t a_begin,
                    const float* packed_b, std::int64_t b_begin, std::int64_t row,
                    std::int64_t row_end, std::int64_t column, std::int64_t column_end,
                    std::int64_t depth, bool accumulate) {
  for (std::int64_t m = row; m < row_end; m += kTileRows) {
    const float* a = packed_a + (m - a_begin) * depth;
    for (std::int64_t n = column; n < column_end; n += tile_columns()) {
      const float* b = packed_b + (n - b_begin) * depth;
      float* c = product.c + m * product.columns + n;
      const std::int64_t rows = std::min(kTileRows, row_end - m);
      const std::int64_t columns = std::min(tile_columns(), column_end - n);
      if (rows == kTileRows && columns == tile_columns()) {
        multiply_panels(a, b, depth, c, product.columns, accumulate);
      } else {
        multiply_edge(a, b, depth, c, product.columns, accumulate, rows, columns);
      }
    }
  }
}

void multiply(Context& ctx, const Product& product) {
  const auto padded = [](std::int64_t n, std::int64_t tile) { return ceil_div(n, tile) * tile; };
  const std::int64_t width = tile_columns();
  ScratchScope scratch(ctx);
  const std::int64_t depth_max = std::min(kDepth, product.depth);
  float* packed_a =
      scratch.tensor({padded(std::min(kPackedRows, product.rows), kTileRows), depth_max}).f32();
  float* packed_b =
      scratch.tensor({padded(std::min(kPackedColumns, product.columns), width), depth_max}).f32();
  for (std::int64_t n = 0; n < product.columns; n += kPackedColumns) {
    const std::int64_t n_end = std::min(product.columns, n + kPackedColumns);
    for (std::int64_t k = 0; k < product.depth; k += kDepth) {
      const std::int64_t depth = std::min(kDepth, product.depth - k);
      const bool accumulate = product.accumulate || k > 0;
      ctx.threads().parallel_for(ceil_div(n_end - n, width), [&](std::int64_t task) {
        pack_b(product, n + task * width, k, depth, packed_b + task * width * depth);
      });
      for (std::int64_t m = 0; m < product.rows; m += kPackedRows) {
        const std::int64_t m_end = std::min(product.rows, m + kPackedRows);
        ctx.threads().parallel_for(ceil_div(m_end - m, kTileRows), [&](std::int64_t task) {
          pack_a(product, m + task * kTileRows, k, depth, packed_a + task * kTileRows * depth);
        });
        const std::int64_t column_tasks = ceil_div(n_end - n, kTaskColumns);
        ctx.threads().parallel_for(
            ceil_div(m_end - m, kTaskRows) * column_tasks, [&](std::int64_t task) {
              const std::int64_t row = m + task / column_tasks * kTaskRows;
              const std::int64_t column = n + task % column_tasks * kTaskColumns;
              multiply_block(product, packed_a, m, packed_b, n, row,
                             std::min(m_end, row + kTaskRows), column,
                             std::min(n_end, column + kTaskColumns), depth, accumulate);
            });
      }
    }
  }
}

// dbias += Σ_t dy_t
void add_rows(Context& ctx, const ConstTensorView& dy, float* dbias) {
  constexpr std::int64_t kColumns = 64;  // of a task
  const std::int64_t columns = dy.shape[1];
  ctx.threads().parallel_for(ceil_div(columns, kColumns), [&](std::int64_t task) {
    const std::int64_t end = std::min(columns, (task + 1) * kColumns);
    for (std::int64_t t = 0; t < dy.shape[0]; ++t) {
      for (std::int64_t n = task * kColumns; n < end; ++n) dbias[n] += dy.f32()[t * columns + n];
    }
  });
}

}  // namespace

void linear_backward_target(Context& ctx, const LinearBackwardArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t columns = args.w.shape[0];
  if (args.dx.data != nullptr) {
    multiply(ctx, {.rows = rows,
                   .columns = depth,
                   .depth = columns,
                   .a = {args.dy.f32(), columns, 1},
                   .b = args.w.f32(),
                   .c = args.dx.f32(),
                   .accumulate = args.accumulate_dx});
  }
  if (args.dw.data != nullptr) {
    multiply(ctx, {.rows = columns,
                   .columns = depth,
                   .depth = rows,
                   .a = {args.dy.f32(), 1, columns},
                   .b = args.x.f32(),
                   .c = args.dw.f32(),
                   .accumulate = true});
  }
  if (args.dbias.data != nullptr) add_rows(ctx, args.dy, args.dbias.f32());
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(linear_backward_target);
namespace {

TensorView widened(Context& ctx, ScratchScope& scratch, const ConstTensorView& w) {
  const TensorView wide = scratch.tensor(w.shape);
  const std::int64_t width = w.shape[1];
  ctx.threads().parallel_for(w.shape[0], [&](std::int64_t n) {
    to_f32(w, n * width, {wide.f32() + n * width, static_cast<std::size_t>(width)});
  });
  return wide;
}

}  // namespace

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const auto run = HWY_DYNAMIC_DISPATCH(linear_backward_target);
  if (args.w.dtype == DType::kF32) return run(ctx, args);
  if (args.dbias.data != nullptr) {
    run(ctx, {.dy = args.dy, .x = args.x, .w = args.w, .dbias = args.dbias});
  }
#if defined(__x86_64__)
  if (isa().amx_bf16) return linear_backward_bf16_amx(ctx, args);
#endif
  ScratchScope scratch(ctx);
  run(ctx, {.dy = rounded_to_bf16(ctx, scratch, args.dy),
            .x = rounded_to_bf16(ctx, scratch, args.x),
            .w = widened(ctx, scratch, args.w),
            .dx = args.dx,
            .accumulate_dx = args.accumulate_dx,
            .dw = args.dw});
}
}  // namespace deltafox::cpu
#endif
