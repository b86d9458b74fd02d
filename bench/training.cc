// Training steps of a model of the paper with random weights: forward, backward and AdamW. Prints
// JSON: seconds, tokens/s, FLOP/s counting 6 for each token and parameter but the embedding's,
// medians of the runs, and memory. On a CPU in float32 beside the peak of the machine's float32
// arithmetic, on a GPU as with bf16-mixed.
//
//   bench_training [MODEL [TOKENS [RUNS [THREADS]]]] [recompute] [cuda] [float32] [ops]
//   [sequences=N]
//
// sequences: TOKENS fall into N of one length. ops: one step more, with the time of each op, on a
// GPU with a wait behind each.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>

#include "core/context.h"
#include "core/op_times.h"
#include "model/gradients.h"
#include "model/registry.h"
#include "ops/peak_rate.h"
#include "train/parameters.h"

namespace deltafox {
namespace {

struct Options {
  std::string model = "delta_net-125m";
  std::int64_t tokens = 2048;
  int runs = 3;
  int threads = 0;
  std::int64_t sequences = 1;
  Device device = Device::kCpu;
  DType dtype = DType::kBF16;  // of a GPU's products
  bool recompute = false;
  bool ops = false;
};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One window of random ids, trained on again and again.
class Training {
 public:
  explicit Training(const Options& options)
      : options_(options),
        threads_(options.threads),
        ctx_(threads_, options.device,
             options.device == Device::kCuda ? options.dtype : DType::kF32),
        parameters_(ctx_, preset_config(options.model), {}),
        ids_(DType::kI32, {options.tokens}, options.device),
        loss_(DType::kF32, {options.tokens}, options.device) {
    parameters_.initialise(0);
    std::mt19937 random(0);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(options.tokens));
    const auto vocab = static_cast<std::uint64_t>(parameters_.model().config().vocab_size);
    for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % vocab);
    ids_.read_from(ids.data());
    for (std::int64_t b = 0; b <= options.sequences; ++b) {
      cu_seqlens_.push_back(b * options.tokens / options.sequences);
    }
  }

  void gradients() {
    const std::span<const std::int32_t> ids(static_cast<const std::int32_t*>(ids_.view().data),
                                            static_cast<std::size_t>(options_.tokens));
    parameters_.gradients().zero(ctx_);
    parameters_.model().forward_backward(
        ctx_, ids, Sequences(cu_seqlens_), ids, 1 / static_cast<float>(options_.tokens),
        {loss_.f32(), ids.size()}, parameters_.gradients(), {.recompute = options_.recompute});
    ctx_.synchronize();
  }
  void step() {
    parameters_.step({.lr = 1e-5, .betas = {0.9, 0.95}, .weight_decay = 0.1}, 1e-5, 1, ++steps_);
  }

  Context& ctx() { return ctx_; }
  ThreadPool& threads() { return threads_; }
  const train::Parameters& parameters() const { return parameters_; }

 private:
  Options options_;
  ThreadPool threads_;
  Context ctx_;
  train::Parameters parameters_;
  Tensor ids_, loss_;  // [T]
  std::vector<std::int64_t> cu_seqlens_;
  std::int64_t steps_ = 0;
};

nlohmann::ordered_json op_times(Training& training) {
  start_op_times([&] { training.ctx().synchronize(); });
  training.gradients();
  training.step();
  nlohmann::ordered_json report = nlohmann::ordered_json::array();
  for (const OpTime& time : stop_op_times()) {
    report.push_back({{"op", time.op}, {"calls", time.calls}, {"seconds", time.seconds}});
  }
  return report;
}

void run(const Options& options) {
  Training training(options);
  const bool on_gpu = options.device == Device::kCuda;
  const double flops = 6.0 * static_cast<double>(training.parameters().non_embedding_size()) *
                       static_cast<double>(options.tokens);
  constexpr int kWarmUps = 2;  // scratch memory grows in the first, and is one piece from then on
  std::vector<double> seconds;
  std::vector<double> step_seconds;
  std::vector<double> peaks;
  std::vector<double> shares;
  for (int r = 0; r < kWarmUps + options.runs; ++r) {
    // Machines change their pace: a peak beside each run.
    const double peak =
        r >= kWarmUps && !on_gpu ? cpu::measure_float32_peak(training.threads()) : 0;
    const auto begin = std::chrono::steady_clock::now();
    training.gradients();
    const double of_gradients = seconds_since(begin);
    training.step();
    if (r < kWarmUps) continue;
    seconds.push_back(of_gradients);
    step_seconds.push_back(seconds_since(begin));
    if (on_gpu) continue;
    peaks.push_back(peak);
    shares.push_back(peak > 0 ? flops / of_gradients / peak : 0);
  }
  Context& ctx = training.ctx();
  nlohmann::ordered_json report{
      {"model", options.model},
      {"parameters_but_embedding", training.parameters().non_embedding_size()},
      {"device", name_of(options.device)},
      {"dtype", name_of(ctx.activation_dtype())},
      {"tokens", options.tokens},
      {"sequences", options.sequences},
      {"threads", training.threads().size()},
      {"recompute", options.recompute},
      {"runs", options.runs},
      {"seconds", median(seconds)},
      {"seconds_of_each", seconds},
      {"tokens_per_second", static_cast<double>(options.tokens) / median(seconds)},
      {"flops_per_second", flops / median(seconds)},
      {"step_seconds", median(step_seconds)},
      {"step_tokens_per_second", static_cast<double>(options.tokens) / median(step_seconds)},
      {"scratch_bytes", ctx.scratch().capacity() + (on_gpu ? ctx.tensor_scratch().capacity() : 0)},
      {"kept_bytes", ctx.kept_scratch().capacity()},
  };
  if (on_gpu) {
    report["device_memory_in_use"] = cuda::memory_in_use();
  } else {
    report["peak_of_each"] = peaks;
    report["share_of_peak"] = median(shares);
    report["share_of_each"] = shares;
  }
  if (options.ops) report["ops"] = op_times(training);
  fmt::print("{}\n", report.dump(2));
}

std::int64_t number(std::string_view text, std::int64_t otherwise) {
  std::int64_t value = otherwise;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return std::max<std::int64_t>(1, value);
}

Options parse(std::span<char*> arguments) {
  Options options;
  int place = 0;
  for (const std::string argument : arguments) {
    if (argument == "recompute") {
      options.recompute = true;
    } else if (argument == "cuda") {
      options.device = Device::kCuda;
    } else if (argument == "float32") {
      options.dtype = DType::kF32;
    } else if (argument == "ops") {
      options.ops = true;
    } else if (argument.starts_with("sequences=")) {
      options.sequences = number(argument.substr(argument.find('=') + 1), 1);
    } else if (const int at = place++; at == 0) {
      options.model = argument;
    } else if (at == 1) {
      options.tokens = number(argument, options.tokens);
    } else if (at == 2) {
      options.runs = static_cast<int>(number(argument, options.runs));
    } else {
      options.threads = std::atoi(argument.c_str());
    }
  }
  return options;
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  deltafox::run(deltafox::parse({argv + 1, static_cast<std::size_t>(argc - 1)}));
}
