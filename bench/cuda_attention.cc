// Forgetting attention of bfloat16 on a GPU: one sequence, forward alone and with backward, without
// and with pruning; seconds a call, the median of runs of several calls. Prints JSON with the
// FLOP/s of causal attention counted in full (2 products forward, 5 backward) for what is not
// pruned.
//
//   bench_cuda_attention [TOKENS [HEADS [HEAD_SIZE [RUNS]]]]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
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

nlohmann::json measure(std::int64_t tokens, std::int64_t heads, std::int64_t dim, int runs) {
  ThreadPool threads(1);
  Context ctx(threads, Device::kCuda, DType::kBF16);
  // Elements of one table of normal numbers, of a prime size.
  std::vector<float> table(65521);
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (float& x : table) x = normal(random);
  std::size_t next = 0;
  // Gates σ(4 + x/10), as with a bias of 4 at the beginning of training.
  const auto draw = [&](const Shape& shape, DType dtype, bool log_gates) {
    Tensor host(DType::kF32, shape);
    for (std::int64_t i = 0; i < shape.size(); ++i) {
      const float x = table[(next += 7919) % table.size()];
      host.f32()[i] = log_gates ? -std::log1p(std::exp(-(4 + 0.1F * x))) : x;
    }
    return on_gpu(host, dtype);
  };
  const Shape shape{tokens, heads, dim};
  const Tensor q = draw(shape, DType::kBF16, false);
  const Tensor k = draw(shape, DType::kBF16, false);
  const Tensor v = draw(shape, DType::kBF16, false);
  const Tensor d_o = draw(shape, DType::kBF16, false);
  const Tensor gates = draw({tokens, heads}, DType::kF32, true);
  const std::vector<std::int64_t> cu{0, tokens};
  KvCache cache({.kv_heads = heads,
                 .head_dim = dim,
                 .gate_heads = heads,
                 .device = Device::kCuda,
                 .dtype = DType::kBF16});
  cache.extend(tokens);
  KvCache* const writable[] = {&cache};
  const KvCache* const readable[] = {&cache};
  ops::kv_append(ctx, {.k = k.view(),
                       .v = v.view(),
                       .log_gates = gates.view(),
                       .sequences = Sequences(cu),
                       .caches = writable});
  Tensor o(DType::kBF16, shape, Device::kCuda);
  Tensor lse(DType::kF32, {tokens, heads}, Device::kCuda);
  Tensor dq(DType::kBF16, shape, Device::kCuda);
  Tensor dk(DType::kBF16, shape, Device::kCuda);
  Tensor dv(DType::kBF16, shape, Device::kCuda);
  Tensor dgates(DType::kF32, {tokens, heads}, Device::kCuda);
  nlohmann::json result;
  // A threshold of δ = −40 for every query, but for ln(i + 1), which the tolerance makes up for at
  // the last one.
  const std::vector<float> bounds(static_cast<std::size_t>(heads), 0.0F);
  for (const bool pruned : {false, true}) {
    std::optional<float> tolerance;
    if (pruned) tolerance = -40 + std::log(static_cast<float>(tokens));
    const auto forward = [&] {
      ops::forgetting_attention(ctx, {.q = q.view(),
                                      .sequences = Sequences(cu),
                                      .caches = readable,
                                      .log_pruning_tolerance = tolerance,
                                      .score_bounds = bounds,
                                      .o = o.view(),
                                      .lse = lse.view()});
    };
    const auto backward = [&] {
      ops::forgetting_attention_backward(ctx, {.q = q.view(),
                                               .k = k.view(),
                                               .v = v.view(),
                                               .log_gates = gates.view(),
                                               .sequences = Sequences(cu),
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
    const double forward_seconds = median_seconds(ctx, runs, forward);
    const double seconds = median_seconds(ctx, runs, [&] {
      forward();
      backward();
    });
    nlohmann::json& row = result[pruned ? "pruned" : "full"];
    row["forward_seconds"] = forward_seconds;
    row["forward_backward_seconds"] = seconds;
    if (pruned) continue;
    const double product = static_cast<double>(tokens) * static_cast<double>(tokens + 1) *
                           static_cast<double>(heads * dim);
    row["forward_flops_per_second"] = 2 * product / forward_seconds;
    row["forward_backward_flops_per_second"] = 7 * product / seconds;
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
