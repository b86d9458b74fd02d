// deltafox bench: how fast a model reads a prompt and writes tokens on this machine, and how much
// of the memory's bandwidth that takes.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <random>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "core/read_bandwidth.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

constexpr std::size_t kBandwidthBytes = std::size_t{512} << 20;

struct BenchCommand {
  ModelOptions model_options;
  std::int64_t prompt = 512;
  std::int64_t generated = 64;
  std::int64_t batch = 1;
  int runs = 5;
  bool json = false;

  void run() const;
  void check() const;
};

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

struct Timings {
  std::vector<double> prefill;  // seconds of each run
  std::vector<double> decode;
};

// Ids are random: what they are makes no difference to the speed.
Timings measure(const Model& model, const BenchCommand& options) {
  const auto batch = static_cast<std::size_t>(options.batch);
  const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
  std::mt19937 random(0);
  std::vector<std::int32_t> ids(batch * static_cast<std::size_t>(options.prompt));
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % vocab);
  std::vector<std::int64_t> cu_seqlens;
  for (std::int64_t b = 0; b <= options.batch; ++b) cu_seqlens.push_back(b * options.prompt);
  std::vector<float> logits(batch * vocab);

  Timings timings;
  for (int run = -1; run < options.runs; ++run) {  // the first one warms up
    std::vector<State> states(batch, model.new_state());
    std::vector<State*> pointers;
    pointers.reserve(batch);
    for (State& state : states) pointers.push_back(&state);
    const double prefill = seconds_of([&] { model.forward({ids, cu_seqlens}, pointers, logits); });
    const double decode = seconds_of([&] {
      for (std::int64_t t = 0; t < options.generated; ++t) {
        model.step(std::span(ids).first(batch), pointers, logits);
      }
    });
    if (run < 0) continue;
    timings.prefill.push_back(prefill);
    timings.decode.push_back(decode);
  }
  return timings;
}

void BenchCommand::check() const {
  const auto within = [](const char* option, std::int64_t value, std::int64_t max) {
    if (value < 1 || value > max) fail("{}: must be in [1, {}], got {}", option, max, value);
  };
  within("--prompt", prompt, std::int64_t{1} << 24);
  within("--gen", generated, std::int64_t{1} << 24);
  within("--batch", batch, 1 << 16);
  within("--runs", runs, 1000);
}

void BenchCommand::run() const {
  check();
  const Model model = model_options.load(model_options.directory());
  const ModelInfo& info = model.info();
  int threads = 0;
  double bandwidth = 0;
  {
    ThreadPool pool(model_options.threads());  // gone before the model's own works
    threads = pool.size();
    bandwidth = measure_read_bandwidth(pool, kBandwidthBytes);
  }
  const Timings timings = measure(model, *this);

  const double prefill = median(timings.prefill);
  const double decode = median(timings.decode);
  const double prefill_rate = static_cast<double>(batch * prompt) / prefill;
  const double decode_rate = static_cast<double>(batch * generated) / decode;
  // Every step also reads and writes each sequence's state.
  const std::int64_t step_bytes = info.step_weight_bytes + 2 * batch * info.state_bytes;
  const double decode_bandwidth = static_cast<double>(step_bytes * generated) / decode;
  const std::string dtype =
      model_options.dtype() ? std::string(torch_name(*model_options.dtype())) : "as stored";
  if (json) {
    return print_json({{"model", info.directory},
                       {"parameters", info.num_parameters},
                       {"dtype", dtype},
                       {"threads", threads},
                       {"prompt", prompt},
                       {"gen", generated},
                       {"batch", batch},
                       {"runs", runs},
                       {"prefill_tokens_per_second", prefill_rate},
                       {"decode_tokens_per_second", decode_rate},
                       {"prefill_seconds", timings.prefill},
                       {"decode_seconds", timings.decode},
                       {"bytes_per_step", step_bytes},
                       {"decode_bytes_per_second", decode_bandwidth},
                       {"read_bytes_per_second", bandwidth},
                       {"bandwidth_share", decode_bandwidth / bandwidth}});
  }
  write_stdout(fmt::format(
      "model      {}, {} parameters, {}\n"
      "threads    {}\n"
      "prefill    {:.1f} tokens/s  ({} x {} tokens, median of {})\n"
      "decode     {:.1f} tokens/s  ({} x {} tokens, median of {})\n"
      "bandwidth  {}/s read by decode, {:.0f}% of the {}/s that reading memory reaches\n",
      info.directory, format_count(info.num_parameters), dtype, threads, prefill_rate, batch,
      prompt, runs, decode_rate, batch, generated, runs, format_bytes(decode_bandwidth),
      100 * decode_bandwidth / bandwidth, format_bytes(bandwidth)));
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("bench", "Measure prefill and decode speed, and the memory bandwidth");
  const auto options = std::make_shared<BenchCommand>();
  options->model_options.add(*command);
  const auto number = [&](const char* name, auto& value, const char* help) {
    command->add_option(name, value, help)->type_name("N")->capture_default_str();
  };
  number("--prompt", options->prompt, "Tokens of each prompt");
  number("--gen", options->generated, "Steps of decoding after it");
  number("--batch", options->batch, "Sequences at a time");
  number("--runs", options->runs, "Runs, after one to warm up; the median is shown");
  command->add_flag("--json", options->json, "Print JSON, with the time of each run");
  command->footer(
      "Example:\n"
      "  deltafox bench --model DIR --dtype bfloat16 --threads 8 --prompt 512 --gen 64");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
