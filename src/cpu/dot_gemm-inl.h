// y [+]= x wᵀ by dot products, on 512-bit vectors. A file that includes this defines
// DELTAFOX_TARGET, the target attribute of every function here, and a Kind:
//   Element    of w as it lies in memory, and of x once converted
//   kStep      elements of a vector
//   madd(x, w, sum)    sum + the products of a vector, on 16 float32 lanes
//   load(p), load_first(p, n)
//   convert(x, n, to)  n elements of a row of x
//
// An element of y is one vector of partial sums that walks along K in steps of kStep, added up
// across lanes at the end in one order: it does not depend on the tile it is computed in.
//
// Few tokens: tiles of 8 or 4 rows of w, read once from where they lie, each row a stream of its
// own. Many: w goes by panels of 8 rows through a copy in the first-level cache, stretch by stretch
// of K, while the tokens of a block, packed by threes, pass from the second-level cache: neither
// then competes for cache sets, however long rows are. A token's columns serve 8 rows once
// they are there, or reading them would hold up the products.
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "cpu/intrinsics.h"
#include "cpu/linear_kernels.h"

namespace deltafox::cpu {
namespace {

constexpr int kTileTokens = 3;
constexpr int kTileRows = 8;  // of w
constexpr std::int64_t kFewTokens = 5;

// The sums of the lanes of four vectors: (lane i + lane i + 8), then + 4, + 2, + 1.
DELTAFOX_TARGET inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 sums =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
  const __m512i first_of_four =
      _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_four, sums));
}

// y[0, n) = sums [+ y], n up to 4
DELTAFOX_TARGET inline void store_sums(__m128 sums, float* y, std::int64_t n, bool accumulate) {
  if (n >= 4) {
    if (accumulate) sums = _mm_add_ps(_mm_loadu_ps(y), sums);
    return _mm_storeu_ps(y, sums);
  }
  const auto inside = static_cast<__mmask8>((1U << n) - 1U);
  if (accumulate) sums = _mm_add_ps(_mm_maskz_loadu_ps(inside, y), sums);
  _mm_mask_storeu_ps(y, inside, sums);
}

// kTokens tokens by kRows rows of w from where they lie. Rows beyond `rows` repeat the last one.
// The next rows' columns are fetched as these rows' are read.
template <typename Kind, int kTokens, int kRows>
DELTAFOX_TARGET inline void few_tile(const typename Kind::Element* x, std::int64_t x_stride,
                                     const typename Kind::Element* w, std::int64_t depth,
                                     std::int64_t rows, float* y, std::int64_t y_stride,
                                     bool accumulate) {
  const typename Kind::Element* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = w + std::min<std::int64_t>(r, rows - 1) * depth;
  __m512 sums[kTokens][kRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sums[t][r] = _mm512_setzero_ps();
  }
  const std::int64_t ahead = kRows * depth;
  std::int64_t k = 0;
  for (; k + Kind::kStep <= depth; k += Kind::kStep) {
    typename Kind::Vector columns[kRows];
    for (int r = 0; r < kRows; ++r) {
      columns[r] = Kind::load(row[r] + k);
      _mm_prefetch(reinterpret_cast<const char*>(row[r] + k + ahead), _MM_HINT_T1);
    }
    for (int t = 0; t < kTokens; ++t) {
      const typename Kind::Vector token = Kind::load(x + t * x_stride + k);
      for (int r = 0; r < kRows; ++r) sums[t][r] = Kind::madd(token, columns[r], sums[t][r]);
    }
  }
  if (k < depth) {
    for (int t = 0; t < kTokens; ++t) {
      const typename Kind::Vector token = Kind::load(x + t * x_stride + k);
      for (int r = 0; r < kRows; ++r) {
        sums[t][r] = Kind::madd(token, Kind::load_first(row[r] + k, depth - k), sums[t][r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 4) {
      if (r < rows) {
        store_sums(sums_of(sums[t][r], sums[t][r + 1], sums[t][r + 2], sums[t][r + 3]),
                   y + t * y_stride + r, rows - r, accumulate);
      }
    }
  }
}

constexpr std::int64_t kAhead = 2048;

// One token: row after row, so that memory is read in order.
template <typename Kind>
DELTAFOX_TARGET void one_token(const typename Kind::Element* x, const typename Kind::Element* w,
                               std::int64_t depth, std::int64_t rows, float* y, bool accumulate) {
  for (std::int64_t n = 0; n < rows; n += 4) {
    __m512 sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename Kind::Element* row = w + std::min(n + r, rows - 1) * depth;
      __m512 sum = _mm512_setzero_ps();
      std::int64_t k = 0;
      for (; k + Kind::kStep <= depth; k += Kind::kStep) {
        _mm_prefetch(reinterpret_cast<const char*>(row + k) + kAhead, _MM_HINT_T0);
        sum = Kind::madd(Kind::load(x + k), Kind::load(row + k), sum);
      }
      if (k < depth) {
        sum = Kind::madd(Kind::load(x + k), Kind::load_first(row + k, depth - k), sum);
      }
      sums[r] = sum;
    }
    store_sums(sums_of(sums[0], sums[1], sums[2], sums[3]), y + n, rows - n, accumulate);
  }
}

template <typename Kind, int kTokens>
DELTAFOX_TARGET void few_tokens(const typename Kind::Element* x, std::int64_t x_stride,
                                const typename Kind::Element* w, std::int64_t depth,
                                std::int64_t rows, float* y, std::int64_t y_stride,
                                bool accumulate) {
  if constexpr (kTokens == 1) {
    one_token<Kind>(x, w, depth, rows, y, accumulate);
  } else {
    constexpr int kRows = kTokens == 2 ? 8 : 4;
    for (std::int64_t n = 0; n < rows; n += kRows) {
      few_tile<Kind, kTokens, kRows>(x, x_stride, w + n * depth, depth, rows - n, y + n, y_stride,
                                     accumulate);
    }
  }
}

// Steps [0, steps) of a stretch of K for a tile: x [steps][kTileTokens][kStep],
// w [steps][kTileRows][kStep]. Sums start from `partial`, or zero if first; they go back there, or
// to y if last. kFetch rows at `next`, of what is copied next, are fetched meanwhile.
template <typename Kind, int kFetch>
DELTAFOX_TARGET void many_tile(const typename Kind::Element* next, std::int64_t depth,
                               const typename Kind::Element* x, const typename Kind::Element* w,
                               std::int64_t steps, float* partial, bool first, bool last, float* y,
                               std::int64_t y_stride, std::int64_t tokens, std::int64_t rows,
                               bool accumulate) {
  __m512 sums[kTileTokens][kTileRows];
#pragma GCC unroll 8
  for (int t = 0; t < kTileTokens; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      sums[t][r] =
          first ? _mm512_setzero_ps() : _mm512_loadu_ps(partial + (t * kTileRows + r) * 16);
    }
  }
  for (std::int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kFetch; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(next + r * depth + k * Kind::kStep), _MM_HINT_T0);
    }
    // The second-level cache is not fast enough by itself.
    constexpr std::int64_t kStepsAhead = 4;
    typename Kind::Vector columns[kTileTokens];
    for (int t = 0; t < kTileTokens; ++t) {
      _mm_prefetch(reinterpret_cast<const char*>(x + (kStepsAhead * kTileTokens + t) * Kind::kStep),
                   _MM_HINT_T0);
    }
    for (int t = 0; t < kTileTokens; ++t) columns[t] = Kind::load(x + t * Kind::kStep);
    for (int r = 0; r < kTileRows; ++r) {
      typename Kind::Vector row = Kind::load(w + r * Kind::kStep);
      // The compiler would load it for each product anew.
      asm("" : "+v"(row));  // NOLINT(hicpp-no-assembler)
      for (int t = 0; t < kTileTokens; ++t) sums[t][r] = Kind::madd(columns[t], row, sums[t][r]);
    }
    x += kTileTokens * Kind::kStep;
    w += kTileRows * Kind::kStep;
  }
  if (last) {
#pragma GCC unroll 8
    for (int t = 0; t < kTileTokens; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; r += 4) {
        if (t < tokens && r < rows) {
          store_sums(sums_of(sums[t][r], sums[t][r + 1], sums[t][r + 2], sums[t][r + 3]),
                     y + t * y_stride + r, rows - r, accumulate);
        }
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTileTokens; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      _mm512_storeu_ps(partial + (t * kTileRows + r) * 16, sums[t][r]);
    }
  }
}

// Columns [begin, begin + steps · kStep) of up to four rows of w, side by side; zeros beyond.
template <typename Kind>
DELTAFOX_TARGET inline void copy_panel(const typename Kind::Element* w, std::int64_t depth,
                                       std::int64_t rows, std::int64_t begin, std::int64_t steps,
                                       typename Kind::Element* to) {
  for (int r = 0; r < kTileRows; ++r) {
    const typename Kind::Element* from = w + std::min<std::int64_t>(r, rows - 1) * depth;
    for (std::int64_t k = 0; k < steps; ++k) {
      const std::int64_t at = begin + k * Kind::kStep;
      const typename Kind::Vector v = at + Kind::kStep <= depth
                                          ? Kind::load(from + at)
                                          : Kind::load_first(from + at, depth - at);
      _mm512_storeu_si512(to + (k * kTileRows + r) * Kind::kStep, Kind::bits(v));
    }
  }
}

// Sizes that are set by the caches.
constexpr std::int64_t kStretchBytes = 3072;                     // of a row of w
constexpr std::int64_t kFewTaskBytes = std::int64_t{96} * 1024;  // of w
constexpr std::int64_t kManyTaskRows = 8 * kTileRows;

// Of the tokens of a block: three eighths of the second-level cache, as far as its size is known.
inline std::int64_t block_bytes() {
  static const std::int64_t bytes = [] {
    const std::int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (cache > 0 ? cache : std::int64_t{1} << 20) / 8 * 3;
  }();
  return bytes;
}

// A block of tokens (packed by threes) against rows of w.
template <typename Kind>
DELTAFOX_TARGET void many_tokens(const typename Kind::Element* x, std::int64_t tokens,
                                 const typename Kind::Element* w, std::int64_t depth,
                                 std::int64_t rows, float* y, std::int64_t y_stride,
                                 bool accumulate, typename Kind::Element* panel, float* partial) {
  const std::int64_t steps = (depth + Kind::kStep - 1) / Kind::kStep;
  constexpr std::int64_t kStretch =
      kStretchBytes / static_cast<std::int64_t>(sizeof(typename Kind::Element)) / Kind::kStep;
  for (std::int64_t n = 0; n < rows; n += kTileRows) {
    for (std::int64_t k = 0; k < steps; k += kStretch) {
      const std::int64_t count = std::min(kStretch, steps - k);
      copy_panel<Kind>(w + n * depth, depth, rows - n, k * Kind::kStep, count, panel);
      const bool last = k + count == steps;
      const typename Kind::Element* next =
          last ? w + (n + kTileRows) * depth : w + n * depth + (k + count) * Kind::kStep;
      const auto tile = [&](auto kernel, std::int64_t t, std::int64_t row) {
        kernel(next + row * depth, depth, x + (t * steps + k * kTileTokens) * Kind::kStep, panel,
               count, partial + t * kTileRows * 16, k == 0, last, y + t * y_stride + n, y_stride,
               tokens - t, rows - n, accumulate);
      };
      // The first tiles fetch what is copied next, as few rows each as there are tiles for.
      const std::int64_t fetch = tokens > 7 * kTileTokens ? 1 : tokens > 3 * kTileTokens ? 2 : 4;
      for (std::int64_t t = 0, row = 0; t < tokens; t += kTileTokens, row += fetch) {
        if (row >= kTileRows) {
          tile(&many_tile<Kind, 0>, t, 0);
        } else if (fetch == 1) {
          tile(&many_tile<Kind, 1>, t, row);
        } else if (fetch == 2) {
          tile(&many_tile<Kind, 2>, t, row);
        } else {
          tile(&many_tile<Kind, 4>, t, row);
        }
      }
    }
  }
}

template <typename Kind>
void linear_few(Context& ctx, const LinearArgs& args) {
  using Element = typename Kind::Element;
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t rows = args.w.shape[0];
  const std::int64_t stride = (depth + Kind::kStep - 1) / Kind::kStep * Kind::kStep;
  ScratchScope scratch(ctx);
  const std::span<Element> x = scratch.array<Element>(tokens * stride);
  for (std::int64_t t = 0; t < tokens; ++t) {
    Element* to = x.data() + t * stride;
    std::fill(to + depth, to + stride, Element{0});
    Kind::convert(args.x.f32() + t * depth, depth, to);
  }
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Element));
  const std::int64_t task_rows =
      std::max<std::int64_t>(8, kFewTaskBytes / (depth * kBytes) / 8 * 8);
  constexpr decltype(&few_tokens<Kind, 1>) kKernels[] = {&few_tokens<Kind, 1>, &few_tokens<Kind, 2>,
                                                         &few_tokens<Kind, 3>, &few_tokens<Kind, 4>,
                                                         &few_tokens<Kind, 5>};
  static_assert(std::size(kKernels) == kFewTokens);
  const auto kernel = kKernels[tokens - 1];
  ctx.threads().parallel_for((rows + task_rows - 1) / task_rows, [&](std::int64_t task) {
    const std::int64_t n = task * task_rows;
    kernel(x.data(), stride, static_cast<const Element*>(args.w.data) + n * depth, depth,
           std::min(task_rows, rows - n), args.y.f32() + n, rows, args.accumulate);
  });
}

// x by tiles: [tile][step][kTileTokens][kStep], zeros beyond T and K.
template <typename Kind>
typename Kind::Element* packed_tokens(Context& ctx, ScratchScope& scratch,
                                      const ConstTensorView& x) {
  using Element = typename Kind::Element;
  const std::int64_t tokens = x.shape[0];
  const std::int64_t depth = x.shape[1];
  const std::int64_t steps = (depth + Kind::kStep - 1) / Kind::kStep;
  const std::int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  Element* packed = scratch.array<Element>(tiles * steps * kTileTokens * Kind::kStep).data();
  ctx.threads().parallel_for(tiles, [&](std::int64_t tile) {
    Element* to = packed + tile * steps * kTileTokens * Kind::kStep;
    for (std::int64_t t = 0; t < kTileTokens; ++t) {
      const std::int64_t token = tile * kTileTokens + t;
      for (std::int64_t k = 0; k < steps; ++k) {
        Element* vector = to + (k * kTileTokens + t) * Kind::kStep;
        const std::int64_t inside =
            token < tokens ? std::min<std::int64_t>(Kind::kStep, depth - k * Kind::kStep) : 0;
        if (inside < Kind::kStep) std::fill_n(vector, Kind::kStep, Element{0});
        if (inside > 0) Kind::convert(x.f32() + token * depth + k * Kind::kStep, inside, vector);
      }
    }
  });
  return packed;
}

// Memory of a task.
template <typename Kind>
struct ManyWork {
  typename Kind::Element* panel;
  float* partial;
  float* rest;  // as many floats a token as were asked for
};

// use(x, t, tokens, n, rows, work) for each block of tokens and of up to kManyTaskRows of `rows`.
template <typename Kind, typename Use>
void for_many_blocks(Context& ctx, const ConstTensorView& x, std::int64_t rows,
                     std::int64_t rest_floats, Use&& use) {
  using Element = typename Kind::Element;
  constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Element));
  const std::int64_t tokens = x.shape[0];
  const std::int64_t padded = (x.shape[1] + Kind::kStep - 1) / Kind::kStep * Kind::kStep;
  ScratchScope scratch(ctx);
  const Element* packed = packed_tokens<Kind>(ctx, scratch, x);
  const std::int64_t block_tokens =
      std::max<std::int64_t>(1, block_bytes() / (padded * kBytes) / kTileTokens) * kTileTokens;
  const std::int64_t token_blocks = (tokens + block_tokens - 1) / block_tokens;
  const std::int64_t row_blocks = (rows + kManyTaskRows - 1) / kManyTaskRows;
  const std::int64_t tiles = (std::min(block_tokens, tokens) + kTileTokens - 1) / kTileTokens;
  const std::int64_t panel_bytes = kTileRows * kStretchBytes;
  const std::int64_t partial_bytes = tiles * kTileTokens * kTileRows * 64;
  const std::int64_t slot_bytes =
      panel_bytes + partial_bytes + tiles * kTileTokens * rest_floats * 4;
  std::byte* slots = scratch.array<std::byte>(ctx.threads().size() * slot_bytes).data();
  ctx.threads().parallel_for(row_blocks * token_blocks, [&](std::int64_t task, int slot) {
    const std::int64_t n = task / token_blocks * kManyTaskRows;
    const std::int64_t t = task % token_blocks * block_tokens;
    std::byte* memory = slots + slot * slot_bytes;
    use(packed + t * padded, t, std::min(block_tokens, tokens - t), n,
        std::min(kManyTaskRows, rows - n),
        ManyWork<Kind>{reinterpret_cast<Element*>(memory),
                       reinterpret_cast<float*>(memory + panel_bytes),
                       reinterpret_cast<float*>(memory + panel_bytes + partial_bytes)});
  });
}

template <typename Kind>
void linear_by_dots(Context& ctx, const LinearArgs& args) {
  if (args.x.shape[0] <= kFewTokens) return linear_few<Kind>(ctx, args);
  using Element = typename Kind::Element;
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t rows = args.w.shape[0];
  const auto* w = static_cast<const Element*>(args.w.data);
  for_many_blocks<Kind>(ctx, args.x, rows, 0,
                        [&](const Element* x, std::int64_t t, std::int64_t tokens, std::int64_t n,
                            std::int64_t count, const ManyWork<Kind>& work) {
                          many_tokens<Kind>(x, tokens, w + n * depth, depth, count,
                                            args.y.f32() + t * rows + n, rows, args.accumulate,
                                            work.panel, work.partial);
                        });
}

// A task has rows of the gate and those of `up` that they belong to: [gate | up] never leaves the
// caches. Not for few tokens.
template <typename Kind>
bool linear_glu_by_dots(Context& ctx, const LinearGluArgs& args) {
  using Element = typename Kind::Element;
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t rows = args.y.shape[1];
  if (args.x.shape[0] <= kFewTokens || rows % 16 != 0) return false;
  static_assert(kManyTaskRows == kGluColumns);
  const auto* gate = static_cast<const Element*>(args.w.data);
  const Element* up = gate + rows * depth;
  for_many_blocks<Kind>(ctx, args.x, rows, 2 * kGluColumns,
                        [&](const Element* x, std::int64_t t, std::int64_t tokens, std::int64_t n,
                            std::int64_t count, const ManyWork<Kind>& work) {
                          float* const of_up = work.rest + tokens * kGluColumns;
                          const auto multiply = [&](const Element* w, float* y) {
                            many_tokens<Kind>(x, tokens, w + n * depth, depth, count, y,
                                              kGluColumns, false, work.panel, work.partial);
                          };
                          multiply(gate, work.rest);
                          multiply(up, of_up);
                          store_glu(work.rest, of_up, kGluColumns, tokens, count, args.activation,
                                    args.y.f32() + t * rows + n, rows);
                        });
  return true;
}

}  // namespace
}  // namespace deltafox::cpu
