// Products of small matrices rounded to bfloat16, with float32 sums, by the tile registers of AMX
// or, without, by vdpbf16ps, on one thread: for kernels whose other parts Highway compiles. An
// element adds its pairs of products in order of the inner dimension, whatever the rows and columns
// beside it.
#pragma once

#include <cstdint>

namespace deltafox::cpu {

constexpr std::int64_t kTileSide = 16;   // rows, or columns, of a tile of sums
constexpr std::int64_t kTileDepth = 32;  // of the inner dimension, of a tile of the left operand

// n rounded up to whole tiles of the inner dimension.
constexpr std::int64_t padded_depth(std::int64_t n) {
  return (n + kTileDepth - 1) / kTileDepth * kTileDepth;
}

#if defined(__x86_64__)
namespace bf16 {  // for processors with AVX-512's bfloat16 products

// to [columns, rows] = from [rows, columns]ᵀ; rows, columns and to_stride are multiples of 16, `to`
// begins a cache line.
void transpose(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               float* to, std::int64_t to_stride);

// The left operand: from [rows, columns] · scale, rounded, zeros up to padded_depth(columns), which
// is the stride of `to`.
void round_left(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                float scale, std::uint16_t* to);

// The right operand, [columns / 16][padded / 2][16 columns][2 rows]: from [depth, columns],
// rounded, zeros up to `padded` rows, a multiple of kTileDepth. columns is a multiple of 16.
void pack_right(const float* from, std::int64_t stride, std::int64_t depth, std::int64_t padded,
                std::int64_t columns, std::uint16_t* to);

// y [rows, columns] [+]= left [rows, depth] · right [depth, columns]
struct SmallProduct {
  const std::uint16_t* left;
  std::int64_t left_stride;
  const std::uint16_t* right;  // as pack_right packs it
  std::int64_t right_depth;    // its padded rows
  std::int64_t rows;
  std::int64_t columns;  // a multiple of kTileSide
  std::int64_t depth;    // a multiple of kTileDepth
  float* y;
  std::int64_t y_stride;
  bool accumulate;
};
void multiply(const SmallProduct& product);
void multiply_amx(const SmallProduct& product);  // for those with AMX

}  // namespace bf16
#endif

}  // namespace deltafox::cpu
