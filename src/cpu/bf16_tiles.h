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

// The left operand: from [rows, columns] · scale, rounded, zeros up to padded_depth(columns); rows
// of `to` are to_stride apart, a multiple of kTileDepth.
void round_left(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                float scale, std::uint16_t* to, std::int64_t to_stride);

// The right operand, [columns / 16][right_depth / 2][16 columns][2 rows]: from [depth, columns],
// rounded, zeros up to `padded` rows, a multiple of kTileDepth. columns is a multiple of 16. What
// comes below the padded rows, if right_depth is more, is left as it is.
void pack_right(const float* from, std::int64_t stride, std::int64_t depth, std::int64_t padded,
                std::int64_t columns, std::uint16_t* to, std::int64_t right_depth);

// The right operand leftᵀ [depth, columns] of a left one [columns, depth], for depths that are
// multiples of kTileDepth; `to` begins a cache line.
void transpose_left(const std::uint16_t* left, std::int64_t stride, std::int64_t columns,
                    std::int64_t depth, std::uint16_t* to);
// The left operand [rows, columns] of the first rows of a right one of right_depth rows; rows is
// even, columns a multiple of kTileDepth.
void right_to_left(const std::uint16_t* right, std::int64_t right_depth, std::int64_t rows,
                   std::int64_t columns, std::uint16_t* to);

// Rows that a product asks the caches for meanwhile: in one go they would be waited for.
class RowsToFetch {
 public:
  RowsToFetch(const float* data, std::int64_t stride, std::int64_t rows, std::int64_t width)
      : data_(data), stride_(stride), rows_(rows), width_(width) {}

  void fetch(std::int64_t rows) {
    constexpr std::int64_t kLine = 64 / sizeof(float);
    for (; rows > 0 && rows_ > 0; --rows, --rows_, data_ += stride_) {
      for (std::int64_t i = 0; i < width_; i += kLine) __builtin_prefetch(data_ + i, 0, 2);
    }
  }

 private:
  const float* data_;
  std::int64_t stride_;
  std::int64_t rows_;
  std::int64_t width_;
};

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
  RowsToFetch* meanwhile = nullptr;
  bool configured = false;  // within a WholeTiles; rows is a multiple of kTileSide
};
void multiply(const SmallProduct& product);

// For a number of products by whole tiles, which then need not set up the tile registers each.
class WholeTiles {
 public:
  WholeTiles();
  ~WholeTiles();
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;
};

// For processors with AMX:
void multiply_amx(const SmallProduct& product);
void configure_amx();
void release_amx();

}  // namespace bf16
#endif

}  // namespace deltafox::cpu
