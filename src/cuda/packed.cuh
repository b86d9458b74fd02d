// How the packed matrices of core/quantized.h lie in a GPU's memory: in the same panels, blocks and
// bytes, each block in an order of its own, that of the operands of products of 16 rows of w by 16
// columns. Lane l of a warp has rows g = l / 4 and g + 8 of a panel and, of each 32 columns, the
// eight from 8·(l % 4) on.
//   scales   [8 g][2] float32: of rows g and g + 8
//   factors  kQ4 only: [4 p][8 g][2] bytes, rows g and g + 8; low half group 2p, high half 2p + 1
//   values   [columns / 32][32 lanes][2 rows][8 columns]
//            kQ8: a byte each, the integer + 128, of four columns in the order 0, 2, 1, 3
//            kQ4: half a byte each, the integer + 8, from the lowest on columns 0, 2, 4, 6, 1, 3,
//            5, 7
// so that masks make pairs of bfloat16 of neighbouring columns. Integers, and factors times
// integers, are bfloat16 exactly.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/quantized.h"
#include "core/tensor.h"
#include "cuda/elements.cuh"

namespace deltafox::cuda {

constexpr int kPackedColumns = 32;  // in an operand's order, a group of kQ4
constexpr int kPackedBlock = static_cast<int>(kQuantBlock);
constexpr int kPackedRows = static_cast<int>(kPanelRows);
static_assert(kPackedColumns == kQuantGroup);

// A matrix as kernels see it.
struct PackedMatrix {
  const std::byte* data;
  int rows;         // N
  int depth;        // K
  int columns;      // K rounded up
  int panel_bytes;  // of all blocks of 16 rows
  bool four_bits;

  PackedMatrix() = default;
  explicit PackedMatrix(const ConstTensorView& w)
      : data(static_cast<const std::byte*>(w.data)),
        rows(static_cast<int>(w.shape[0])),
        depth(static_cast<int>(w.shape[1])),
        four_bits(w.dtype == DType::kQ4) {
    const PackedLayout layout(w.dtype, rows, depth);
    columns = static_cast<int>(layout.columns());
    panel_bytes = static_cast<int>(layout.panel_bytes());
  }
};

template <bool kFourBits>
struct PackedForm {
  static constexpr int kHeadBytes = static_cast<int>(kScaleBytes + (kFourBits ? kFactorBytes : 0));
  static constexpr int kLaneBytes = kFourBits ? 8 : 16;  // of 32 columns of a panel
  static constexpr int kStepBytes = 32 * kLaneBytes;
  static constexpr int kBlockBytes = kHeadBytes + kPackedBlock / kPackedColumns * kStepBytes;
};

__device__ inline std::uint32_t bits_of(const __nv_bfloat162& pair) {
  return reinterpret_cast<const std::uint32_t&>(pair);
}
__device__ inline __nv_bfloat162 pair_of(std::uint32_t bits) {
  return reinterpret_cast<const __nv_bfloat162&>(bits);
}

constexpr std::uint32_t kPairOf128 = 0x43004300U;  // whose last places are ones

// Of bytes 0 and 2 of a word, less 128 each. 128 and the low seven bits of a byte are a bfloat16,
// from which 128 is to be taken if the high bit is set, and else 256.
__device__ inline std::uint32_t pair_of_bytes(std::uint32_t word) {
  const std::uint32_t low = (word & 0x007f007fU) | kPairOf128;
  const std::uint32_t off = (~word & 0x00800080U) | kPairOf128;
  return bits_of(__hsub2(pair_of(low), pair_of(off)));
}

// A factor f of kQ4 as it is multiplied with: f · (128 + u) − 136 f = f · (u − 8), exactly.
struct PackedFactor {
  __nv_bfloat162 times;
  __nv_bfloat162 plus;

  __device__ explicit PackedFactor(std::uint32_t f) {
    times = __hsub2(pair_of(f * 0x00010001U | kPairOf128), pair_of(kPairOf128));
    plus = __hmul2(times, __floats2bfloat162_rn(-136, -136));
  }
};

// Of halves 0 and 4 of the bytes of a word.
__device__ inline std::uint32_t pair_of_halves(std::uint32_t word, const PackedFactor& factor) {
  return bits_of(__hfma2(pair_of((word & 0x000f000fU) | kPairOf128), factor.times, factor.plus));
}

// Eight columns of a row as pairs of bfloat16.
struct EightColumns {
  std::uint32_t pairs[4];

  __device__ EightColumns(std::uint32_t low, std::uint32_t high)
      : pairs{pair_of_bytes(low), pair_of_bytes(low >> 8), pair_of_bytes(high),
              pair_of_bytes(high >> 8)} {}
  __device__ EightColumns(std::uint32_t word, const PackedFactor& f)
      : pairs{pair_of_halves(word, f), pair_of_halves(word >> 4, f), pair_of_halves(word >> 8, f),
              pair_of_halves(word >> 12, f)} {}
};

// What a lane has of 32 columns of a panel, as it lies in memory, with the scales of its two rows
// and what holds their factors. `step` counts the columns of a block by 32.
template <bool kFourBits>
struct PackedOperand;

template <>
struct PackedOperand<false> {
  uint4 values;
  float2 scales;

  // Rows g and g + 8.
  __device__ EightColumns low(int /*step*/) const { return {values.x, values.y}; }
  __device__ EightColumns high(int /*step*/) const { return {values.z, values.w}; }
};

template <>
struct PackedOperand<true> {
  uint2 values;
  float2 scales;
  std::uint32_t factors;

  __device__ EightColumns low(int step) const {
    return {values.x, PackedFactor(factors >> step % 2 * 4 & 15U)};
  }
  __device__ EightColumns high(int step) const {
    return {values.y, PackedFactor(factors >> (8 + step % 2 * 4) & 15U)};
  }
};

template <bool kFourBits>
__device__ PackedOperand<kFourBits> load_operand(const std::byte* block, int step, int lane) {
  using Form = PackedForm<kFourBits>;
  PackedOperand<kFourBits> operand;
  const std::byte* values =
      block + Form::kHeadBytes + step * Form::kStepBytes + lane * Form::kLaneBytes;
  operand.scales = __ldg(reinterpret_cast<const float2*>(block) + lane / 4);
  if constexpr (kFourBits) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(operand.values.x), "=r"(operand.values.y)
                 : "l"(values));
    operand.factors = __ldg(reinterpret_cast<const std::uint16_t*>(block + kScaleBytes) +
                            step / 2 * 8 + lane / 4);
  } else {
    operand.values = load_stream(values);
  }
  return operand;
}

// c += a b, 16 rows of a by 8 columns of b
__device__ inline void multiply(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
                                std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += w xᵀ of 32 columns; x(h) are a lane's eight of row l / 4 of the h-th 8 rows of x.
template <bool kFourBits, int kHalves, typename X>
__device__ void add_packed(const PackedOperand<kFourBits>& w, int step, X x,
                           float (&c)[kHalves][4]) {
  const EightColumns low = w.low(step);
  const EightColumns high = w.high(step);
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const uint4 b = x(h);
    float sums[4] = {};
    multiply(sums, low.pairs[0], high.pairs[0], low.pairs[1], high.pairs[1], b.x, b.y);
    multiply(sums, low.pairs[2], high.pairs[2], low.pairs[3], high.pairs[3], b.z, b.w);
    c[h][0] = fmaf(sums[0], w.scales.x, c[h][0]);
    c[h][1] = fmaf(sums[1], w.scales.x, c[h][1]);
    c[h][2] = fmaf(sums[2], w.scales.y, c[h][2]);
    c[h][3] = fmaf(sums[3], w.scales.y, c[h][3]);
  }
}

}  // namespace deltafox::cuda
