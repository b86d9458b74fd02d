// Training steps of a model of the paper with random weights: forward, backward and AdamW. Prints
// JSON: seconds, tokens/s, FLOP/s counting 6 for each token and parameter but the embedding's,
// medians of the runs, and memory; on a CPU beside the peak of the machine's arithmetic. As with
// bf16-mixed: products are bfloat16 on a GPU and on a CPU that has fast ones, else float32.
//
//   bench_training [MODEL [TOKENS [RUNS [THREADS]]]] [recompute] [cuda] [float32] [ops] [products]
//                  [sequences=N]
//
// sequences: TOKENS fall into N of one length. ops: one step more, with the time of each op, on a
// GPU with a wait behind each. products, on a GPU: FLOP/s of the products with each shape of
// weights.
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
#include "ops/linear.h"
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
  DType dtype = DType::kBF16;  // of products
  bool recompute = false;
  bool ops = false;
  bool products = false;
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
        parameters_(ctx_, preset_config(options.model), {}, options.dtype),
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

// Of y = x wᵀ, of the same added to a float32 stream, and of both gradients.
nlohmann::ordered_json product_rates(Training& training, std::int64_t tokens) {
  constexpr int kRuns = 10;
  Context& ctx = training.ctx();
  nlohmann::ordered_json report = nlohmann::ordered_json::array();
  std::vector<Shape> seen;
  for (const train::Parameters::Entry& entry : training.parameters().entries()) {
    const Shape shape = entry.param->shape;  // [N, K]
    if (!entry.param->is_matrix || std::find(seen.begin(), seen.end(), shape) != seen.end())
      continue;
    seen.push_back(shape);
    ScratchScope scratch(ctx);
    const ConstTensorView w = entry.param->value;
    const TensorView x = scratch.activation({tokens, shape[1]});
    const TensorView y = scratch.activation({tokens, (shape[0] + 7) / 8 * 8});
    const TensorView stream = scratch.tensor({tokens, shape[0]});
    const TensorView dw = scratch.tensor(shape);
    ctx.zero(x.data, bytes_of(x.dtype, x.shape));
    ctx.zero(y.data, bytes_of(y.dtype, y.shape));
    const auto rate = [&](const auto& product) {
      product();
      ctx.synchronize();
      const auto begin = std::chrono::steady_clock::now();
      for (int r = 0; r < kRuns; ++r) product();
      ctx.synchronize();
      return 2.0 * static_cast<double>(shape.size() * tokens) * kRuns / seconds_since(begin);
    };
    const auto forward = [&](const TensorView& to, bool accumulate) {
      return rate([&] { ops::linear(ctx, {.x = x, .w = w, .y = to, .accumulate = accumulate}); });
    };
    const auto backward = [&](const TensorView& dx, const TensorView& d_weight) {
      return rate(
          [&] { ops::linear_backward(ctx, {.dy = y, .x = x, .w = w, .dx = dx, .dw = d_weight}); });
    };
    report.push_back({{"parameter", entry.name},
                      {"shape", {shape[0], shape[1]}},
                      {"forward", forward(y, false)},
                      {"forward_added", forward(stream, true)},
                      {"dx", backward(x, {})},
                      {"dw", backward({}, dw)}});
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
        r >= kWarmUps && !on_gpu ? cpu::measure_peak(training.threads(), options.dtype) : 0;
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
      {"dtype", name_of(options.dtype)},
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
  if (options.products && on_gpu) report["products"] = product_rates(training, options.tokens);
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
    } else if (argument == "products") {
      options.products = true;
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
  if (options.device == Device::kCpu && !cpu::has_fast_bf16_products()) {
    options.dtype = DType::kF32;
  }
  return options;
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  deltafox::run(deltafox::parse({argv + 1, static_cast<std::size_t>(argc - 1)}));
}
