// step_linear with packed weights (cuda/packed.cuh), which go from device memory to the operands of
// the tensor cores through masks alone.
//
// A thread block takes panels of 16 rows; its 8 warps share K between them, warp i taking columns
// 32·i to 32·i + 31 of each block of 256. Integers (times factors) and x, as bfloat16, are
// multiplied exactly and added as float32; the sum of a warp's columns of a block times the row's
// scale is added to those of the blocks before, and the warps' sums are added in order.
#include <algorithm>

#include "cuda/card.h"
#include "cuda/packed.cuh"
#include "cuda/step_frame.cuh"
#include "cuda/step_packed.h"

namespace deltafox::cuda {
namespace {

using namespace step;

constexpr int kSumStride = kPackedRows + 4;  // neighbouring columns in other banks
using PanelTile = Tile<kPackedRows>;

// kChunk blocks are under way in registers; it divides the blocks of a panel. kHalves: 8 rows of x
// each.
template <bool kFourBits, int kChunk, int kHalves>
__global__ void __launch_bounds__(kThreads, 2)
    packed_step_kernel(const __grid_constant__ Params p) {
  using Form = PackedForm<kFourBits>;
  constexpr int kRows = 8 * kHalves;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* staged = reinterpret_cast<bf16*>(shared);
  __shared__ float partial[2][kWarps][kRows][kSumStride];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int columns = static_cast<int>((p.k + kQuantStep - 1) / kQuantStep * kQuantStep);
  const int blocks = p.staged / kBlocks;
  const int panel_bytes = blocks * Form::kHeadBytes + columns / kPackedColumns * Form::kStepBytes;
  const bool in_last = (blocks - 1) * kBlocks + warp * kBlock < columns;
  const auto panel_of = [&](const PanelTile& tile) {
    const Part& part = p.parts[tile.part];
    const int panel = (tile.first_row(p) + tile.half * part.rows) / kPackedRows;
    return static_cast<const std::byte*>(part.w) + static_cast<std::int64_t>(panel) * panel_bytes;
  };

  PanelTile loading(p, static_cast<int>(blockIdx.x));
  const std::byte* from = panel_of(loading);
  int loading_block = 0;
  PackedOperand<kFourBits> ahead[kChunk];
  const auto load = [&](PackedOperand<kFourBits>& to) {
    if (!loading.exists(p)) return;
    to = {};
    if (loading_block + 1 < blocks || in_last) {
      to = load_operand<kFourBits>(from + loading_block * Form::kBlockBytes, warp, lane);
    }
    if (++loading_block == blocks) {
      loading_block = 0;
      loading.next(p);
      if (loading.exists(p)) from = panel_of(loading);
    }
  };
#pragma unroll
  for (int i = 0; i < kChunk; ++i) load(ahead[i]);
  PanelTile coming = loading;
  const auto prefetch_tile = [&] {
    if (!coming.exists(p)) return;
    const std::byte* panel = panel_of(coming);
    for (int at = static_cast<int>(threadIdx.x) * 128; at < panel_bytes; at += kThreads * 128) {
      prefetch(panel + at);
    }
    coming.next(p);
  };
  for (int bytes = 0; bytes < kPrefetchBytes; bytes += panel_bytes) prefetch_tile();

  wait_for_input();
  stage_input<kRows>(p, staged);

  float held = 0;
  int buffer = 0;
  const int stride = p.staged + kPadding;
  const bf16* x = staged + lane / 4 * stride + warp * kBlock + lane % 4 * 8;
  for (PanelTile tile(p, static_cast<int>(blockIdx.x)); tile.exists(p); tile.next(p)) {
    prefetch_tile();
    float c[kHalves][4] = {};
    for (int block = 0; block < blocks; block += kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const PackedOperand<kFourBits> w = ahead[i];
        load(ahead[i]);
        add_packed(
            w, warp,
            [&](int h) {
              return *reinterpret_cast<const uint4*>(x + (block + i) * kBlocks + h * 8 * stride);
            },
            c);
      }
    }
    auto& sums_of_tile = partial[buffer];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums_of_tile[warp][h * 8 + lane % 4 * 2 + e % 2][lane / 4 + e / 2 * 8] = c[h][e];
      }
    }
    __syncthreads();
    if (threadIdx.x < kRows * kPackedRows) {
      const int b = static_cast<int>(threadIdx.x) / kPackedRows;
      const int n = static_cast<int>(threadIdx.x) % kPackedRows;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums_of_tile[w][b][n];
      finish(p, tile, b, n, sum, held);
    }
    buffer ^= 1;  // so that one barrier a tile is enough
  }
}

using Kernel = void (*)(Params);

template <bool kFourBits, int kHalves>
Kernel kernel_for(int blocks) {
  if (blocks % 4 == 0) return packed_step_kernel<kFourBits, 4, kHalves>;
  if (blocks % 3 == 0) return packed_step_kernel<kFourBits, 3, kHalves>;
  if (blocks % 2 == 0) return packed_step_kernel<kFourBits, 2, kHalves>;
  return packed_step_kernel<kFourBits, 1, kHalves>;
}

}  // namespace

void launch_packed_step(Context& ctx, const Params& p, DType form) {
  const int blocks = p.staged / kBlocks;
  const bool two = p.batch > 8;
  const auto of_form = [&]<bool kFourBits>() {
    return two ? kernel_for<kFourBits, 2>(blocks) : kernel_for<kFourBits, 1>(blocks);
  };
  const Kernel kernel =
      form == DType::kQ4 ? of_form.operator()<true>() : of_form.operator()<false>();
  launch_frame(ctx, kernel, p, 2);
}

bool fits_packed_step(std::int64_t rows, std::int64_t k) {
  const bool two = rows > 8;
  const auto staged = static_cast<int>((k + kBlocks - 1) / kBlocks * kBlocks);
  const std::size_t sums = sizeof(float[2][kWarps][8][kSumStride]) * (two ? 2 : 1);
  return staged_bytes(two ? 16 : 8, staged) + sums <= static_cast<std::size_t>(most_shared_bytes());
}

}  // namespace deltafox::cuda
