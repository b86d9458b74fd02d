// dtable_n += Σ_{t: ids_t = n} dy_t. Tokens are sorted by id, those of one id by place, and cut
// into pieces of kPiece. A block sums up the runs of equal ids of its piece; a run that lies in one
// piece goes to the table at once, parts of longer ones are kept, and added up in turn by a second
// kernel.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "core/context.h"
#include "cuda/check.h"
#include "cuda/each_four.cuh"
#include "cuda/rows.cuh"
#include "cuda/stream.h"
#include "ops/embedding.h"

namespace deltafox::cuda {
namespace {

constexpr int kPiece = 32;
constexpr int kThreads = 128;
constexpr int kColumns = kThreads * 4;

struct Params {
  const std::uint32_t* ids;   // [T], sorted
  const std::int32_t* order;  // [T], the tokens that have them
  int tokens;
  Elements dy;
  float* dtable;
  float* parts;  // [pieces, 2, C]: of the run that a piece begins in the midst of, of its last run
  int width;
  bool aligned;

  __device__ int column() const {
    return static_cast<int>(blockIdx.y) * kColumns + static_cast<int>(threadIdx.x) * 4;
  }
  __device__ int count() const {
    return column() < width ? (aligned ? kVector : min(4, width - column())) : 0;
  }
  __device__ float* part(int piece, int which) const {
    return parts + (static_cast<std::int64_t>(piece) * 2 + which) * width + column();
  }
  __device__ float* row(std::uint32_t id) const {
    return dtable + static_cast<std::int64_t>(id) * width + column();
  }
  // Whether the id at i goes on at i + 1.
  __device__ bool goes_on(int i) const { return i + 1 < tokens && ids[i] == ids[i + 1]; }
};

__device__ void add_four(float (&to)[4], const float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) to[e] += x[e];
}

__global__ void __launch_bounds__(kThreads) piece_kernel(const __grid_constant__ Params p) {
  constexpr int kAtOnce = 8;
  const int piece = static_cast<int>(blockIdx.x);
  const int begin = piece * kPiece;
  const int end = min(begin + kPiece, p.tokens);
  const int count = p.count();
  bool from_before = begin > 0 && p.goes_on(begin - 1);
  float sum[4] = {};
  for (int first = begin; first < end; first += kAtOnce) {
    uint4 bits[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + n >= end) break;
      bits[n] =
          p.dy.fetch(static_cast<std::int64_t>(p.order[first + n]) * p.width + p.column(), count);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = first + n;
      if (i >= end) break;
      float dy[4];
      p.dy.widen(dy, bits[n]);
      add_four(sum, dy);
      const bool goes_on = p.goes_on(i);
      if (goes_on && i + 1 < end) continue;
      if (from_before || goes_on) {
        store_four(p.part(piece, from_before ? 0 : 1), sum, count);
      } else {
        float* to = p.row(p.ids[i]);
        float before[4];
        load_four(before, to, count);
        add_four(sum, before);
        store_four(to, sum, count);
      }
      from_before = false;
#pragma unroll
      for (float& element : sum) element = 0;
    }
  }
}

// The runs that begin in one piece and end in another.
__global__ void __launch_bounds__(kThreads) long_run_kernel(const __grid_constant__ Params p) {
  const int piece = static_cast<int>(blockIdx.x);
  const int last = piece * kPiece + kPiece - 1;
  if (!p.goes_on(last)) return;
  const std::uint32_t id = p.ids[last];
  const int begin = piece * kPiece;
  if (begin > 0 && p.ids[begin - 1] == id) return;  // it began earlier
  const int count = p.count();
  float sum[4];
  float part[4];
  load_four(sum, p.part(piece, 1), count);
#pragma unroll 4
  for (int next = piece + 1; next * kPiece < p.tokens && p.ids[next * kPiece] == id; ++next) {
    load_four(part, p.part(next, 0), count);
    add_four(sum, part);
  }
  load_four(part, p.row(id), count);
  add_four(sum, part);
  store_four(p.row(id), sum, count);
}

}  // namespace

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  const auto tokens = static_cast<int>(args.ids.size());
  if (tokens == 0) return;
  constexpr const char* kOp = "embedding_backward";
  const std::int64_t pieces = (tokens + kPiece - 1) / kPiece;
  const std::int64_t width = args.dtable.shape[1];
  ScratchScope scratch(ctx);
  const auto integers = [&] {
    return static_cast<std::int32_t*>(scratch.tensor({tokens}, DType::kI32).data);
  };
  std::int32_t* places = integers();
  std::int32_t* order = integers();
  auto* sorted = reinterpret_cast<std::uint32_t*>(integers());
  each_four(ctx, kOp, tokens, false, [=] __device__(std::int64_t i, int count) {
    for (int e = 0; e < count; ++e) places[i + e] = static_cast<std::int32_t>(i + e);
  });
  const int bits = std::bit_width(static_cast<std::uint64_t>(args.dtable.shape[0]));
  const auto sort = [&](void* memory, std::size_t& bytes) {
    check(cub::DeviceRadixSort::SortPairs(memory, bytes,
                                          reinterpret_cast<const std::uint32_t*>(args.ids.data()),
                                          sorted, places, order, tokens, 0, bits, stream_of(ctx)),
          kOp);
  };
  std::size_t bytes = 0;
  sort(nullptr, bytes);
  sort(scratch.tensor({static_cast<std::int64_t>(bytes)}, DType::kU8).data, bytes);
  Params p{.ids = sorted,
           .order = order,
           .tokens = tokens,
           .dy = Elements(args.dy),
           .dtable = args.dtable.f32(),
           .parts = scratch.tensor({pieces, 2, width}).f32(),
           .width = static_cast<int>(width),
           .aligned = false};
  p.aligned =
      width % 4 == 0 && p.dy.aligned() && reinterpret_cast<std::uintptr_t>(p.dtable) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(pieces),
                  static_cast<unsigned>((width + kColumns - 1) / kColumns));
  piece_kernel<<<grid, kThreads, 0, stream_of(ctx)>>>(p);
  check_launch(kOp);
  long_run_kernel<<<grid, kThreads, 0, stream_of(ctx)>>>(p);
  check_launch(kOp);
}

}  // namespace deltafox::cuda
