// Packs weights by panels of 16 rows, and unpacks rows. Plain loops whose every step is exact or
// one IEEE rounding: all machines pack the same bytes.
#include "ops/quantize.h"

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/float_convert.h"
#include "core/quantized.h"

namespace deltafox::cpu {
namespace {

using Block = std::array<float, kQuantBlock>;
using Integers = std::array<float, kQuantBlock>;  // whole numbers

constexpr std::int64_t kGroups = kQuantBlock / kQuantGroup;
constexpr std::size_t kLanes = 8;  // partial sums, for the compiler to keep in vectors

// To the nearest even integer, for |x| < 2²²: what is added has units of one in its last place.
inline float nearest(float x) {
  constexpr float kShift = 12582912.0F;  // 1.5 · 2²³
  return (x + kShift) - kShift;
}

float largest(const float* w, std::int64_t n) {
  float max = 0;
  for (std::int64_t i = 0; i < n; ++i) max = std::max(max, std::abs(w[i]));
  return max;
}

struct Products {
  float wq;  // Σ w q
  float qq;  // Σ q²
};

// q = w / scale in [−8, 7] for a group, and the sums that its squared error is made of.
Products round_group(const float* w, float scale, float* q) {
  const float inverse = 1 / scale;
  std::array<float, kLanes> wq{};
  std::array<float, kLanes> qq{};
  for (std::size_t i = 0; i < kQuantGroup; i += kLanes) {
    for (std::size_t l = 0; l < kLanes; ++l) {
      const float value = std::min(7.0F, std::max(-8.0F, nearest(w[i + l] * inverse)));
      q[i + l] = value;
      wq[l] += w[i + l] * value;
      qq[l] += value * value;
    }
  }
  Products sums{0, 0};
  for (std::size_t l = 0; l < kLanes; ++l) {
    sums.wq += wq[l];
    sums.qq += qq[l];
  }
  return sums;
}

// The scale of least squared error among a few ways to round a group.
float best_group_scale(const float* w) {
  const float max = largest(w, kQuantGroup);
  float best = max / 7.5F;
  float least = 0;
  std::array<float, kQuantGroup> q{};
  for (const float steps : {6.5F, 7.0F, 7.5F, 8.0F, 8.5F}) {
    const float scale = max / steps;
    if (scale < 1e-30F) return 0;
    const Products sums = round_group(w, scale, q.data());
    if (sums.qq > 0 && sums.wq * sums.wq / sums.qq > least) {
      least = sums.wq * sums.wq / sums.qq;
      best = sums.wq / sums.qq;
    }
  }
  return best;
}

struct FourBits {
  float scale = 0;
  std::array<float, kGroups> factors{};
  Integers q{};
};

// scale · factors[g] · q for a block of a row (zeros beyond its columns).
FourBits round_block(const Block& w) {
  FourBits result;
  std::array<float, kGroups> wanted{};
  float max = 0;
  for (std::size_t g = 0; g < kGroups; ++g) {
    wanted[g] = best_group_scale(w.data() + g * kQuantGroup);
    max = std::max(max, wanted[g]);
  }
  result.factors.fill(1);
  result.scale = max / 15;
  if (max == 0) return result;
  // The factors for this scale, the scale for those factors, and the factors once more.
  for (int pass = 0; pass < 2; ++pass) {
    float wq = 0;
    float qq = 0;
    for (std::size_t g = 0; g < kGroups; ++g) {
      const float middle = nearest(wanted[g] / result.scale);
      float most = -1;
      float sum_wq = 0;
      float sum_qq = 0;
      for (const float shift : {0.0F, -1.0F, 1.0F}) {
        const float factor = std::min(15.0F, std::max(1.0F, middle + shift));
        const float scale = result.scale * factor;
        std::array<float, kQuantGroup> q{};
        const Products sums = round_group(w.data() + g * kQuantGroup, scale, q.data());
        const float gain = scale * (2 * sums.wq - scale * sums.qq);  // Σw² less the squared error
        if (gain <= most) continue;
        most = gain;
        result.factors[g] = factor;
        sum_wq = factor * sums.wq;
        sum_qq = factor * factor * sums.qq;
        std::copy(q.begin(), q.end(),
                  result.q.begin() + static_cast<std::ptrdiff_t>(g) * kQuantGroup);
      }
      wq += sum_wq;
      qq += sum_qq;
    }
    // The last pass keeps the integers and takes their best scale.
    if (qq > 0) result.scale = wq / qq;
  }
  return result;
}

void store_scale(std::byte* block, std::int64_t row, float scale) {
  std::memcpy(block + row * 4, &scale, sizeof scale);
}

float load_scale(const std::byte* block, std::int64_t row) {
  float scale = 0;
  std::memcpy(&scale, block + row * 4, sizeof scale);
  return scale;
}

// Where the value of a column of a row is in a block of eight bits.
std::int64_t value_at(std::int64_t row, std::int64_t column) {
  return (column / 4 * kPanelRows + row) * 4 + column % 4;
}
// The same of four bits; the high half holds the second four of eight columns.
std::int64_t half_at(std::int64_t row, std::int64_t column) {
  return (column / 8 * kPanelRows + row) * 4 + column % 4;
}
bool in_high_half(std::int64_t column) {
  return column % 8 >= 4;
}

void pack_eight(const Block& w, std::int64_t columns, std::int64_t row, std::byte* block) {
  const float max = largest(w.data(), columns);
  const float scale = max / 127;
  const float inverse = scale > 1e-30F ? 1 / scale : 0;
  store_scale(block, row, inverse > 0 ? scale : 0);
  std::byte* values = block + kScaleBytes;
  for (std::int64_t c = 0; c < columns; ++c) {
    const float q =
        std::min(127.0F, std::max(-127.0F, nearest(w[static_cast<std::size_t>(c)] * inverse)));
    values[value_at(row, c)] = static_cast<std::byte>(static_cast<int>(q) + 128);
  }
}

void pack_four(const Block& w, std::int64_t columns, std::int64_t row, std::byte* block) {
  const FourBits rounded = round_block(w);
  store_scale(block, row, rounded.scale);
  std::byte* factors = block + kScaleBytes;
  for (std::int64_t g = 0; g < kGroups; ++g) {
    const auto factor = static_cast<unsigned>(rounded.factors[static_cast<std::size_t>(g)]);
    factors[g / 2 * kPanelRows + row] |= static_cast<std::byte>(factor << (g % 2 * 4));
  }
  std::byte* values = factors + kFactorBytes;
  for (std::int64_t c = 0; c < columns; ++c) {
    const auto q = static_cast<unsigned>(rounded.q[static_cast<std::size_t>(c)] + 8);
    values[half_at(row, c)] |= static_cast<std::byte>(q << (in_high_half(c) ? 4 : 0));
  }
}

bool pack_panel(const QuantizeArgs& args, const PackedLayout& layout, std::int64_t panel) {
  const std::int64_t rows = args.w.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const bool four_bits = args.packed.dtype == DType::kQ4;
  auto* to = static_cast<std::byte*>(args.packed.data) + panel * layout.panel_bytes();
  std::memset(to, 0, static_cast<std::size_t>(layout.panel_bytes()));
  bool finite = true;
  for (std::int64_t r = 0; r < kPanelRows; ++r) {
    const std::int64_t row = panel * kPanelRows + r;
    for (std::int64_t b = 0; b < layout.blocks(); ++b) {
      Block w{};
      const std::int64_t begin = b * kQuantBlock;
      const std::int64_t inside = row < rows ? std::min(kQuantBlock, depth - begin) : 0;
      to_f32(args.w, row * depth + begin, {w.data(), static_cast<std::size_t>(inside)});
      for (const float value : w) finite = finite && std::isfinite(value);
      (four_bits ? pack_four : pack_eight)(w, layout.block_columns(b), r,
                                           to + layout.block_offset(b));
    }
  }
  return finite;
}

}  // namespace

void quantize(Context& ctx, const QuantizeArgs& args) {
  const PackedLayout layout(args.packed.dtype, args.w.shape[0], args.w.shape[1]);
  std::atomic<bool> finite{true};
  ctx.threads().parallel_for(layout.panels(), [&](std::int64_t panel) {
    if (!pack_panel(args, layout, panel)) finite.store(false, std::memory_order_relaxed);
  });
  if (!finite) fail("quantize: a weight is not finite");
}

void dequantize_row(const ConstTensorView& packed, std::int64_t row, float* y) {
  const PackedLayout layout(packed.dtype, packed.shape[0], packed.shape[1]);
  const auto* panel =
      static_cast<const std::byte*>(packed.data) + row / kPanelRows * layout.panel_bytes();
  const std::int64_t r = row % kPanelRows;
  for (std::int64_t k = 0; k < packed.shape[1]; ++k) {
    const std::byte* block = panel + layout.block_offset(k / kQuantBlock);
    const std::int64_t column = k % kQuantBlock;
    const std::byte* values = block + layout.head_bytes();
    int q = 0;
    if (packed.dtype == DType::kQ8) {
      q = static_cast<int>(values[value_at(r, column)]) - 128;
    } else {
      const std::int64_t group = column / kQuantGroup;
      const auto factors = static_cast<unsigned>(block[kScaleBytes + group / 2 * kPanelRows + r]);
      const auto halves = static_cast<unsigned>(values[half_at(r, column)]);
      const int factor = static_cast<int>((factors >> (group % 2 * 4)) & 15U);
      q = factor * (static_cast<int>((halves >> (in_high_half(column) ? 4 : 0)) & 15U) - 8);
    }
    y[k] = load_scale(block, r) * static_cast<float>(q);
  }
}

}  // namespace deltafox::cpu
