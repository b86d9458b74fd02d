// AdamW (ops/adamw.h): bound by memory. One launch for the squares of all gradients, one small one
// that puts them together, one for all steps. Tensors come in a table; a block has a piece of one.
#include <cmath>

#include "core/context.h"
#include "cuda/check.h"
#include "cuda/elements.cuh"
#include "cuda/stream.h"
#include "ops/adamw.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread
constexpr std::int64_t kPiece = kThreads * kVectors * 4;
constexpr int kSumThreads = 1024;

struct Entry {
  const float* grad;
  float* w;
  float* m;
  float* v;
  bf16* rounded;  // or null
  std::int64_t size;
  int first_block;  // pieces of the entries before it
  float weight_decay;
};

struct Table {
  const Entry* entries;
  int count;
};

// The entry that block `block` has a piece of.
__device__ const Entry& find_entry(const Table& table, int block) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_block <= block ? low : high) = middle;
  }
  return table.entries[low];
}

// The sum of a block's, in thread 0.
template <int kBlock>
__device__ double block_sum(double x) {
  __shared__ double sums[kBlock / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (const double sum : sums) total += sum;
  }
  return total;
}

__device__ bool aligned(const Entry& entry) {
  const auto bits = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
  return (bits(entry.grad) | bits(entry.w) | bits(entry.m) | bits(entry.v) |
          bits(entry.rounded) * 2) %
             16 ==
         0;
}

// f(i, count) for each four elements of the block's piece; count as in load_four.
template <typename F>
__device__ void each_four_of(const Entry& entry, int block, const F& f) {
  const std::int64_t begin = (block - entry.first_block) * kPiece;
  const bool vectors = aligned(entry);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const std::int64_t i = begin + (n * kThreads + static_cast<int>(threadIdx.x)) * 4;
    if (i >= entry.size) return;
    f(i, vectors && i + 4 <= entry.size ? kVector
                                        : static_cast<int>(min(std::int64_t{4}, entry.size - i)));
  }
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const Table table, double* sums) {
  const Entry& entry = find_entry(table, blockIdx.x);
  double sum = 0;
  each_four_of(entry, blockIdx.x, [&](std::int64_t i, int count) {
    float g[4];
    load_four(g, entry.grad + i, count);
#pragma unroll
    for (const float x : g) sum += static_cast<double>(x) * x;
  });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Their sum, or its root.
__global__ void __launch_bounds__(kSumThreads)
    total_kernel(const double* sums, int count, double* total, float* norm) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSumThreads) sum += sums[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x != 0) return;
  if (total != nullptr) *total = sum;
  if (norm != nullptr) *norm = static_cast<float>(sqrt(sum));
}

struct Factors {
  float lr, beta2, one_minus_beta1, one_minus_beta2, step_size, inverse_root, eps;
};

Factors factors_of(double lr, double beta1, double beta2, double eps, std::int64_t step) {
  const auto t = static_cast<double>(step);
  return {
      .lr = static_cast<float>(lr),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .step_size = static_cast<float>(lr / (1 - std::pow(beta1, t))),
      .inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
      .eps = static_cast<float>(eps),
  };
}

// With `norm`, gradients are clipped to `max_norm`, else scaled by it.
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Table table, const Factors by, const float* norm, float max_norm) {
  float scale = max_norm;
  if (norm != nullptr) {
    if (!isfinite(*norm)) return;
    scale = fminf(1, max_norm / (*norm + 1e-6F));
  }
  const Entry entry = find_entry(table, blockIdx.x);
  const float decay = 1 - by.lr * entry.weight_decay;
  each_four_of(entry, blockIdx.x, [&](std::int64_t i, int count) {
    float grad[4];
    float w[4];
    float m[4];
    float v[4];
    load_four(grad, entry.grad + i, count);
    load_four(w, entry.w + i, count);
    load_four(m, entry.m + i, count);
    load_four(v, entry.v + i, count);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float g = scale * grad[e];
      m[e] = fmaf(by.one_minus_beta1, g - m[e], m[e]);
      v[e] = fmaf(by.one_minus_beta2 * g, g, by.beta2 * v[e]);
      const float spread = fmaf(sqrtf(v[e]), by.inverse_root, by.eps);
      w[e] = fmaf(-by.step_size, m[e] / spread, w[e] * decay);
    }
    store_four(entry.w + i, w, count);
    store_four(entry.m + i, m, count);
    store_four(entry.v + i, v, count);
    if (entry.rounded != nullptr) store_four(entry.rounded + i, w, count);
  });
}

// Fills entries' first_block; the number of blocks.
int number_blocks(std::span<Entry> entries) {
  int blocks = 0;
  for (Entry& entry : entries) {
    entry.first_block = blocks;
    blocks += static_cast<int>((entry.size + kPiece - 1) / kPiece);
  }
  return blocks;
}

void launch_squares(Context& ctx, const Table& table, int blocks, double* total, float* norm) {
  ScratchScope scratch(ctx);
  auto* sums = static_cast<double*>(scratch.tensor({std::max(blocks, 1)}, DType::kI64).data);
  if (blocks > 0) {
    squares_kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(table, sums);
    check_launch("sum_of_squares");
  }
  total_kernel<<<1, kSumThreads, 0, stream_of(ctx)>>>(sums, blocks, total, norm);
  check_launch("sum_of_squares");
}

}  // namespace

void adamw(Context& ctx, const AdamWArgs& args) {
  Entry entry{.grad = args.grad.f32(),
              .w = args.w.f32(),
              .m = args.m.f32(),
              .v = args.v.f32(),
              .rounded = nullptr,
              .size = args.w.shape.size(),
              .first_block = 0,
              .weight_decay = static_cast<float>(args.weight_decay)};
  const int blocks = number_blocks({&entry, 1});
  if (blocks == 0) return;
  const Table table{upload(ctx, std::span<const Entry>(&entry, 1)), 1};
  adamw_kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(
      table, factors_of(args.lr, args.beta1, args.beta2, args.eps, args.step), nullptr,
      static_cast<float>(args.scale));
  check_launch("adamw");
}

void adamw_step(Context& ctx, const AdamWStepArgs& args) {
  ScratchScope scratch(ctx);
  const std::span<Entry> entries =
      scratch.array<Entry>(static_cast<std::int64_t>(args.params.size()));
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const AdamWParam& param = args.params[i];
    entries[i] = {.grad = param.grad.f32(),
                  .w = param.w.f32(),
                  .m = param.m.f32(),
                  .v = param.v.f32(),
                  .rounded = static_cast<bf16*>(param.rounded.data),
                  .size = param.w.shape.size(),
                  .first_block = 0,
                  .weight_decay = static_cast<float>(param.weight_decay)};
  }
  const int blocks = number_blocks(entries);
  const Table table{upload(ctx, std::span<const Entry>(entries)), static_cast<int>(entries.size())};
  launch_squares(ctx, table, blocks, nullptr, args.norm.f32());
  if (blocks == 0) return;
  adamw_kernel<<<blocks, kThreads, 0, stream_of(ctx)>>>(
      table, factors_of(args.lr, args.beta1, args.beta2, args.eps, args.step), args.norm.f32(),
      static_cast<float>(args.max_norm));
  check_launch("adamw_step");
}

double sum_of_squares(Context& ctx, const ConstTensorView& x) {
  ScratchScope scratch(ctx);
  Entry entry{};
  entry.grad = x.f32();
  entry.size = x.shape.size();
  const int blocks = number_blocks({&entry, 1});
  const Table table{upload(ctx, std::span<const Entry>(&entry, 1)), 1};
  auto* total = static_cast<double*>(scratch.tensor({1}, DType::kI64).data);
  launch_squares(ctx, table, blocks, total, nullptr);
  double sum = 0;
  ctx.copy(&sum, total, sizeof(sum));
  ctx.synchronize();
  return sum;
}

}  // namespace deltafox::cuda
