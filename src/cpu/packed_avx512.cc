// The packed kernels by the dot products of AVX-512 VNNI: bytes of w without a sign by bytes of x
// with one.
#if defined(__x86_64__)
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/packed_kernels.h"

#define DELTAFOX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace deltafox::cpu::avx512 {
namespace {

// As __m512i, but of 32-bit integers: GCC keeps an array of these in registers, and one of those in
// memory.
using Integers = std::int32_t __attribute__((vector_size(64)));

DELTAFOX_TARGET inline Integers all(std::int32_t value) {
  return reinterpret_cast<Integers>(_mm512_set1_epi32(value));
}

// sums + the products of four bytes
DELTAFOX_TARGET inline Integers dot(Integers sums, __m512i w, __m512i x) {
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), w, x));
}

DELTAFOX_TARGET inline __m512i four_columns(const std::int8_t* x) {
  std::int32_t columns = 0;
  std::memcpy(&columns, x, sizeof columns);
  return _mm512_set1_epi32(columns);
}

DELTAFOX_TARGET inline __m512i bytes_at(const std::byte* p) {
  return _mm512_loadu_si512(p);
}

// sums += products · (scale of x · scale of w), for a token and a panel
DELTAFOX_TARGET inline void add_products(const PackedBlock& block, std::int64_t t, int panel,
                                         Integers products) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(block.x->scales[index_of(block, t)]),
                                     _mm512_loadu_ps(block.head + panel * block.head_stride));
  float* sums = block.sums + t * kTileColumns + panel * kPanelRows;
  const __m512 term = _mm512_mul_ps(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(products)), scale);
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), term));
}

constexpr std::int64_t kWholeBlock = kScaleBytes + kQuantBlock * kPanelRows;
// Bytes of memory in order that are fetched ahead: processors themselves stop at the end of a page.
constexpr std::int64_t kAhead = 4096;

// Loops over tokens and panels are unrolled whole: products must stay in registers. With kFetch the
// panels' next blocks are fetched meanwhile.
template <int kTokens, int kPanels, bool kFetch>
DELTAFOX_TARGET void eight_bit_tile(const PackedBlock& block, std::int64_t token, int panel) {
  Integers products[kTokens][kPanels];
  const std::int8_t* x[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    x[t] = token_at(block, token + t);
    const Integers offset = all(-block.x->offsets[index_of(block, token + t)]);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) products[t][p] = offset;
  }
  const std::byte* values = block.values + panel * block.value_stride;
  for (std::int64_t k = 0; k < block.columns; k += 4) {
    __m512i w[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const std::byte* at = values + p * block.value_stride + k * kPanelRows;
      w[p] = bytes_at(at);
      if constexpr (kFetch) {
        _mm_prefetch(reinterpret_cast<const char*>(at + kWholeBlock), _MM_HINT_T1);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512i columns = four_columns(x[t] + k);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        products[t][p] = dot(products[t][p], w[p], columns);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) add_products(block, token + t, panel + p, products[t][p]);
  }
}

// The integers of a group of 32 columns fit into 16 bits, so that one more dot product, of words,
// multiplies them by the group's factor and adds them.
template <int kTokens, int kPanels>
DELTAFOX_TARGET void four_bit_tile(const PackedBlock& block, std::int64_t token, int panel) {
  const __m512i low_half = _mm512_set1_epi8(15);
  const std::byte* values = block.values + panel * block.value_stride;
  const std::byte* factors = block.head + panel * block.head_stride + kScaleBytes;
  Integers products[kTokens][kPanels];
  const std::int8_t* x[kTokens];
  const std::int16_t* group_sums[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    x[t] = token_at(block, token + t);
    group_sums[t] = block.x->group_sums + index_of(block, token + t) * (kQuantBlock / kQuantGroup);
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) products[t][p] = all(0);
  }
  for (std::int64_t group = 0; group * kQuantGroup < block.columns; ++group) {
    Integers sums[kTokens][kPanels];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) sums[t][p] = all(-8 * group_sums[t][group]);
    }
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < kQuantGroup; i += 8) {
      const std::int64_t k = group * kQuantGroup + i;
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* at = values + p * block.value_stride + k * kPanelRows / 2;
        const __m512i halves = bytes_at(at);
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        const __m512i low = _mm512_and_si512(halves, low_half);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(halves, 4), low_half);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          sums[t][p] = dot(sums[t][p], low, four_columns(x[t] + k));
          sums[t][p] = dot(sums[t][p], high, four_columns(x[t] + k + 4));
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(
          factors + p * block.head_stride + group / 2 * kPanelRows)));
      const __m512i factor = group % 2 == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(15))
                                            : _mm512_srli_epi32(pairs, 4);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        products[t][p] = reinterpret_cast<Integers>(
            _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(products[t][p]),
                                reinterpret_cast<__m512i>(sums[t][p]), factor));
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) add_products(block, token + t, panel + p, products[t][p]);
  }
}

// All tokens of a block by kPanels panels.
template <int kPanels>
DELTAFOX_TARGET void eight_bit_panels(const PackedBlock& block, int panel) {
  std::int64_t t = 0;
  // The first tokens fetch for all.
  const auto tile = [&]<int kTokens>() DELTAFOX_TARGET {
    t == 0 ? eight_bit_tile<kTokens, kPanels, true>(block, t, panel)
           : eight_bit_tile<kTokens, kPanels, false>(block, t, panel);
  };
  for (; t + 6 <= block.tokens; t += 6) tile.template operator()<6>();
  switch (block.tokens - t) {
    case 5:
      return tile.template operator()<5>();
    case 4:
      return tile.template operator()<4>();
    case 3:
      return tile.template operator()<3>();
    case 2:
      return tile.template operator()<2>();
    case 1:
      return tile.template operator()<1>();
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
      // Two bytes at a time: 15 · 15 does not carry from one to the other.
      return _mm512_add_epi8(_mm512_mullo_epi16(q, factors), zero);
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
