// A file that includes this defines DELTAFOX_TARGET, the target attribute of every function here.
#pragma once

#include <cstdint>

#include "cpu/intrinsics.h"

namespace deltafox::cpu {
namespace {

// to[c, r] = from[r, c] for 16 × 16 elements of 32 bits; rows are `stride` and `to_stride` elements
// apart, those of `to` whole cache lines.
DELTAFOX_TARGET inline void transpose(const void* from, std::int64_t stride, void* to,
                                      std::int64_t to_stride = 16) {
  const auto* rows = static_cast<const std::int32_t*>(from);
  auto* columns = static_cast<std::int32_t*>(to);
  for (int quarter = 0; quarter < 4; ++quarter) {
    // Vector i: columns 4 · quarter + 0…3 of the rows i, 4 + i, 8 + i, 12 + i.
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto part = [&](int row) DELTAFOX_TARGET {
        const std::int32_t* at = rows + row * stride + 4 * quarter;
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
      };
      v[i] = _mm512_castsi128_si512(part(i));
      v[i] = _mm512_inserti32x4(v[i], part(4 + i), 1);
      v[i] = _mm512_inserti32x4(v[i], part(8 + i), 2);
      v[i] = _mm512_inserti32x4(v[i], part(12 + i), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    std::int32_t* out = columns + 4 * quarter * to_stride;
    _mm512_store_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_store_si512(out + to_stride, _mm512_unpackhi_epi64(low01, low23));
    _mm512_store_si512(out + 2 * to_stride, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(out + 3 * to_stride, _mm512_unpackhi_epi64(high01, high23));
  }
}

}  // namespace
}  // namespace deltafox::cpu
