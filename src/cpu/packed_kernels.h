// The inner kernels of packed matrices: products of integers, exact in any order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/quantized.h"

namespace deltafox::cpu {

constexpr int kMaxPanels = 4;  // that a kernel works on at a time
constexpr std::int64_t kTileColumns = kMaxPanels * kPanelRows;

// Activations as integers: x[t, k] ≈ scale · q, with a scale for each block of 256 columns.
struct QuantizedRows {
  const std::int8_t* q;  // [T, stride], zeros beyond K
  std::int64_t stride;
  const float* scales;          // [T, blocks]
  const std::int32_t* offsets;  // [T, blocks], 128 Σ q of a block: values of w are 128 too large
  const std::int16_t* group_sums;  // [T, blocks · 8], Σ q of a group
  std::int64_t blocks;
};

// A block of columns of a few panels, for a few tokens:
//   sums[t, 16·p + r] += float(Σ_k x_q[t, k] · w_q[r, k]) · (x_scale[t] · scales[r])
struct PackedBlock {
  const QuantizedRows* x;
  std::int64_t token;  // the first
  std::int64_t tokens;
  std::int64_t block;  // of 256 columns
  std::int64_t columns;
  int panels;                // up to kMaxPanels
  const std::byte* head;     // scales, and the factors of kQ4, of the first panel
  std::int64_t head_stride;  // bytes from one panel's to the next's
  const std::byte* values;   // of the first panel
  std::int64_t value_stride;
  const std::byte* next;   // of the first panel, head_stride apart: what is read from memory next
  std::int64_t next_step;  // its bytes for four columns
  float* sums;             // [tokens, kTileColumns]
};

// Row t of a block's tokens, from its first column on.
inline const std::int8_t* token_at(const PackedBlock& block, std::int64_t t) {
  return block.x->q + (block.token + t) * block.x->stride + block.block * kQuantBlock;
}
// Where what belongs to token t and the block lies among the [T, blocks] of QuantizedRows.
inline std::int64_t index_of(const PackedBlock& block, std::int64_t t) {
  return (block.token + t) * block.x->blocks + block.block;
}

// All columns of a few panels, for up to kFewTokens tokens:
//   sums[t, 16·p + r] = Σ_blocks float(Σ_k x_q[t, k] · w_q[r, k]) · (x_scale[t] · scales[r])
struct PackedPanels {
  const QuantizedRows* x;
  std::int64_t tokens;
  const PackedLayout* layout;
  const std::byte* first;  // panel
  int panels;              // up to kMaxPanels
  float* sums;             // [tokens, kTileColumns]
};
constexpr std::int64_t kFewTokens = 4;

// Of a processor. Every kernel of a kind gives the same bits.
struct PackedKernels {
  // For the values of kQ8, or of kQ4 once expanded.
  void (*eight_bits)(const PackedBlock&);
  // The values of a block of a panel of kQ4, factor · q + 128, as kQ8 has them.
  void (*expand)(const std::byte* head, const std::byte* values, std::int64_t columns,
                 std::byte* expanded);
  // For panels of kQ8 and of kQ4 as they lie in memory; null: there are none.
  void (*few_eight_bits)(const PackedPanels&);
  void (*few_four_bits)(const PackedPanels&);
};

#define DELTAFOX_PACKED_KERNELS(name)                                               \
  namespace name {                                                                  \
  void eight_bits(const PackedBlock& block);                                        \
  void expand(const std::byte* head, const std::byte* values, std::int64_t columns, \
              std::byte* expanded);                                                 \
  }
DELTAFOX_PACKED_KERNELS(plain)
DELTAFOX_PACKED_KERNELS(avx2)
DELTAFOX_PACKED_KERNELS(avx512)
DELTAFOX_PACKED_KERNELS(amx)  // eight_bits alone
#undef DELTAFOX_PACKED_KERNELS
namespace avx512 {
void few_eight_bits(const PackedPanels& panels);
void few_four_bits(const PackedPanels& panels);
}  // namespace avx512

}  // namespace deltafox::cpu
