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
  const float* scales;          // [blocks, T]
  const std::int32_t* offsets;  // [blocks, T], 128 Σ q of a block: values of w are 128 too large;
                                // null where a kernel takes them as signed
  const std::int16_t* group_sums;  // [T, blocks · 8], Σ q of a group; null for many tokens
  std::int64_t tokens;
  std::int64_t blocks;

  // Where what belongs to a token and a block lies among [blocks, T].
  std::int64_t index(std::int64_t token, std::int64_t block) const {
    return block * tokens + token;
  }
};

// A block of columns of a few panels, for a few tokens:
//   sums[t, 16·p + r] = fma(float(Σ_k x_q[t, k] · w_q[r, k]), x_scale[t] · scales[r], sums[…])
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
// Where what belongs to token t and the block lies among the [blocks, T] of QuantizedRows.
inline std::int64_t index_of(const PackedBlock& block, std::int64_t t) {
  return block.x->index(block.token + t, block.block);
}

// All columns of a few panels, for some tokens:
//   sums[t, 16·p + r] = Σ_blocks float(Σ_k x_q[t, k] · w_q[r, k]) · (x_scale[t] · scales[r])
// by fma, block after block.
struct PackedPanels {
  const QuantizedRows* x;
  std::int64_t token;  // the first
  std::int64_t tokens;
  const PackedLayout* layout;
  const std::byte* first;  // panel
  int panels;              // up to kMaxPanels, or kTilePanels
  const std::byte* next;   // the panels that are multiplied next, or null
  float* sums;             // [tokens, kTileColumns], or kTilePanels · 16 columns
};
constexpr std::int64_t kFewTokens = 4;
constexpr int kTilePanels = 2;  // that AMX works on at a time

// Of a processor. Every kernel of a kind gives the same bits.
struct PackedKernels {
  // For the values of kQ8, or of kQ4 once expanded.
  void (*eight_bits)(const PackedBlock&) = nullptr;
  // The values of a block of a panel of kQ4, factor · q + 128, as kQ8 has them.
  void (*expand)(const std::byte* head, const std::byte* values, std::int64_t columns,
                 std::byte* expanded) = nullptr;
  // For panels of kQ8 and of kQ4 as they lie in memory, up to kFewTokens tokens, which need no
  // `next`; null: there are none.
  void (*few_eight_bits)(const PackedPanels&) = nullptr;
  void (*few_four_bits)(const PackedPanels&) = nullptr;
  // The same for any number of tokens and kTilePanels panels.
  void (*many_eight_bits)(const PackedPanels&) = nullptr;
  void (*many_four_bits)(const PackedPanels&) = nullptr;
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
#undef DELTAFOX_PACKED_KERNELS
namespace avx512 {
void few_eight_bits(const PackedPanels& panels);
void few_four_bits(const PackedPanels& panels);
// factor · q, for signed products.
void expand_signed(const std::byte* head, const std::byte* values, std::int64_t columns,
                   std::byte* expanded);
}  // namespace avx512
namespace amx {
void many_eight_bits(const PackedPanels& panels);
void many_four_bits(const PackedPanels& panels);
}  // namespace amx

}  // namespace deltafox::cpu
