// dtable_n += Σ_{t: ids_t = n} dy_t, in the order of the tokens. Tokens are put in the order of
// (id, place) by counting those before each, which takes T² comparisons: less time than reading dy,
// up to some ten thousand tokens. Then one block adds up what belongs to one row of the table.
#include <climits>

#include "core/context.h"
#include "cuda/check.h"
#include "cuda/rows.cuh"
#include "cuda/stream.h"
#include "ops/embedding.h"

namespace deltafox::cuda {
namespace {

constexpr int kRankThreads = 256;
constexpr int kLanes = 8;  // of a token
constexpr int kTokens = kRankThreads / kLanes;
constexpr int kTile = 2048;
constexpr int kSumThreads = 128;
constexpr int kColumns = kSumThreads * 4;

// order [T]: the tokens by id, those of one id by place.
__global__ void __launch_bounds__(kRankThreads)
    rank_kernel(const std::int32_t* ids, int tokens, std::int32_t* order) {
  __shared__ std::int32_t tile[kTile];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int token = static_cast<int>(blockIdx.x) * kTokens + static_cast<int>(threadIdx.x) / kLanes;
  const std::int32_t id = token < tokens ? ids[token] : 0;
  int rank = 0;
  for (int first = 0; first < tokens; first += kTile) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTile; i += kRankThreads) {
      tile[i] = first + i < tokens ? ids[first + i] : INT_MAX;
    }
    __syncthreads();
#pragma unroll 8
    for (int i = lane; i < kTile; i += kLanes) rank += tile[i] < id + (first + i < token ? 1 : 0);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    rank += __shfl_xor_sync(0xffffffff, rank, offset);
  }
  if (lane == 0 && token < tokens) order[rank] = token;
}

struct Params {
  const std::int32_t* ids;
  const std::int32_t* order;
  int tokens;
  Elements dy;
  float* dtable;
  int width;
  bool aligned;
};

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const Params p) {
  __shared__ std::int32_t rows[kSumThreads];
  const int first = static_cast<int>(blockIdx.x);
  const std::int32_t id = p.ids[p.order[first]];
  if (first > 0 && p.ids[p.order[first - 1]] == id) return;
  const int column = static_cast<int>(blockIdx.y) * kColumns + static_cast<int>(threadIdx.x) * 4;
  const int count = column < p.width ? (p.aligned ? kVector : min(4, p.width - column)) : 0;
  float* to = p.dtable + static_cast<std::int64_t>(id) * p.width + column;
  float sum[4];
  load_four(sum, to, count);
  int found = kSumThreads;
  for (int at = first; found == kSumThreads; at += kSumThreads) {
    const int i = at + static_cast<int>(threadIdx.x);
    const std::int32_t row = i < p.tokens ? p.order[i] : 0;
    rows[threadIdx.x] = row;
    // Those of this id come first.
    found = __syncthreads_count(i < p.tokens && p.ids[row] == id ? 1 : 0);
#pragma unroll 8
    for (int n = 0; n < found; ++n) {
      float dy[4];
      p.dy.widen(dy, p.dy.fetch(static_cast<std::int64_t>(rows[n]) * p.width + column, count));
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += dy[e];
    }
    __syncthreads();
  }
  store_four(to, sum, count);
}

}  // namespace

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  const auto tokens = static_cast<int>(args.ids.size());
  if (tokens == 0) return;
  ScratchScope scratch(ctx);
  auto* order = static_cast<std::int32_t*>(scratch.tensor({tokens}, DType::kI32).data);
  rank_kernel<<<(tokens + kTokens - 1) / kTokens, kRankThreads, 0, stream_of(ctx)>>>(
      args.ids.data(), tokens, order);
  check_launch("embedding_backward");
  Params p{.ids = args.ids.data(),
           .order = order,
           .tokens = tokens,
           .dy = Elements(args.dy),
           .dtable = args.dtable.f32(),
           .width = static_cast<int>(args.dtable.shape[1]),
           .aligned = false};
  p.aligned =
      p.width % 4 == 0 && p.dy.aligned() && reinterpret_cast<std::uintptr_t>(p.dtable) % 16 == 0;
  const dim3 grid(static_cast<unsigned>(tokens),
                  static_cast<unsigned>((p.width + kColumns - 1) / kColumns));
  sum_kernel<<<grid, kSumThreads, 0, stream_of(ctx)>>>(p);
  check_launch("embedding_backward");
}

}  // namespace deltafox::cuda
