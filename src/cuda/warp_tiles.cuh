// Operands and products of a warp from tiles in shared memory (tensor_core.cuh), which copies fill.
#pragma once

#include "cuda/tensor_core.cuh"

namespace deltafox::cuda {

// [64, 8·kPieces] from rows `stride` apart; rows that are not valid become zeros.
template <int kPieces>
__device__ void load_tile(std::uint32_t tile, const bf16* rows, std::ptrdiff_t stride,
                          int valid_rows) {
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kPieces;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const bool valid = row < valid_rows;
    copy_piece_async(tile + piece_offset(row, piece),
                     valid ? rows + row * stride + piece * 8 : rows, valid);
  }
}

// Left operands of rows 16·warp to 16·warp + 15, columns 16k to 16k + 15, of a tile or its
// transpose.
__device__ inline void load_rows(std::uint32_t (&a)[4], std::uint32_t tile, int warp, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, tile + piece_offset(16 * warp + lane % 16, 2 * k + lane / 16));
}
__device__ inline void load_columns(std::uint32_t (&a)[4], std::uint32_t tile, int warp, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(
      a, tile + piece_offset(16 * k + 8 * (lane / 16) + lane % 8, 2 * warp + (lane / 8) % 2));
}

// d += a · rows 16k to 16k + 15 of a tile, from its column 16·first on.
template <int kTiles>
__device__ void add_times(float (&d)[kTiles][4], const std::uint32_t (&a)[4], std::uint32_t tile,
                          int k, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    std::uint32_t b[4];
    load_matrices_transposed(b, tile + piece_offset(16 * k + ((lane / 8) % 2) * 8 + lane % 8,
                                                    2 * (first + n) + lane / 16));
    mma_bf16(d[2 * n], a, b[0], b[1]);
    mma_bf16(d[2 * n + 1], a, b[2], b[3]);
  }
}
// d += a · (columns 16k to 16k + 15 of a tile)ᵀ, from its row 16·first on.
template <int kTiles>
__device__ void add_times_transposed(float (&d)[kTiles][4], const std::uint32_t (&a)[4],
                                     std::uint32_t tile, int k, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles / 2; ++n) {
    std::uint32_t b[4];
    load_matrices(b, tile + piece_offset(16 * (first + n) + (lane / 16) * 8 + lane % 8,
                                         2 * k + (lane / 8) % 2));
    mma_bf16(d[2 * n], a, b[0], b[1]);
    mma_bf16(d[2 * n + 1], a, b[2], b[3]);
  }
}

template <int kTiles>
__device__ void clear(float (&d)[kTiles][4]) {
#pragma unroll
  for (auto& four : d) four[0] = four[1] = four[2] = four[3] = 0;
}

// Rows lane / 4 of an accumulator times `low`, those 8 behind them times `high`.
template <int kTiles>
__device__ void scale_rows(float (&d)[kTiles][4], float low, float high) {
#pragma unroll
  for (auto& four : d) {
    four[0] *= low;
    four[1] *= low;
    four[2] *= high;
    four[3] *= high;
  }
}

__device__ inline void store_pair(bf16* to, float low, float high) {
  *reinterpret_cast<std::uint32_t*>(to) = pack(low, high);
}

// Of four lanes, lane q gives word k to lane k, as its word q.
__device__ inline void turn_words(std::uint32_t (&words)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const std::uint32_t sent = upper ? words[i] : words[i + bit];
      const std::uint32_t got = __shfl_xor_sync(0xffffffffU, sent, bit);
      words[i] = upper ? got : words[i];
      words[i + bit] = upper ? words[i + bit] : got;
    }
  }
}

// An accumulator of 16 rows in bfloat16, 16 bytes at a time: rows of 4-byte pieces would fill no
// sector of memory at once.
template <int kTiles>
__device__ void store_tiles(bf16* to, std::ptrdiff_t stride, const float (&d)[kTiles][4]) {
  static_assert(kTiles % 4 == 0);
  const int lane = threadIdx.x % 32;
  to += lane / 4 * stride + 8 * (lane % 4);
#pragma unroll
  for (int j = 0; j < kTiles; j += 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) words[n] = pack(d[j + n][2 * i], d[j + n][2 * i + 1]);
      turn_words(words);
      *reinterpret_cast<uint4*>(to + 8 * i * stride + 8 * j) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace deltafox::cuda
