#include "cpu/bf16_tiles.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"

#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

#include "cpu/transpose_avx512-inl.h"

namespace deltafox::cpu::bf16 {
namespace {

// kRows rows by kVectors · 16 columns: pairs of a row times those of sixteen columns.
template <int kRows, int kVectors>
DELTAFOX_TARGET inline void rectangle(const SmallProduct& of, std::int64_t row,
                                      std::int64_t column) {
  const std::uint16_t* left = of.left + row * of.left_stride;
  const std::uint16_t* right = of.right + column * of.right_depth;
  float* y = of.y + row * of.y_stride + column;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = of.accumulate ? _mm512_loadu_ps(y + r * of.y_stride + v * kTileSide)
                                 : _mm512_setzero_ps();
    }
  }
  for (std::int64_t k = 0; k < of.depth; k += 2) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = reinterpret_cast<__m512bh>(
          _mm512_loadu_si512(right + v * kTileSide * of.right_depth + k * kTileSide));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      std::int32_t pair = 0;
      std::memcpy(&pair, left + r * of.left_stride + k, sizeof pair);
      const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pairs, columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(y + r * of.y_stride + v * kTileSide, sums[r][v]);
    }
  }
}

template <int kVectors>
DELTAFOX_TARGET void columns_of(const SmallProduct& of, std::int64_t column) {
  std::int64_t r = 0;
  for (; r + 4 <= of.rows; r += 4) rectangle<4, kVectors>(of, r, column);
  for (; r + 2 <= of.rows; r += 2) rectangle<2, kVectors>(of, r, column);
  for (; r < of.rows; ++r) rectangle<1, kVectors>(of, r, column);
}

DELTAFOX_TARGET void multiply_avx512(const SmallProduct& of) {
  constexpr std::int64_t kVectors = 4;
  std::int64_t c = 0;
  for (; c + kVectors * kTileSide <= of.columns; c += kVectors * kTileSide) {
    columns_of<kVectors>(of, c);
  }
  for (; c < of.columns; c += kTileSide) columns_of<1>(of, c);
}

}  // namespace

DELTAFOX_TARGET void transpose(const float* from, std::int64_t stride, std::int64_t rows,
                               std::int64_t columns, float* to, std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; r += kTileSide) {
    for (std::int64_t c = 0; c < columns; c += kTileSide) {
      cpu::transpose(from + r * stride + c, stride, to + c * to_stride + r, to_stride);
    }
  }
}

DELTAFOX_TARGET void round_left(const float* from, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, float scale, std::uint16_t* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  const auto columns_at = [&](std::int64_t k) DELTAFOX_TARGET {
    const std::int64_t count = std::clamp<std::int64_t>(columns - k, 0, kTileSide);
    const auto inside = static_cast<__mmask16>((1U << count) - 1U);
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, from + k), factor);
  };
  for (std::int64_t r = 0; r < rows; ++r, from += stride) {
    // Whole lines: tiles cannot be loaded from halves that are still on their way to the cache.
    for (std::int64_t k = 0; k < columns; k += kTileDepth, to += kTileDepth) {
      const __m512 first = columns_at(k);
      const auto both = _mm512_cvtne2ps_pbh(columns_at(k + kTileSide), first);
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(both));
    }
  }
}

DELTAFOX_TARGET void pack_right(const float* from, std::int64_t stride, std::int64_t depth,
                                std::int64_t padded, std::int64_t columns, std::uint16_t* to) {
  const __m512i side_by_side = _mm512_set_epi32(
      0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
      0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  for (std::int64_t d = 0; d < padded; d += 2) {
    const __mmask16 first = d < depth ? 0xffff : 0;
    const __mmask16 second = d + 1 < depth ? 0xffff : 0;
    for (std::int64_t c = 0; c < columns; c += kTileSide) {
      const float* at = from + d * stride + c;
      const auto rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
          _mm512_maskz_loadu_ps(second, at + stride), _mm512_maskz_loadu_ps(first, at)));
      _mm512_storeu_si512(to + c * padded + d * kTileSide,
                          _mm512_permutexvar_epi16(side_by_side, rows));
    }
  }
}

void multiply(const SmallProduct& product) {
  isa().amx_bf16 ? multiply_amx(product) : multiply_avx512(product);
}

}  // namespace deltafox::cpu::bf16
#endif
