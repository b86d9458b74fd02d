// One forward and backward pass of a model of the paper with random weights in float32, and the
// peak of this machine's float32 arithmetic. Prints JSON: seconds (median of the runs), tokens/s,
// FLOP/s counting 6 for each parameter but the embedding's and token, and their share of the peak.
//
//   bench_training [MODEL [TOKENS [RUNS [THREADS [recompute]]]]]
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>

#include "core/context.h"
#include "io/json.h"
#include "model/gradients.h"
#include "model/registry.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace deltafox {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

#if defined(__x86_64__)
// FLOPs of a loop of independent multiply-adds that touches no memory.
__attribute__((target("avx512f"))) double multiply_adds() {
  constexpr std::int64_t kSteps = 2'000'000;
  __m512 sums[16] = {};
  const __m512 factor = _mm512_set1_ps(0.999F);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    for (__m512& sum : sums) {
      sum = _mm512_fmadd_ps(sum, factor, factor);
      asm volatile("" : "+v"(sum));
    }
  }
  return kSteps * 16 * 16 * 2.0;
}

// FLOP/s of all threads together, the best of three; 0 without AVX-512.
double measure_peak(ThreadPool& threads) {
  double best = 0;
  for (int run = 0; __builtin_cpu_supports("avx512f") && run < 3; ++run) {
    std::vector<double> flops(static_cast<std::size_t>(threads.size()));
    const auto begin = std::chrono::steady_clock::now();
    threads.parallel_for(threads.size(), [&](std::int64_t i) {
      flops[static_cast<std::size_t>(i)] = multiply_adds();
    });
    const double all = flops[0] * threads.size();
    best = std::max(best, all / seconds_since(begin));
  }
  return best;
}
#else
double measure_peak(ThreadPool&) {
  return 0;
}
#endif

// Weights that keep activations of order one.
std::vector<Tensor> random_weights(CausalLM& model) {
  std::vector<Tensor> weights;
  std::mt19937 random(0);
  std::uniform_real_distribution<float> draw(-0.04F, 0.04F);
  model.visit_params([&](const std::string&, Param& param) {
    Tensor& tensor = weights.emplace_back(DType::kF32, param.shape);
    for (std::int64_t i = 0; i < param.shape.size(); ++i) tensor.f32()[i] = draw(random);
    param.value = std::as_const(tensor).view();
  });
  return weights;
}

void run(const std::string& name, std::int64_t tokens, int runs, int num_threads, bool recompute) {
  ThreadPool threads(num_threads);
  Context ctx(threads);
  const double peak = measure_peak(threads);
  CausalLM model = build_model(io::JsonObject::parse(preset_config(name), name));
  const std::vector<Tensor> weights = random_weights(model);
  Gradients gradients(model);
  std::int64_t parameters = 0;
  for (const Gradients::Entry& entry : gradients.entries()) {
    if (entry.name != model.config().names.embeddings) parameters += entry.param->shape.size();
  }
  std::mt19937 random(0);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
  for (std::int32_t& id : ids) {
    id =
        static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(model.config().vocab_size));
  }
  const std::vector<std::int64_t> cu_seqlens{0, tokens};
  std::vector<float> loss(ids.size());
  std::vector<double> seconds;
  for (int r = 0; r <= runs; ++r) {  // the first is a warm-up
    const auto begin = std::chrono::steady_clock::now();
    model.forward_backward(ctx, ids, Sequences(cu_seqlens), ids, 1 / static_cast<float>(tokens),
                           loss, gradients, {.recompute = recompute});
    if (r > 0) seconds.push_back(seconds_since(begin));
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const double flops = 6.0 * static_cast<double>(parameters) * static_cast<double>(tokens) / median;
  const nlohmann::ordered_json report{
      {"model", name},
      {"parameters_but_embedding", parameters},
      {"tokens", tokens},
      {"threads", threads.size()},
      {"recompute", recompute},
      {"runs", runs},
      {"seconds", median},
      {"seconds_best", seconds.front()},
      {"tokens_per_second", static_cast<double>(tokens) / median},
      {"gflops", flops / 1e9},
      {"peak_gflops", peak / 1e9},
      {"share_of_peak", peak > 0 ? flops / peak : 0},
      {"scratch_bytes", ctx.scratch().capacity()},
  };
  fmt::print("{}\n", report.dump(2));
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  const auto number = [&](int i, int otherwise) {
    return argc > i ? std::atoi(argv[i]) : otherwise;
  };
  const bool recompute = argc > 5 && std::string(argv[5]) == "recompute";
  deltafox::run(argc > 1 ? argv[1] : "delta_net-125m", std::max(1, number(2, 2048)),
                std::max(1, number(3, 3)), number(4, 0), recompute);
}
