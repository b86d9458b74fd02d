// The packed kernels by AVX2: |w| · (x with the sign of w), products of bytes added in pairs, which
// fit into 16 bits since neither exceeds 127.
#if defined(__x86_64__)
#include <cstring>

#include "cpu/intrinsics.h"
#include "cpu/packed_kernels.h"

#define DELTAFOX_TARGET __attribute__((target("avx2,fma")))

namespace deltafox::cpu::avx2 {
namespace {

DELTAFOX_TARGET inline __m256i bytes_at(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

DELTAFOX_TARGET inline __m256i four_columns(const std::int8_t* x) {
  std::int32_t columns = 0;
  std::memcpy(&columns, x, sizeof columns);
  return _mm256_set1_epi32(columns);
}

// A panel by kTokens tokens; a vector has half the panel's rows.
template <int kTokens>
DELTAFOX_TARGET void tile(const PackedBlock& block, std::int64_t token, int panel) {
  const std::byte* values = block.values + panel * block.value_stride;
  const __m256i sign = _mm256_set1_epi8(-128);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i products[kTokens][2];
  const std::int8_t* x[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = token_at(block, token + t);
    products[t][0] = _mm256_setzero_si256();
    products[t][1] = _mm256_setzero_si256();
  }
  for (std::int64_t k = 0; k < block.columns; k += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256i w = _mm256_xor_si256(bytes_at(values + k * kPanelRows + half * 32), sign);
      const __m256i magnitude = _mm256_abs_epi8(w);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i signed_x = _mm256_sign_epi8(four_columns(x[t] + k), w);
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
        products[t][half] = _mm256_add_epi32(products[t][half], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    const auto* scales =
        reinterpret_cast<const float*>(block.head + panel * block.head_stride) + half * 8;
    for (int t = 0; t < kTokens; ++t) {
      const __m256 scale = _mm256_mul_ps(
          _mm256_set1_ps(block.x->scales[index_of(block, token + t)]), _mm256_loadu_ps(scales));
      float* sums = block.sums + (token + t) * kTileColumns + panel * kPanelRows + half * 8;
      const __m256 exact = _mm256_cvtepi32_ps(products[t][half]);
      _mm256_storeu_ps(sums, _mm256_fmadd_ps(exact, scale, _mm256_loadu_ps(sums)));
    }
  }
}

}  // namespace

DELTAFOX_TARGET void eight_bits(const PackedBlock& block) {
  for (int p = 0; p < block.panels; ++p) {
    std::int64_t t = 0;
    for (; t + 4 <= block.tokens; t += 4) tile<4>(block, t, p);
    for (; t < block.tokens; ++t) tile<1>(block, t, p);
  }
}

DELTAFOX_TARGET void expand(const std::byte* head, const std::byte* values, std::int64_t columns,
                            std::byte* expanded) {
  const __m256i low_half = _mm256_set1_epi8(15);
  for (std::int64_t group = 0; group * kQuantGroup < columns; ++group) {
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(
          head + kScaleBytes + group / 2 * kPanelRows + half * 8)));
      const __m256i factor = group % 2 == 0 ? _mm256_and_si256(pairs, _mm256_set1_epi32(15))
                                            : _mm256_srli_epi32(pairs, 4);
      const __m256i factors = _mm256_or_si256(factor, _mm256_slli_epi32(factor, 16));
      // 128 − 8 · factor, as bytes
      const __m256i zero =
          _mm256_mullo_epi32(_mm256_sub_epi32(_mm256_set1_epi32(128), _mm256_slli_epi32(factor, 3)),
                             _mm256_set1_epi32(0x01010101));
      for (std::int64_t k = group * kQuantGroup; k < (group + 1) * kQuantGroup; k += 8) {
        const __m256i halves = bytes_at(values + k * kPanelRows / 2 + half * 32);
        const __m256i parts[2] = {_mm256_and_si256(halves, low_half),
                                  _mm256_and_si256(_mm256_srli_epi16(halves, 4), low_half)};
        for (int i = 0; i < 2; ++i) {
          // Two bytes at a time: 15 · 15 does not carry from one to the other.
          const __m256i q = _mm256_add_epi8(_mm256_mullo_epi16(parts[i], factors), zero);
          std::byte* to = expanded + (k + 4 * i) * kPanelRows + half * 32;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), q);
        }
      }
    }
  }
}

}  // namespace deltafox::cpu::avx2
#endif
