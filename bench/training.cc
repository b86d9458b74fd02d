// One forward and backward pass of a model of the paper with random weights in float32, beside the
// peak of this machine's float32 arithmetic. Prints JSON: seconds, tokens/s, FLOP/s counting 6 for
// each token and parameter but the embedding's, and their share of the peak; medians of the runs.
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
#include "ops/peak_rate.h"

namespace deltafox {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

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
  const double flops = 6.0 * static_cast<double>(parameters) * static_cast<double>(tokens);
  constexpr int kWarmUps = 2;  // scratch memory grows in the first, and is one piece from then on
  std::vector<double> seconds;
  std::vector<double> peaks;
  std::vector<double> shares;
  for (int r = 0; r < kWarmUps + runs; ++r) {
    // Machines change their pace: a peak beside each run.
    const double peak = r >= kWarmUps ? cpu::measure_float32_peak(threads) : 0;
    const auto begin = std::chrono::steady_clock::now();
    model.forward_backward(ctx, ids, Sequences(cu_seqlens), ids, 1 / static_cast<float>(tokens),
                           loss, gradients, {.recompute = recompute});
    if (r < kWarmUps) continue;
    seconds.push_back(seconds_since(begin));
    peaks.push_back(peak);
    shares.push_back(peak > 0 ? flops / seconds.back() / peak : 0);
  }
  const nlohmann::ordered_json report{
      {"model", name},
      {"parameters_but_embedding", parameters},
      {"tokens", tokens},
      {"threads", threads.size()},
      {"recompute", recompute},
      {"runs", runs},
      {"seconds", median(seconds)},
      {"seconds_of_each", seconds},
      {"tokens_per_second", static_cast<double>(tokens) / median(seconds)},
      {"flops_per_second", flops / median(seconds)},
      {"peak_of_each", peaks},
      {"share_of_peak", median(shares)},
      {"share_of_each", shares},
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
