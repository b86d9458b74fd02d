// Products by tiles and the softmax by vectors take turns, a block of keys at a time, whose scores
// stay near. Mixed instruction by instruction they took as long.
#if defined(__x86_64__)
#include "cpu/attention_amx.h"

#include <algorithm>
#include <limits>

#include "cpu/amx.h"
#include "cpu/bf16_tiles.h"
#include "cpu/intrinsics.h"

#define DELTAFOX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace deltafox::cpu::bf16 {
namespace {

constexpr std::int64_t kTileFloats = kTileSide * kTileSide;
constexpr std::int64_t kTileBf16 = kTileSide * kTileDepth;
constexpr std::int64_t kBlockTiles = kAttentionBlock / kTileSide;
constexpr std::int64_t kHalf = kBlockTiles * kTileFloats;  // floats of 16 rows of scores
// By how much scores · log2 e may exceed what weights are relative to, before that is raised and
// what was summed so far rescaled.
constexpr float kSlack = 8;
constexpr float kLog2E = 1.44269504F;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Keys [begin, end) and their scores, [2][tiles][16 rows][16 keys]. Weights take their place:
// [2][tiles / 2][16 rows][32 keys] of bfloat16, of 16 rows in the first half of those of scores.
struct KeyBlock {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  float* scores = nullptr;

  std::int64_t tiles() const { return (end - begin) / kTileSide; }
};

// A step of the inner dimension of two row tiles, `below` elements apart, and two column tiles, or
// one. Tiles: 0 to 3 the sums of row tile i and column tile j at 2·i + j, 4 and 5 left, 6 and 7
// right.
template <bool kColumns2>
DELTAFOX_TARGET inline void step(const std::uint16_t* left, std::int64_t below,
                                 const std::uint16_t* right, std::int64_t beside) {
  _tile_loadd(4, left, 64);
  _tile_loadd(6, right, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kColumns2) {
    _tile_loadd(7, right + beside, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_loadd(5, left + below, 64);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (kColumns2) _tile_dpbf16ps(3, 5, 7);
}

// o [+]= weights · values for up to 32 columns.
template <bool kColumns2>
DELTAFOX_TARGET inline void weigh_values(const AttentionRows& of, const KeyBlock& block, bool first,
                                         std::int64_t column, float* o) {
  float* const above = o + column * kTileSide;
  float* const below = above + kTileSide * of.columns;
  if (first) {
    _tile_zero(0);
    if constexpr (kColumns2) _tile_zero(1);
    _tile_zero(2);
    if constexpr (kColumns2) _tile_zero(3);
  } else {
    _tile_loadd(0, above, 64);
    if constexpr (kColumns2) _tile_loadd(1, above + kTileFloats, 64);
    _tile_loadd(2, below, 64);
    if constexpr (kColumns2) _tile_loadd(3, below + kTileFloats, 64);
  }
  const auto* left = reinterpret_cast<const std::uint16_t*>(block.scores);
  const std::uint16_t* right = of.values + block.begin * of.columns + column * kTileDepth;
  for (std::int64_t t = 0; t < block.tiles(); t += 2) {
    step<kColumns2>(left, 2 * kHalf, right, kTileBf16);
    left += kTileBf16;
    right += kTileDepth * of.columns;
  }
  _tile_stored(0, above, 64);
  if constexpr (kColumns2) _tile_stored(1, above + kTileFloats, 64);
  _tile_stored(2, below, 64);
  if constexpr (kColumns2) _tile_stored(3, below + kTileFloats, 64);
}

DELTAFOX_TARGET void weigh_values(const AttentionRows& of, const KeyBlock& block, bool first,
                                  float* o) {
  std::int64_t c = 0;
  for (; c + 2 * kTileSide <= of.columns; c += 2 * kTileSide) {
    weigh_values<true>(of, block, first, c, o);
  }
  if (c < of.columns) weigh_values<false>(of, block, first, c, o);
}

DELTAFOX_TARGET void score_keys(const AttentionRows& of, const KeyBlock& block) {
  for (std::int64_t t = 0; t < block.tiles(); t += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const std::uint16_t* right = of.keys + (block.begin + t * kTileSide) * of.depth;
    for (std::int64_t d = 0; d < of.depth; d += kTileDepth) {
      step<true>(of.q + d * kTileSide, kTileSide * of.depth, right + d * kTileSide,
                 kTileSide * of.depth);
    }
    float* const to = block.scores + t * kTileFloats;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kTileFloats, 64);
    _tile_stored(2, to + kHalf, 64);
    _tile_stored(3, to + kHalf + kTileFloats, 64);
  }
}

// 2^x for x <= kSlack, to 3e-6 of it.
DELTAFOX_TARGET inline __m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 9);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.353416791e-2F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.201146062e-2F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.414427569e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.930038345e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.000002593F));
  return _mm512_scalef_ps(p, x);
}

template <bool kMax>
DELTAFOX_TARGET inline __m512 combine(__m512 a, __m512 b) {
  return kMax ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b);
}

// Element r is the greatest element of rows[r], or their sum.
template <bool kMax>
DELTAFOX_TARGET inline __m512 across(const __m512 (&rows)[kTileSide]) {
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512* of = rows + 4 * i;
    const __m512d ab = _mm512_castps_pd(
        combine<kMax>(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1])));
    const __m512d cd = _mm512_castps_pd(
        combine<kMax>(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3])));
    fours[i] = combine<kMax>(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  __m512 eights[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    eights[i] = combine<kMax>(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x44),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xee));
  }
  return combine<kMax>(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

// Scores of 16 rows from row `row` on get what the gates between query and key say.
DELTAFOX_TARGET void add_gates(const AttentionRows& of, const KeyBlock& block, std::int64_t row,
                               std::int64_t rows, float* scores) {
  for (std::int64_t t = 0; t < block.tiles(); ++t) {
    const std::int64_t key = block.begin + t * kTileSide;
    const __m512 key_high = _mm512_loadu_ps(of.key_gates[0] + key);
    const __m512 key_low = _mm512_loadu_ps(of.key_gates[1] + key);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* s = scores + t * kTileFloats + r * kTileSide;
      const __m512 high = _mm512_sub_ps(_mm512_set1_ps(of.query_gates[0][row + r]), key_high);
      const __m512 low = _mm512_sub_ps(_mm512_set1_ps(of.query_gates[1][row + r]), key_low);
      _mm512_store_ps(s, _mm512_add_ps(_mm512_load_ps(s), _mm512_add_ps(high, low)));
    }
  }
}

// Scores of what rows do not read become -infinity.
DELTAFOX_TARGET void mask(const AttentionRows& of, const KeyBlock& block, std::int64_t row,
                          std::int64_t rows, float* scores) {
  const __m512 masked = _mm512_set1_ps(kMinusInfinity);
  const std::int64_t count = block.end - block.begin;
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t begin = std::clamp<std::int64_t>(of.begins[row + r] - block.begin, 0, count);
    const std::int64_t end = std::clamp<std::int64_t>(of.ends[row + r] - block.begin, 0, count);
    float* const s = scores + r * kTileSide;
    for (std::int64_t t = 0; t * kTileSide < begin; ++t) {
      const std::int64_t left = std::min(kTileSide, begin - t * kTileSide);
      _mm512_mask_store_ps(s + t * kTileFloats, static_cast<__mmask16>((1U << left) - 1U), masked);
    }
    for (std::int64_t t = end / kTileSide; t < block.tiles(); ++t) {
      const std::int64_t inside = std::max<std::int64_t>(0, end - t * kTileSide);
      _mm512_mask_store_ps(s + t * kTileFloats, static_cast<__mmask16>(0xffffU << inside), masked);
    }
  }
}

// The greatest score of each of 16 rows.
DELTAFOX_TARGET __m512 maxima(const float* scores, std::int64_t tiles) {
  __m512 max[kTileSide];
#pragma GCC unroll 16
  for (std::int64_t r = 0; r < kTileSide; ++r) max[r] = _mm512_load_ps(scores + r * kTileSide);
  for (std::int64_t t = 1; t < tiles; ++t) {
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kTileSide; ++r) {
      max[r] = _mm512_max_ps(max[r], _mm512_load_ps(scores + t * kTileFloats + r * kTileSide));
    }
  }
  return across<true>(max);
}

// What rows of a block are relative to.
struct Scales {
  alignas(64) float max[kAttentionRows];     // · log2 e
  alignas(64) float factor[kAttentionRows];  // from those before to these
  bool changed = false;
};

// Finishes scores and finds the scales of the block.
DELTAFOX_TARGET void find_scales(const AttentionRows& of, const KeyBlock& block,
                                 const AttentionSums& sums, Scales& scales) {
  scales.changed = false;
  for (std::int64_t i = 0; i < 2; ++i) {
    float* const scores = block.scores + i * kHalf;
    const std::int64_t row = i * kTileSide;
    const std::int64_t rows = std::clamp<std::int64_t>(of.rows - row, 0, kTileSide);
    if (of.key_gates[0] != nullptr) add_gates(of, block, row, rows, scores);
    bool whole = true;
    for (std::int64_t r = row; r < row + rows; ++r) {
      whole &= of.begins[r] <= block.begin && of.ends[r] >= block.end;
    }
    if (!whole) mask(of, block, row, rows, scores);
    const __m512 before = _mm512_load_ps(sums.max + row);
    const __m512 greatest = _mm512_mul_ps(maxima(scores, block.tiles()), _mm512_set1_ps(kLog2E));
    const __mmask16 raised =
        _mm512_cmp_ps_mask(greatest, _mm512_add_ps(before, _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    const __m512 max = _mm512_mask_mov_ps(before, raised, greatest);
    _mm512_store_ps(scales.factor + row, _mm512_mask_mov_ps(_mm512_set1_ps(1), raised,
                                                            exp2_of(_mm512_sub_ps(before, max))));
    scales.changed |= raised != 0;
    _mm512_store_ps(scales.max + row, max);
    _mm512_store_ps(sums.max + row, max);
  }
}

// A row of weights; returns their sum by lanes.
DELTAFOX_TARGET inline __m512 weigh_row(float* scores, std::int64_t tiles, float max) {
  const __m512 log2e = _mm512_set1_ps(kLog2E);
  const __m512 negative = _mm512_set1_ps(-max);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (std::int64_t t = 0; t < tiles; t += 2) {
    const __m512 first =
        exp2_of(_mm512_fmadd_ps(_mm512_load_ps(scores + t * kTileFloats), log2e, negative));
    const __m512 second =
        exp2_of(_mm512_fmadd_ps(_mm512_load_ps(scores + (t + 1) * kTileFloats), log2e, negative));
    sums[0] = _mm512_add_ps(sums[0], first);
    sums[1] = _mm512_add_ps(sums[1], second);
    _mm512_store_si512(scores + t / 2 * kTileFloats,
                       reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  }
  return _mm512_add_ps(sums[0], sums[1]);
}

DELTAFOX_TARGET void add_sums(const float* by_lanes, const Scales& scales, double* sums) {
  for (std::int64_t row = 0; row < kAttentionRows; row += kTileSide) {
    __m512 rows[kTileSide];
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kTileSide; ++r) {
      rows[r] = _mm512_load_ps(by_lanes + (row + r) * kTileSide);
    }
    alignas(64) float of_rows[kTileSide];
    _mm512_store_ps(of_rows, across<false>(rows));
    for (std::int64_t r = 0; r < kTileSide; ++r) {
      sums[row + r] = sums[row + r] * scales.factor[row + r] + of_rows[r];
    }
  }
}

DELTAFOX_TARGET void rescale(const Scales& scales, std::int64_t columns, float* o) {
  for (std::int64_t r = 0; r < kAttentionRows; ++r) {
    if (scales.factor[r] == 1) continue;
    const __m512 factor = _mm512_set1_ps(scales.factor[r]);
    float* at = o + r / kTileSide * kTileSide * columns + r % kTileSide * kTileSide;
    for (std::int64_t c = 0; c < columns; c += kTileSide, at += kTileFloats) {
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
    }
  }
}

DELTAFOX_TARGET void configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileSide, 64);
  load_tiles(config);
}

}  // namespace

DELTAFOX_TARGET void attend_amx(const AttentionRows& of, const AttentionSums& sums) {
  finish_stores();
  configure();
  std::fill(sums.max, sums.max + kAttentionRows, kNoMax);
  std::fill(sums.sum, sums.sum + kAttentionRows, 0.0);
  const auto block_at = [&](std::int64_t begin) -> KeyBlock {
    const std::int64_t end = (begin / kAttentionBlock + 1) * kAttentionBlock;
    return {.begin = begin, .end = std::min(end, of.end), .scores = of.scores};
  };
  alignas(64) float by_lanes[kAttentionRows * kTileSide] = {};  // sums of weights
  Scales scales;
  for (KeyBlock block = block_at(of.first); block.begin < of.end; block = block_at(block.end)) {
    const bool first = block.begin == of.first;
    score_keys(of, block);
    find_scales(of, block, sums, scales);
    for (std::int64_t r = 0; r < of.rows; ++r) {
      float* const scores = block.scores + r / kTileSide * kHalf + r % kTileSide * kTileSide;
      _mm512_store_ps(by_lanes + r * kTileSide, weigh_row(scores, block.tiles(), scales.max[r]));
    }
    add_sums(by_lanes, scales, sums.sum);
    if (scales.changed && !first) rescale(scales, of.columns, sums.o);
    finish_stores();
    weigh_values(of, block, first, sums.o);
  }
  _tile_release();
}

}  // namespace deltafox::cpu::bf16
#endif
