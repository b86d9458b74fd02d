// Shapes of the tile registers.
//
// GCC's intrinsics of tiles tell the compiler of 8 bytes that ldtilecfg reads and of none that
// tileloadd does: what was stored before may be missing. Those here stand in for them.
#pragma once

#if defined(__x86_64__)

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

// NOLINTBEGIN(hicpp-no-assembler)
__attribute__((target("amx-tile"))) inline void load_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// Between storing what tiles are loaded from and loading them.
inline void finish_stores() {
  asm volatile("" : : : "memory");
}
// NOLINTEND(hicpp-no-assembler)

}  // namespace deltafox::cpu
#endif
