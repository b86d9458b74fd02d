// The packed kernels by the dot products of AVX-512 VNNI: bytes of w without a sign by bytes of x
// with one.
#if defined(__x86_64__)
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/packed_kernels.h"

#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace deltafox::cpu::avx512 {
namespace {

// Decoding reads w once: bytes are fetched this far ahead of where they are read.
constexpr std::int64_t kAhead = 2048;

DELTAFOX_TARGET inline __m512i four_columns(const std::int8_t* x) {
  std::int32_t columns = 0;
  std::memcpy(&columns, x, sizeof columns);
  return _mm512_set1_epi32(columns);
}

DELTAFOX_TARGET inline __m512i bytes_at(const std::byte* p) {
  return _mm512_loadu_si512(p);
}

// The tokens of a tile from `token` on, and panels from `panel` on.
template <int kTokens, int kPanels>
struct Tile {
  const std::int8_t* x[kTokens];
  const std::byte* values[kPanels];
  __m512i products[kTokens][kPanels];

  DELTAFOX_TARGET inline Tile(const PackedBlock& block, std::int64_t token, int panel) {
    for (int t = 0; t < kTokens; ++t) {
      x[t] = block.x->q + (block.token + token + t) * block.x->stride + block.block * kQuantBlock;
    }
    for (int p = 0; p < kPanels; ++p) {
      values[p] = block.values + (panel + p) * block.value_stride;
    }
  }

  // sums += products · (scale of x · scale of w)
  DELTAFOX_TARGET inline void finish(const PackedBlock& block, std::int64_t token, int panel) {
    __m512 scales[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      scales[p] = _mm512_loadu_ps(block.head + (panel + p) * block.head_stride);
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x_scale = _mm512_set1_ps(
          block.x->scales[(block.token + token + t) * block.x->blocks + block.block]);
      for (int p = 0; p < kPanels; ++p) {
        float* sums = block.sums + (token + t) * kTileColumns + (panel + p) * kPanelRows;
        const __m512 term =
            _mm512_mul_ps(_mm512_cvtepi32_ps(products[t][p]), _mm512_mul_ps(x_scale, scales[p]));
        _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), term));
      }
    }
  }
};

template <int kTokens, int kPanels>
DELTAFOX_TARGET void eight_bit_tile(const PackedBlock& block, std::int64_t token, int panel) {
  Tile<kTokens, kPanels> tile(block, token, panel);
  for (int t = 0; t < kTokens; ++t) {
    // Values of w are 128 too large.
    const __m512i offset = _mm512_set1_epi32(
        -128 * block.x->sums[(block.token + token + t) * block.x->blocks + block.block]);
    for (int p = 0; p < kPanels; ++p) tile.products[t][p] = offset;
  }
  for (std::int64_t k = 0; k < block.columns; k += 4) {
    __m512i w[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      const std::byte* at = tile.values[p] + k * kPanelRows;
      w[p] = bytes_at(at);
      if constexpr (kTokens <= 2) {
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      const __m512i x = four_columns(tile.x[t] + k);
      for (int p = 0; p < kPanels; ++p) {
        tile.products[t][p] = _mm512_dpbusd_epi32(tile.products[t][p], w[p], x);
      }
    }
  }
  tile.finish(block, token, panel);
}

// The integers of a group of 32 columns fit into 16 bits, so that one more dot product, of words,
// multiplies them by the group's factor and adds them.
template <int kTokens, int kPanels>
DELTAFOX_TARGET void four_bit_tile(const PackedBlock& block, std::int64_t token, int panel) {
  Tile<kTokens, kPanels> tile(block, token, panel);
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPanels; ++p) tile.products[t][p] = _mm512_setzero_si512();
  }
  const __m512i low_half = _mm512_set1_epi8(15);
  for (std::int64_t group = 0; group * kQuantGroup < block.columns; ++group) {
    __m512i sums[kTokens][kPanels];
    for (int t = 0; t < kTokens; ++t) {
      const std::int64_t row = (block.token + token + t) * block.x->blocks + block.block;
      const __m512i offset =
          _mm512_set1_epi32(-8 * block.x->group_sums[row * (kQuantBlock / kQuantGroup) + group]);
      for (int p = 0; p < kPanels; ++p) sums[t][p] = offset;
    }
    for (std::int64_t k = group * kQuantGroup; k < (group + 1) * kQuantGroup; k += 8) {
      __m512i low[kPanels];
      __m512i high[kPanels];
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* at = tile.values[p] + k * kPanelRows / 2;
        const __m512i halves = bytes_at(at);
        if constexpr (kTokens <= 2) {
          _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        }
        low[p] = _mm512_and_si512(halves, low_half);
        high[p] = _mm512_and_si512(_mm512_srli_epi16(halves, 4), low_half);
      }
      for (int t = 0; t < kTokens; ++t) {
        const __m512i first = four_columns(tile.x[t] + k);
        const __m512i second = four_columns(tile.x[t] + k + 4);
        for (int p = 0; p < kPanels; ++p) {
          sums[t][p] = _mm512_dpbusd_epi32(sums[t][p], low[p], first);
          sums[t][p] = _mm512_dpbusd_epi32(sums[t][p], high[p], second);
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      const std::byte* factors = block.head + (panel + p) * block.head_stride + kScaleBytes;
      const __m512i pairs = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors + group / 2 * kPanelRows)));
      const __m512i factor = group % 2 == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(15))
                                            : _mm512_srli_epi32(pairs, 4);
      for (int t = 0; t < kTokens; ++t) {
        tile.products[t][p] = _mm512_dpwssd_epi32(tile.products[t][p], sums[t][p], factor);
      }
    }
  }
  tile.finish(block, token, panel);
}

// kTile<tokens, panels> over a block: all tokens by kPanels panels at a time.
template <int kPanels>
DELTAFOX_TARGET void eight_bit_panels(const PackedBlock& block, int panel) {
  std::int64_t t = 0;
  for (; t + 6 <= block.tokens; t += 6) eight_bit_tile<6, kPanels>(block, t, panel);
  switch (block.tokens - t) {
    case 5:
      return eight_bit_tile<5, kPanels>(block, t, panel);
    case 4:
      return eight_bit_tile<4, kPanels>(block, t, panel);
    case 3:
      return eight_bit_tile<3, kPanels>(block, t, panel);
    case 2:
      return eight_bit_tile<2, kPanels>(block, t, panel);
    case 1:
      return eight_bit_tile<1, kPanels>(block, t, panel);
    default:
      return;
  }
}

template <int kTokens, int kPanels>
DELTAFOX_TARGET void four_bit_panels(const PackedBlock& block) {
  int p = 0;
  for (; p + kPanels <= block.panels; p += kPanels) four_bit_tile<kTokens, kPanels>(block, 0, p);
  for (; p < block.panels; ++p) four_bit_tile<kTokens, 1>(block, 0, p);
}

}  // namespace

DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  if (block.panels == kMaxPanels) return eight_bit_panels<kMaxPanels>(block, 0);
  for (int p = 0; p < block.panels; ++p) eight_bit_panels<1>(block, p);
}

DELTAFOX_TARGET void four_bits(const PackedBlock& block) {
  switch (block.tokens) {
    case 1:
      return four_bit_panels<1, 4>(block);
    case 2:
      return four_bit_panels<2, 4>(block);
    case 3:
      return four_bit_panels<3, 2>(block);
    default:
      return four_bit_panels<4, 2>(block);
  }
}

DELTAFOX_TARGET void expand(const std::byte* head, const std::byte* values, std::int64_t columns,
                            std::byte* expanded) {
  const __m512i low_half = _mm512_set1_epi8(15);
  const __m512i low_byte = _mm512_set1_epi16(255);
  for (std::int64_t group = 0; group * kQuantGroup < columns; ++group) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(head + kScaleBytes + group / 2 * kPanelRows)));
    const __m512i factor = group % 2 == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(15))
                                          : _mm512_srli_epi32(pairs, 4);
    const __m512i factors = _mm512_or_si512(factor, _mm512_slli_epi32(factor, 16));
    // 128 − 8 · factor, as bytes
    const __m512i zero =
        _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_slli_epi32(factor, 3)),
                           _mm512_set1_epi32(0x01010101));
    const auto scaled = [&](__m512i q) DELTAFOX_TARGET {
      const __m512i even = _mm512_mullo_epi16(_mm512_and_si512(q, low_byte), factors);
      const __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(q, 8), factors);
      return _mm512_add_epi8(_mm512_or_si512(even, _mm512_slli_epi16(odd, 8)), zero);
    };
    for (std::int64_t k = group * kQuantGroup; k < (group + 1) * kQuantGroup; k += 8) {
      const __m512i halves = bytes_at(values + k * kPanelRows / 2);
      const __m512i low = _mm512_and_si512(halves, low_half);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(halves, 4), low_half);
      _mm512_storeu_si512(expanded + k * kPanelRows, scaled(low));
      _mm512_storeu_si512(expanded + (k + 4) * kPanelRows, scaled(high));
    }
  }
}

}  // namespace deltafox::cpu::avx512
#endif
