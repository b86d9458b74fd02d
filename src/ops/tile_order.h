// The order of kBF16Tiles, that in which the tiles of AMX read a bfloat16 matrix [N, K]: sixteen
// rows at a time (the last ones may be fewer), of them 32 columns at a time, of these row by row. K
// is a multiple of 32, and the bytes are as many as before. A product with a few tokens reads
// memory in order so; by the row-major matrix it reads sixteen rows side by side, which is slower
// by a fifth.
#pragma once

#include <cstdint>

#include "core/context.h"

namespace deltafox {

constexpr std::int64_t kTileOrderRows = 16;
constexpr std::int64_t kTileOrderColumns = 32;

namespace ops {
// Whether `linear` is faster with a BF16 matrix of this shape, [N, K], in tiles.
bool prefers_tiles(const Context& ctx, const Shape& shape);
// BF16 [N, K] becomes kBF16Tiles, in place.
void arrange_in_tiles(Context& ctx, const TensorView& w);
// A kBF16Tiles matrix [N, K], row-major.
void copy_from_tiles(const ConstTensorView& w, std::uint16_t* to);
}  // namespace ops

namespace cpu {
bool prefers_tiles(const Shape& shape);
void arrange_in_tiles(Context& ctx, const TensorView& w);
void copy_from_tiles(const ConstTensorView& w, std::uint16_t* to);
}  // namespace cpu

}  // namespace deltafox
