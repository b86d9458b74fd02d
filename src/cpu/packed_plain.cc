// The packed kernels for any processor.
#include <array>
#include <cmath>
#include <cstring>

#include "cpu/packed_kernels.h"

namespace deltafox::cpu::plain {

void eight_bits(const PackedBlock& block) {
  const QuantizedRows& x = *block.x;
  for (std::int64_t t = 0; t < block.tokens; ++t) {
    const std::int8_t* q = token_at(block, t);
    const float x_scale = x.scales[index_of(block, t)];
    const std::int32_t offset = -x.offsets[index_of(block, t)];
    for (int p = 0; p < block.panels; ++p) {
      std::array<float, kPanelRows> scales{};
      std::memcpy(scales.data(), block.head + p * block.head_stride, sizeof scales);
      const auto* w = reinterpret_cast<const std::uint8_t*>(block.values + p * block.value_stride);
      std::array<std::int32_t, kPanelRows> products{};
      products.fill(offset);
      for (std::int64_t k = 0; k < block.columns; k += 4) {
        for (std::size_t r = 0; r < kPanelRows; ++r, w += 4) {
          products[r] += q[k] * w[0] + q[k + 1] * w[1] + q[k + 2] * w[2] + q[k + 3] * w[3];
        }
      }
      float* sums = block.sums + t * kTileColumns + p * kPanelRows;
      for (std::size_t r = 0; r < kPanelRows; ++r) {
        sums[r] = std::fma(static_cast<float>(products[r]), x_scale * scales[r], sums[r]);
      }
    }
  }
}

void expand(const std::byte* head, const std::byte* values, std::int64_t columns,
            std::byte* expanded) {
  const std::byte* factors = head + kScaleBytes;
  for (std::int64_t k = 0; k < columns; k += 8) {
    const std::int64_t group = k / kQuantGroup;
    for (std::int64_t r = 0; r < kPanelRows; ++r) {
      const auto pair = static_cast<unsigned>(factors[group / 2 * kPanelRows + r]);
      const int factor = static_cast<int>((pair >> (group % 2 * 4)) & 15U);
      for (std::int64_t i = 0; i < 4; ++i) {
        const auto halves = static_cast<unsigned>(values[k * kPanelRows / 2 + r * 4 + i]);
        std::byte* to = expanded + k * kPanelRows + r * 4 + i;
        to[0] = static_cast<std::byte>(factor * (static_cast<int>(halves & 15U) - 8) + 128);
        to[4 * kPanelRows] =
            static_cast<std::byte>(factor * (static_cast<int>(halves >> 4) - 8) + 128);
      }
    }
  }
}

}  // namespace deltafox::cpu::plain
