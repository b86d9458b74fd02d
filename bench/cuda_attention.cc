// Forgetting attention of bfloat16 on a GPU: one sequence, forward alone and with backward, without
// and with pruning; further forward without gates, with a window of 2048, and in float32 for up to
// 4096 tokens; appending to the cache; one token behind so many, and behind an eighth of them in
// each of 8 sequences. Seconds a call, the median of runs of several calls. Prints JSON with the
// FLOP/s of causal attention counted in full (2 products forward, 5 backward) for what is not
// pruned.
//
//   bench_cuda_attention [TOKENS [HEADS [HEAD_SIZE [RUNS]]]]
//
// With DELTAFOX_CUDA_MAJOR=8 the kernels of older cards.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "core/context.h"
#include "core/float_convert.h"
#include "ops/forgetting_attention.h"
#include "ops/kv_append.h"

namespace deltafox {
namespace {

constexpr int kCalls = 5;

Tensor on_gpu(const Tensor& host, DType dtype) {
  Tensor stored(dtype, host.view().shape);
  convert(host.view(), stored.view());
  Tensor device(dtype, host.view().shape, Device::kCuda);
  cuda::copy(device.view().data, stored.view().data, stored.bytes());
  return device;
}

double median_seconds(Context& ctx, int runs, const std::function<void()>& call) {
  call();
  ctx.synchronize();
  std::vector<double> seconds;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    ctx.synchronize();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    seconds.push_back(time.count() / kCalls);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

// Elements of one table of normal numbers, of a prime size.
class Numbers {
 public:
  Numbers() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (float& x : table_) x = normal(random);
  }
  Tensor normal(const Shape& shape, DType dtype) {
    return draw(shape, dtype, [](float x) { return x; });
  }
  // Gates σ(4 + x/10), as with a bias of 4 at the beginning of training.
  Tensor log_gates(const Shape& shape) {
    return draw(shape, DType::kF32, [](float x) { return -std::log1p(std::exp(-(4 + 0.1F * x))); });
  }

 private:
  template <class F>
  Tensor draw(const Shape& shape, DType dtype, const F& number) {
    Tensor host(DType::kF32, shape);
    for (std::int64_t i = 0; i < shape.size(); ++i) {
      host.f32()[i] = number(table_[(next_ += 7919) % table_.size()]);
    }
    return on_gpu(host, dtype);
  }

  std::vector<float> table_ = std::vector<float>(65521);
  std::size_t next_ = 0;
};

// What fills the caches of `batch` sequences of as many tokens.
struct Filling {
  Filling(Context& ctx, Numbers& numbers, std::int64_t batch, std::int64_t tokens,
          std::int64_t heads, std::int64_t dim, bool gated, std::optional<std::int64_t> window = {})
      : k(numbers.normal({batch * tokens, heads, dim}, ctx.activation_dtype())),
        v(numbers.normal({batch * tokens, heads, dim}, ctx.activation_dtype())),
        gates(gated ? numbers.log_gates({batch * tokens, heads}) : Tensor()) {
    const KvCache cache({.kv_heads = heads,
                         .head_dim = dim,
                         .gate_heads = gated ? heads : 0,
                         .window = window,
                         .device = Device::kCuda,
                         .dtype = ctx.activation_dtype()});
    caches.assign(static_cast<std::size_t>(batch), cache);
    cu = {0};
    for (KvCache& of : caches) {
      of.extend(tokens);
      writable.push_back(&of);
      cu.push_back(cu.back() + tokens);
    }
    append(ctx);
  }
  void append(Context& ctx) {
    ops::kv_append(ctx, {.k = k.view(),
                         .v = v.view(),
                         .log_gates = gates.bytes() > 0 ? gates.view() : TensorView(),
                         .sequences = Sequences(cu),
                         .caches = writable});
  }
  std::vector<const KvCache*> readable() const { return {writable.begin(), writable.end()}; }

  Tensor k, v, gates;
  std::vector<KvCache> caches;
  std::vector<KvCache*> writable;
  std::vector<std::int64_t> cu;
};

// Forwards alone, of queries for all that fills the caches, or for the last token of each.
double forward_seconds(Context& ctx, Numbers& numbers, const Filling& filling, int runs,
                       bool last) {
  const std::int64_t rows = last ? std::ssize(filling.caches) : filling.cu.back();
  const KvLayout& layout = filling.caches[0].layout();
  const Shape shape{rows, layout.kv_heads, layout.head_dim};
  const Tensor q = numbers.normal(shape, ctx.activation_dtype());
  Tensor o(ctx.activation_dtype(), shape, Device::kCuda);
  std::vector<std::int64_t> cu = filling.cu;
  if (last) std::iota(cu.begin(), cu.end(), 0);
  const std::vector<const KvCache*> caches = filling.readable();
  return median_seconds(ctx, runs, [&] {
    ops::forgetting_attention(
        ctx, {.q = q.view(), .sequences = Sequences(cu), .caches = caches, .o = o.view()});
  });
}

nlohmann::json measure(std::int64_t tokens, std::int64_t heads, std::int64_t dim, int runs) {
  ThreadPool threads(1);
  Context ctx(threads, Device::kCuda, DType::kBF16);
  Numbers numbers;
  const Shape shape{tokens, heads, dim};
  nlohmann::json result;
  {
    Filling filling(ctx, numbers, 1, tokens, heads, dim, true);
    const Tensor q = numbers.normal(shape, DType::kBF16);
    const Tensor d_o = numbers.normal(shape, DType::kBF16);
    Tensor o(DType::kBF16, shape, Device::kCuda);
    Tensor lse(DType::kF32, {tokens, heads}, Device::kCuda);
    Tensor dq(DType::kBF16, shape, Device::kCuda);
    Tensor dk(DType::kBF16, shape, Device::kCuda);
    Tensor dv(DType::kBF16, shape, Device::kCuda);
    Tensor dgates(DType::kF32, {tokens, heads}, Device::kCuda);
    const std::vector<const KvCache*> readable = filling.readable();
    // A threshold of δ = −40 for every query, but for ln(i + 1), which the tolerance makes up for
    // at the last one.
    const std::vector<float> bounds(static_cast<std::size_t>(heads), 0.0F);
    for (const bool pruned : {false, true}) {
      std::optional<float> tolerance;
      if (pruned) tolerance = -40 + std::log(static_cast<float>(tokens));
      const auto forward = [&] {
        ops::forgetting_attention(ctx, {.q = q.view(),
                                        .sequences = Sequences(filling.cu),
                                        .caches = readable,
                                        .log_pruning_tolerance = tolerance,
                                        .score_bounds = bounds,
                                        .o = o.view(),
                                        .lse = lse.view()});
      };
      const auto backward = [&] {
        ops::forgetting_attention_backward(ctx, {.q = q.view(),
                                                 .k = filling.k.view(),
                                                 .v = filling.v.view(),
                                                 .log_gates = filling.gates.view(),
                                                 .sequences = Sequences(filling.cu),
                                                 .log_pruning_tolerance = tolerance,
                                                 .score_bounds = bounds,
                                                 .o = o.view(),
                                                 .lse = lse.view(),
                                                 .d_o = d_o.view(),
                                                 .dq = dq.view(),
                                                 .dk = dk.view(),
                                                 .dv = dv.view(),
                                                 .dlog_gates = dgates.view()});
      };
      const double alone = median_seconds(ctx, runs, forward);
      const double both = median_seconds(ctx, runs, [&] {
        forward();
        backward();
      });
      nlohmann::json& row = result[pruned ? "pruned" : "full"];
      row["forward_seconds"] = alone;
      row["forward_backward_seconds"] = both;
      if (pruned) continue;
      const double product = static_cast<double>(tokens) * static_cast<double>(tokens + 1) *
                             static_cast<double>(heads * dim);
      row["forward_flops_per_second"] = 2 * product / alone;
      row["forward_backward_flops_per_second"] = 7 * product / both;
    }
    result["append_seconds"] = median_seconds(ctx, runs, [&] { filling.append(ctx); });
    result["one_token_seconds"] = forward_seconds(ctx, numbers, filling, runs, true);
  }
  {
    Filling filling(ctx, numbers, 1, tokens, heads, dim, false);
    result["no_gates"]["forward_seconds"] = forward_seconds(ctx, numbers, filling, runs, false);
    result["no_gates"]["append_seconds"] = median_seconds(ctx, runs, [&] { filling.append(ctx); });
  }
  {
    const Filling filling(ctx, numbers, 1, tokens, heads, dim, false, 2048);
    result["window_2048"]["forward_seconds"] = forward_seconds(ctx, numbers, filling, runs, false);
  }
  {
    constexpr std::int64_t kBatch = 8;
    const Filling filling(ctx, numbers, kBatch, std::max<std::int64_t>(1, tokens / kBatch), heads,
                          dim, true);
    result["one_token_of_8_seconds"] = forward_seconds(ctx, numbers, filling, runs, true);
  }
  {
    Context exact(threads, Device::kCuda, DType::kF32);
    const Filling filling(exact, numbers, 1, std::min<std::int64_t>(tokens, 4096), heads, dim,
                          true);
    result["float32"]["tokens"] = filling.cu.back();
    result["float32"]["forward_seconds"] = forward_seconds(exact, numbers, filling, runs, false);
  }
  return result;
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const int tokens = argument(1, 16384);
  const int heads = argument(2, 24);
  const int dim = argument(3, 64);
  nlohmann::json result = deltafox::measure(tokens, heads, dim, argument(4, 9));
  result["tokens"] = tokens;
  result["heads"] = heads;
  result["head_size"] = dim;
  std::puts(result.dump(2).c_str());
}
