// The packed kernels by the dot products of AVX-512 VNNI: bytes of w without a sign by bytes of x
// with one.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/isa.h"
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
DELTAFOX_TARGET inline void add_products(Integers products, float scale_of_x,
                                         const std::byte* scales_of_w, float* sums) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scale_of_x), _mm512_loadu_ps(scales_of_w));
  const __m512 exact = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(products));
  _mm512_storeu_ps(sums, _mm512_fmadd_ps(exact, scale, _mm512_loadu_ps(sums)));
}

constexpr int kTileTokens = 6;

// Loops over tokens and panels are unrolled whole: products must stay in registers.
// What is read next is fetched in between, of kFetch panels from `fetch` on: at once it would hold
// up the loads behind it.
template <int kTokens, int kPanels, int kFetch>
DELTAFOX_TARGET void eight_bit_tile(const PackedBlock& block, std::int64_t token, int panel,
                                    int fetch) {
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
  const std::byte* next = block.next + fetch * block.head_stride;
  for (std::int64_t k = 0; k < block.columns; k += 4) {
#pragma GCC unroll 8
    for (int p = 0; p < kFetch; ++p) {
      _mm_prefetch(reinterpret_cast<const char*>(next + p * block.head_stride), _MM_HINT_T0);
    }
    next += block.next_step;
    __m512i w[kPanels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      w[p] = bytes_at(values + p * block.value_stride + k * kPanelRows);
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
    const float scale = block.x->scales[index_of(block, token + t)];
    float* sums = block.sums + (token + t) * kTileColumns + panel * kPanelRows;
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p) {
      add_products(products[t][p], scale, block.head + (panel + p) * block.head_stride,
                   sums + p * kPanelRows);
    }
  }
}

// All tokens of a block, from t on, by kPanels panels. The first tile of tokens or, where there are
// more, the first two fetch what is read next.
template <int kTokens, int kPanels>
DELTAFOX_TARGET void eight_bit_panels(const PackedBlock& block, int panel, std::int64_t t) {
  for (; t + kTokens <= block.tokens; t += kTokens) {
    if (t >= 2 * kTileTokens) {
      eight_bit_tile<kTokens, kPanels, 0>(block, t, panel, panel);
    } else if (block.tokens <= kTileTokens) {
      eight_bit_tile<kTokens, kPanels, kPanels>(block, t, panel, panel);
    } else {
      const int fetch = panel + (t == 0 ? 0 : kPanels / 2);
      eight_bit_tile<kTokens, kPanels, (kPanels + 1) / 2>(block, t, panel, fetch);
    }
  }
  if constexpr (kTokens > 1) eight_bit_panels<kTokens - 1, kPanels>(block, panel, t);
}

// Bytes of memory in order that are fetched ahead: processors themselves stop at the end of a page.
constexpr std::int64_t kAhead = 2048;

DELTAFOX_TARGET inline __m512i bytes_in_order(const std::byte* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
  return bytes_at(p);
}

// A block of kPanels panels, each a stream of its own, for a few tokens.
template <int kTokens, int kPanels>
struct FewTile {
  const QuantizedRows& x;
  const PackedLayout& layout;
  std::int64_t block;
  const std::byte* head;  // of the first panel

  DELTAFOX_TARGET const std::byte* values(int panel) const {
    return head + layout.head_bytes() + panel * layout.panel_bytes();
  }
  // Four columns from k on of token t.
  DELTAFOX_TARGET __m512i columns(int t, std::int64_t k) const {
    return four_columns(x.q + t * x.stride + block * kQuantBlock + k);
  }

  DELTAFOX_TARGET void eight_bits(Integers (&products)[kTokens][kPanels]) const {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) products[t][p] = all(-x.offsets[x.index(t, block)]);
    }
    const std::int64_t end = layout.block_columns(block);
    for (std::int64_t k = 0; k < end; k += 4) {
      __m512i w[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) w[p] = bytes_in_order(values(p) + k * kPanelRows);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          products[t][p] = dot(products[t][p], w[p], columns(t, k));
        }
      }
    }
  }

  // The integers of a group of 32 columns fit into 16 bits, so that one more dot product, of words,
  // multiplies them by the group's factor and adds them.
  DELTAFOX_TARGET void four_bits(Integers (&products)[kTokens][kPanels]) const {
    constexpr std::int64_t kGroups = kQuantBlock / kQuantGroup;
    const __m512i low_half = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) products[t][p] = all(0);
    }
    const std::int64_t groups = layout.block_columns(block) / kQuantGroup;
    for (std::int64_t group = 0; group < groups; ++group) {
      Integers sums[kTokens][kPanels];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const Integers zero = all(-8 * x.group_sums[(t * x.blocks + block) * kGroups + group]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) sums[t][p] = zero;
      }
#pragma GCC unroll 4
      for (std::int64_t i = 0; i < kQuantGroup; i += 8) {
        const std::int64_t k = group * kQuantGroup + i;
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          const __m512i halves = bytes_in_order(values(p) + k * kPanelRows / 2);
          const __m512i low = _mm512_and_si512(halves, low_half);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(halves, 4), low_half);
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) {
            sums[t][p] = dot(sums[t][p], low, columns(t, k));
            sums[t][p] = dot(sums[t][p], high, columns(t, k + 4));
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* factors = values(p) - kFactorBytes + group / 2 * kPanelRows;
        const __m512i pairs =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(factors)));
        const __m512i factor = group % 2 == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(15))
                                              : _mm512_srli_epi32(pairs, 4);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          products[t][p] = reinterpret_cast<Integers>(
              _mm512_dpwssd_epi32(reinterpret_cast<__m512i>(products[t][p]),
                                  reinterpret_cast<__m512i>(sums[t][p]), factor));
        }
      }
    }
  }
};

template <bool kFourBits, int kTokens, int kPanels>
DELTAFOX_TARGET void few_tokens(const PackedPanels& of, int first) {
  const QuantizedRows& x = *of.x;
  const PackedLayout& layout = *of.layout;
  const std::byte* panel = of.first + first * layout.panel_bytes();
  float* sums = of.sums + first * kPanelRows;
  for (int t = 0; t < kTokens; ++t) {
    std::fill_n(sums + t * kTileColumns, kPanels * kPanelRows, 0.0F);
  }
  for (std::int64_t block = 0; block < layout.blocks(); ++block) {
    const std::byte* head = panel + layout.block_offset(block);
    const FewTile<kTokens, kPanels> tile{x, layout, block, head};
    Integers products[kTokens][kPanels];
    if constexpr (kFourBits) {
      tile.four_bits(products);
    } else {
      tile.eight_bits(products);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const float scale = x.scales[x.index(t, block)];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        add_products(products[t][p], scale, head + p * layout.panel_bytes(),
                     sums + t * kTileColumns + p * kPanelRows);
      }
    }
  }
}

template <bool kFourBits, int kTokens, int kPanels>
DELTAFOX_TARGET void few_tokens(const PackedPanels& of) {
  int p = 0;
  for (; p + kPanels <= of.panels; p += kPanels) few_tokens<kFourBits, kTokens, kPanels>(of, p);
  if constexpr (kPanels > 2) {
    for (; p + 2 <= of.panels; p += 2) few_tokens<kFourBits, kTokens, 2>(of, p);
  }
  for (; p < of.panels; ++p) few_tokens<kFourBits, kTokens, 1>(of, p);
}

template <bool kFourBits>
DELTAFOX_TARGET void few_tokens(const PackedPanels& of) {
  static_assert(kFewTokens == 4);
  switch (of.tokens) {
    case 1:
      // One panel after the other is one stream of memory, which is fetched ahead throughout: on
      // Zen 5 int4 is read an eighth faster than as four streams, each cold at its beginning. On an
      // Intel Xeon with AMX four are an eighth faster than one.
      if (isa().amx_int8) return few_tokens<kFourBits, 1, 4>(of);
      return few_tokens<kFourBits, 1, 1>(of);
    case 2:
      return few_tokens<kFourBits, 2, 4>(of);
    case 3:
      return few_tokens<kFourBits, 3, 2>(of);
    default:
      return few_tokens<kFourBits, 4, 2>(of);
  }
}

}  // namespace

DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  int p = 0;
  for (; p + 4 <= block.panels; p += 4) eight_bit_panels<kTileTokens, 4>(block, p, 0);
  for (; p + 2 <= block.panels; p += 2) eight_bit_panels<kTileTokens, 2>(block, p, 0);
  for (; p < block.panels; ++p) eight_bit_panels<kTileTokens, 1>(block, p, 0);
}

DELTAFOX_TARGET void few_eight_bits(const PackedPanels& panels) {
  few_tokens<false>(panels);
}

DELTAFOX_TARGET void few_four_bits(const PackedPanels& panels) {
  few_tokens<true>(panels);
}

namespace {

// factor · q + kZero
template <int kZero>
DELTAFOX_TARGET void expand(const std::byte* head, const std::byte* values, std::int64_t columns,
                            std::byte* expanded) {
  const __m512i low_half = _mm512_set1_epi8(15);
  for (std::int64_t group = 0; group * kQuantGroup < columns; ++group) {
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(head + kScaleBytes + group / 2 * kPanelRows)));
    const __m512i factor = group % 2 == 0 ? _mm512_and_si512(pairs, _mm512_set1_epi32(15))
                                          : _mm512_srli_epi32(pairs, 4);
    const __m512i factors = _mm512_or_si512(factor, _mm512_slli_epi32(factor, 16));
    // kZero − 8 · factor, as bytes
    const __m512i byte =
        _mm512_and_si512(_mm512_sub_epi32(_mm512_set1_epi32(kZero), _mm512_slli_epi32(factor, 3)),
                         _mm512_set1_epi32(255));
    const __m512i zero = _mm512_mullo_epi32(byte, _mm512_set1_epi32(0x01010101));
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

}  // namespace

void expand(const std::byte* head, const std::byte* values, std::int64_t columns,
            std::byte* expanded) {
  expand<128>(head, values, columns, expanded);
}

void expand_signed(const std::byte* head, const std::byte* values, std::int64_t columns,
                   std::byte* expanded) {
  expand<0>(head, values, columns, expanded);
}

}  // namespace deltafox::cpu::avx512
#endif
