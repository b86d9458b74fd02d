#include "ops/tile_order.h"

#include <algorithm>

#include "cpu/isa.h"

namespace deltafox::cpu {
namespace {

// on_piece(offset in row-major order, offset in tiles) for each kTileOrderColumns of `rows` rows.
template <typename OnPiece>
void for_pieces(std::int64_t rows, std::int64_t columns, OnPiece&& on_piece) {
  for (std::int64_t k = 0; k < columns; k += kTileOrderColumns) {
    for (std::int64_t r = 0; r < rows; ++r) {
      on_piece(r * columns + k, k * rows + r * kTileOrderColumns);
    }
  }
}

}  // namespace

bool prefers_tiles(const Shape& shape) {
  return isa().amx_bf16 && shape[1] % kTileOrderColumns == 0;
}

void arrange_in_tiles(Context& ctx, const TensorView& w) {
  const std::int64_t rows = w.shape[0];
  const std::int64_t columns = w.shape[1];
  ScratchScope scratch(ctx);
  const std::int64_t slot_elements = kTileOrderRows * columns;
  auto* const slots = scratch.array<std::uint16_t>(ctx.threads().size() * slot_elements).data();
  const std::int64_t tasks = (rows + kTileOrderRows - 1) / kTileOrderRows;
  ctx.threads().parallel_for(tasks, [&](std::int64_t task, int slot) {
    const std::int64_t first = task * kTileOrderRows;
    const std::int64_t count = std::min(kTileOrderRows, rows - first);
    auto* const block = static_cast<std::uint16_t*>(w.data) + first * columns;
    std::uint16_t* const tiles = slots + slot * slot_elements;
    for_pieces(count, columns, [&](std::int64_t from, std::int64_t to) {
      std::copy_n(block + from, kTileOrderColumns, tiles + to);
    });
    std::copy_n(tiles, count * columns, block);
  });
}

void copy_from_tiles(const ConstTensorView& w, std::uint16_t* to) {
  const std::int64_t columns = w.shape[1];
  const auto* const tiles = static_cast<const std::uint16_t*>(w.data);
  for (std::int64_t first = 0; first < w.shape[0]; first += kTileOrderRows) {
    const std::int64_t count = std::min(kTileOrderRows, w.shape[0] - first);
    const std::int64_t block = first * columns;
    for_pieces(count, columns, [&](std::int64_t row_major, std::int64_t in_tiles) {
      std::copy_n(tiles + block + in_tiles, kTileOrderColumns, to + block + row_major);
    });
  }
}

}  // namespace deltafox::cpu
