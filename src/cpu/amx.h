// Shapes of the tile registers.
#pragma once

#include <cstdint>

namespace deltafox::cpu {

// The operand of ldtilecfg, palette 1.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, std::int64_t count, std::int64_t bytes) {
    rows[tile] = static_cast<std::uint8_t>(count);
    row_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

// _tile_loadconfig of GCC 12 tells the optimiser of the first 8 bytes alone, which then leaves the
// others unwritten.
__attribute__((target("amx-tile"))) inline void load_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));  // NOLINT(hicpp-no-assembler)
}

}  // namespace deltafox::cpu
