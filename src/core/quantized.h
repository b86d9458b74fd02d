// How the packed weight matrices kQ8 and kQ4 lie in memory and in files.
//
// A matrix [N, K] is cut into panels of 16 rows, a panel into blocks of 256 columns (the last one
// shorter: K rounded up to a multiple of 64). Blocks of a panel follow one another, and so do
// panels. A block holds
//   scales  [16] float32, one a row
//   kQ4 only: factors [64] bytes; byte 16·p + r holds those of row r, 1 to 15, for the groups of 32
//           columns 2·p (low half) and 2·p + 1 (high half)
//   values  kQ8: [columns / 4][16 rows][4 columns] bytes, each the integer + 128
//           kQ4: [columns / 8][16 rows][4 columns] bytes: of the columns 8·i + 0…3 (low half) and
//           8·i + 4…7 (high half), each the integer + 8
// and a weight is scale · q with q in [−127, 127], or scale · factor · q with q in [−8, 7]: since
// |factor · q| ≤ 120, an int4 matrix is an int8 matrix written shorter. What is beyond N or K is
// zero. The order of the values is that of the dot-product instructions: four columns of sixteen
// rows at a time.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>

#include "deltafox/dtype.h"

namespace deltafox {

constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kQuantBlock = 256;  // columns that share a scale
constexpr std::int64_t kQuantGroup = 32;   // columns that share a factor
constexpr std::int64_t kQuantStep = 64;    // K is rounded up to a multiple of it
constexpr std::int64_t kScaleBytes = kPanelRows * 4;
constexpr std::int64_t kFactorBytes = 64;

class PackedLayout {
 public:
  PackedLayout(DType dtype, std::int64_t rows, std::int64_t columns)
      : four_bits_(dtype == DType::kQ4),
        panels_((rows + kPanelRows - 1) / kPanelRows),
        columns_((columns + kQuantStep - 1) / kQuantStep * kQuantStep) {
    assert(is_packed(dtype));
  }

  std::int64_t panels() const { return panels_; }
  std::int64_t columns() const { return columns_; }  // K rounded up
  std::int64_t blocks() const { return (columns_ + kQuantBlock - 1) / kQuantBlock; }
  std::int64_t block_columns(std::int64_t block) const {
    return std::min(kQuantBlock, columns_ - block * kQuantBlock);
  }
  // Bytes before the values of a block.
  std::int64_t head_bytes() const { return kScaleBytes + (four_bits_ ? kFactorBytes : 0); }
  // Where block b of a panel begins; whole blocks are of one size.
  std::int64_t block_offset(std::int64_t block) const {
    return block * (head_bytes() + value_bytes(kQuantBlock));
  }
  std::int64_t panel_bytes() const { return blocks() * head_bytes() + value_bytes(columns_); }
  std::int64_t bytes() const { return panels_ * panel_bytes(); }

 private:
  std::int64_t value_bytes(std::int64_t columns) const {
    return columns * kPanelRows / (four_bits_ ? 2 : 1);
  }

  bool four_bits_;
  std::int64_t panels_;
  std::int64_t columns_;
};

}  // namespace deltafox
