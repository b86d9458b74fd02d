// c += alpha · a b for the small matrices of a chunk, on one thread.
#if defined(DELTAFOX_CPU_SMALL_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DELTAFOX_CPU_SMALL_GEMM_INL_H_
#undef DELTAFOX_CPU_SMALL_GEMM_INL_H_
#else
#define DELTAFOX_CPU_SMALL_GEMM_INL_H_
#endif

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// An element (m, k) of the left matrix is at data[m · row_stride + k · column_stride]: swapping the
// strides transposes it.
struct LeftMatrix {
  const float* data;
  std::int64_t row_stride;
  std::int64_t column_stride;
};

template <int kRows, int kVectors>
HWY_INLINE void small_tile(LeftMatrix a, const float* b, std::int64_t b_stride, float* c,
                           std::int64_t c_stride, std::int64_t depth, float alpha) {
  VF32 sums[kRows][kVectors];
  for (auto& row : sums) {
    for (VF32& sum : row) sum = hn::Zero(kF32);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    VF32 columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * b_stride + v * lanes());
    for (int r = 0; r < kRows; ++r) {
      const VF32 left = hn::Set(kF32, a.data[r * a.row_stride + k * a.column_stride]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(left, columns[v], sums[r][v]);
    }
  }
  const VF32 factor = hn::Set(kF32, alpha);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * c_stride + v * lanes();
      store(hn::MulAdd(factor, sums[r][v], load(out)), out);
    }
  }
}

template <int kRows>
HWY_INLINE void small_rows(LeftMatrix a, const float* b, std::int64_t b_stride, float* c,
                           std::int64_t c_stride, std::int64_t columns, std::int64_t depth,
                           float alpha) {
  std::int64_t n = 0;
  for (; n + 4 * lanes() <= columns; n += 4 * lanes()) {
    small_tile<kRows, 4>(a, b + n, b_stride, c + n, c_stride, depth, alpha);
  }
  for (; n < columns; n += lanes()) {
    small_tile<kRows, 1>(a, b + n, b_stride, c + n, c_stride, depth, alpha);
  }
}

// c [rows, columns] += alpha · a [rows, depth] · b [depth, columns]; columns is a multiple of 16.
HWY_INLINE void small_gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth,
                           LeftMatrix a, const float* b, std::int64_t b_stride, float* c,
                           std::int64_t c_stride, float alpha = 1) {
  constexpr int kRows = HWY_TARGET <= HWY_AVX3 ? 6 : 2;
  const auto from_row = [&](std::int64_t m) {
    return LeftMatrix{a.data + m * a.row_stride, a.row_stride, a.column_stride};
  };
  std::int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    small_rows<kRows>(from_row(m), b, b_stride, c + m * c_stride, c_stride, columns, depth, alpha);
  }
#if HWY_TARGET <= HWY_AVX3
  // A chunk of 16 or 64 rows leaves four, a block of 32 queries two.
  for (; m + 4 <= rows; m += 4) {
    small_rows<4>(from_row(m), b, b_stride, c + m * c_stride, c_stride, columns, depth, alpha);
  }
  for (; m + 2 <= rows; m += 2) {
    small_rows<2>(from_row(m), b, b_stride, c + m * c_stride, c_stride, columns, depth, alpha);
  }
#endif
  for (; m < rows; ++m) {
    small_rows<1>(from_row(m), b, b_stride, c + m * c_stride, c_stride, columns, depth, alpha);
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
