// Packed matrices: from the order of files to that of a GPU, to bfloat16, rows of embeddings. See
// cuda/packed.cuh.
#include "cuda/packed.cuh"

#include "cuda/each_four.cuh"
#include "cuda/packed.h"
#include "ops/quantize.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;

// A thread block a block of a panel, which fits in its memory.
template <bool kFourBits>
__global__ void __launch_bounds__(kThreads) arrange_kernel(std::byte* panels, PackedMatrix w) {
  using Form = PackedForm<kFourBits>;
  __shared__ std::uint32_t from[Form::kBlockBytes / 4];
  const int first_column = static_cast<int>(blockIdx.x) * kPackedBlock;
  const int columns = min(kPackedBlock, w.columns - first_column);
  const int words = (Form::kHeadBytes + columns / kPackedColumns * Form::kStepBytes) / 4;
  auto* to = reinterpret_cast<std::uint32_t*>(
      panels + static_cast<std::int64_t>(blockIdx.y) * w.panel_bytes +
      static_cast<std::int64_t>(blockIdx.x) * Form::kBlockBytes);
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) from[i] = to[i];
  __syncthreads();
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  const std::uint32_t* values = from + Form::kHeadBytes / 4;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
    const int v = i - Form::kHeadBytes / 4;  // of the words of values
    std::uint32_t word = 0;
    if (i < kPackedRows) {
      word = from[i / 2 + i % 2 * 8];
    } else if (v < 0) {
      for (int b = 0; b < 4; ++b) {
        const int at = (i - kPackedRows) * 4 + b;  // of the bytes of factors
        const int row = at % kPackedRows / 2 + at % 2 * 8;
        word |= std::uint32_t{bytes[kScaleBytes + at / kPackedRows * kPackedRows + row]} << 8 * b;
      }
    } else if constexpr (kFourBits) {
      const int lane = v / 2 % 32;
      const int row = lane / 4 + v % 2 * 8;
      const int column = v / 64 * kPackedColumns + lane % 4 * 8;
      const std::uint32_t source = values[column / 8 * kPackedRows + row];
      for (int c = 0; c < 8; ++c) {
        const std::uint32_t value = source >> (c % 4 * 8 + c / 4 * 4) & 15U;
        word |= value << 4 * (c / 2 + c % 2 * 4);
      }
    } else {
      const int lane = v / 4 % 32;
      const int row = lane / 4 + v / 2 % 2 * 8;
      const int column = v / 128 * kPackedColumns + lane % 4 * 8 + v % 2 * 4;
      word = __byte_perm(values[column / 4 * kPackedRows + row], 0, 0x3120);
    }
    to[i] = word;
  }
}

__device__ inline std::uint32_t scaled(std::uint32_t pair, float scale) {
  const float2 v = __bfloat1622float2(pair_of(pair));
  return bits_of(__floats2bfloat162_rn(v.x * scale, v.y * scale));
}

// A warp 32 columns of a panel.
template <bool kFourBits>
__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedMatrix w, bf16* to, bool aligned) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int step = static_cast<int>(threadIdx.x) / 32;
  const int column = static_cast<int>(blockIdx.x) * kPackedBlock + step * kPackedColumns;
  if (column >= w.columns) return;
  const std::byte* block =
      w.data + static_cast<std::int64_t>(blockIdx.y) * w.panel_bytes +
      static_cast<std::int64_t>(blockIdx.x) * PackedForm<kFourBits>::kBlockBytes;
  const auto operand = load_operand<kFourBits>(block, step, lane);
  const auto store = [&](int row, const EightColumns& eight, float scale) {
    const int first = column + lane % 4 * 8;
    if (row >= w.rows || first >= w.depth) return;
    bf16* at = to + static_cast<std::int64_t>(row) * w.depth + first;
    uint4 rounded;
    rounded.x = scaled(eight.pairs[0], scale), rounded.y = scaled(eight.pairs[1], scale);
    rounded.z = scaled(eight.pairs[2], scale), rounded.w = scaled(eight.pairs[3], scale);
    if (aligned) {
      *reinterpret_cast<uint4*>(at) = rounded;
      return;
    }
    const std::uint32_t words[4] = {rounded.x, rounded.y, rounded.z, rounded.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const __nv_bfloat162 pair = pair_of(words[i / 2]);
      if (first + i < w.depth) at[i] = i % 2 == 0 ? pair.x : pair.y;
    }
  };
  const int row = static_cast<int>(blockIdx.y) * kPackedRows + lane / 4;
  store(row, operand.low(step), operand.scales.x);
  store(row + 8, operand.high(step), operand.scales.y);
}

// Four elements of a row from a column on that is a multiple of four.
template <bool kFourBits>
__device__ void load_four_packed(float (&to)[4], const PackedMatrix& w, int row, int column) {
  const std::byte* block =
      w.data + static_cast<std::int64_t>(row / kPackedRows) * w.panel_bytes +
      static_cast<std::int64_t>(column / kPackedBlock) * PackedForm<kFourBits>::kBlockBytes;
  const int step = column % kPackedBlock / kPackedColumns;
  const int lane = row % 8 * 4 + column % kPackedColumns / 8;
  const auto operand = load_operand<kFourBits>(block, step, lane);
  const bool second = row % kPackedRows >= 8;
  const EightColumns eight = second ? operand.high(step) : operand.low(step);
  const float scale = second ? operand.scales.y : operand.scales.x;
  const bool behind = column % 8 == 4;
  const float2 low = __bfloat1622float2(pair_of(behind ? eight.pairs[2] : eight.pairs[0]));
  const float2 high = __bfloat1622float2(pair_of(behind ? eight.pairs[3] : eight.pairs[1]));
  to[0] = low.x * scale, to[1] = low.y * scale, to[2] = high.x * scale, to[3] = high.y * scale;
}

dim3 blocks_of(const PackedMatrix& w) {
  return {static_cast<unsigned>((w.columns + kPackedBlock - 1) / kPackedBlock),
          static_cast<unsigned>((w.rows + kPackedRows - 1) / kPackedRows)};
}

}  // namespace

void arrange_packed(Context& ctx, const TensorView& packed) {
  const PackedMatrix w{ConstTensorView(packed)};
  const auto kernel = w.four_bits ? arrange_kernel<true> : arrange_kernel<false>;
  kernel<<<blocks_of(w), kThreads, 0, stream_of(ctx)>>>(static_cast<std::byte*>(packed.data), w);
  check_launch("arrange_packed");
}

TensorView unpacked(Context& ctx, ScratchScope& scratch, const ConstTensorView& matrix) {
  const PackedMatrix w(matrix);
  const TensorView to = scratch.tensor(matrix.shape, DType::kBF16);
  const auto kernel = w.four_bits ? unpack_kernel<true> : unpack_kernel<false>;
  kernel<<<blocks_of(w), kThreads, 0, stream_of(ctx)>>>(w, static_cast<bf16*>(to.data),
                                                        w.depth % 8 == 0);
  check_launch("unpacked");
  return to;
}

void packed_embedding(Context& ctx, const EmbeddingArgs& args) {
  const std::int32_t* ids = args.ids.data();
  const PackedMatrix table(args.table);
  float* y = args.y.f32();
  const int width = table.depth;
  const int fours = (width + 3) / 4;  // of a row
  each_four(ctx, "embedding", 4 * std::ssize(args.ids) * fours, false,
            [=] __device__(std::int64_t i, int /*count*/) {
              const std::int64_t t = i / 4 / fours;
              const int column = static_cast<int>(i / 4 % fours) * 4;
              float v[4];
              if (table.four_bits) {
                load_four_packed<true>(v, table, ids[t], column);
              } else {
                load_four_packed<false>(v, table, ids[t], column);
              }
              store_four(y + t * width + column, v, count_columns(column, width));
            });
}

}  // namespace deltafox::cuda
