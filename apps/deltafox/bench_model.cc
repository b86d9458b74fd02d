// deltafox bench model: how fast a model reads prompts and writes tokens behind them, and how much
// of the memory's bandwidth the latter takes. Bandwidth changes from minute to minute on a shared
// machine, so it is measured right before and after each run of decoding.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <random>

#include "bench.h"
#include "common.h"
#include "core/device.h"
#include "core/error.h"
#include "core/op_times.h"
#include "core/read_bandwidth.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 24;
constexpr std::int64_t kMaxBatch = 1 << 16;
constexpr int kBandwidthPasses = 3;  // of a reading

// Sequences of the same length at a time.
struct Case {
  std::int64_t prompt = 0;
  std::int64_t batch = 1;
};

struct BenchModelCommand {
  ModelOptions model_options;
  std::vector<std::int64_t> prompts{512};
  std::vector<std::int64_t> batches{1};
  std::int64_t generated = 64;
  int runs = 5;
  int prefill_runs = 0;
  bool json = false;

  void run() const;
  void check() const;
};

double seconds_of(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Measured {
  Case of;
  std::vector<double> prefill;    // seconds of each run; empty without a prompt
  std::vector<double> decode;     // the same; empty where nothing is generated
  std::vector<double> bandwidth;  // bytes per second, around each run of decoding
  std::int64_t step_bytes = 0;    // that a step of decoding must move
  std::vector<OpTime> ops;        // of all runs of prefill
};

// One case's sequences, on random ids: what they are makes no difference to the speed.
class Sequences {
 public:
  Sequences(const Model& model, const Case& of, Device device)
      : model_(model),
        of_(of),
        device_(device),
        ids_(static_cast<std::size_t>(of.batch * (of.prompt + 1))) {
    const auto vocab = static_cast<std::uint32_t>(model.info().vocab_size);
    std::mt19937 random(0);
    for (std::int32_t& id : ids_) id = static_cast<std::int32_t>(random() % vocab);
    logits_.resize(static_cast<std::size_t>(of.batch) * vocab);
  }

  void forget() {
    // Each made anew: copies would still be under way on a GPU when the clock starts.
    states_.clear();
    for (std::int64_t b = 0; b < of_.batch; ++b) states_.push_back(model_.new_state());
    pointers_.clear();
    for (State& state : states_) pointers_.push_back(&state);
  }
  void read(std::int64_t tokens) {
    std::vector<std::int64_t> cu_seqlens;
    for (std::int64_t b = 0; b <= of_.batch; ++b) cu_seqlens.push_back(b * tokens);
    const auto total = static_cast<std::size_t>(of_.batch * tokens);
    model_.forward({std::span(ids_).first(total), cu_seqlens}, pointers_, logits_);
  }
  void step(std::int64_t steps) {
    const auto batch = static_cast<std::size_t>(of_.batch);
    if (device_ == Device::kCuda) {
      return model_.greedy(std::span(ids_).first(batch), pointers_, steps, {});
    }
    for (std::int64_t t = 0; t < steps; ++t) {
      model_.step(std::span(ids_).first(batch), pointers_, logits_);
    }
  }

  const std::vector<State>& states() const { return states_; }
  // In place: what steps point at stays where it is.
  void return_to(const std::vector<State>& earlier) {
    std::copy(earlier.begin(), earlier.end(), states_.begin());
  }

  // Every weight but an embedding that is looked up; a state of fixed size read and written; keys
  // and values read.
  std::int64_t step_bytes() const {
    std::int64_t bytes = model_.info().step_weight_bytes;
    for (const State& state : states_) {
      bytes += static_cast<std::int64_t>(state.bytes()) + model_.info().state_bytes;
    }
    return bytes;
  }

 private:
  const Model& model_;
  Case of_;
  Device device_;  // on a GPU a step chooses its tokens there
  std::vector<std::int32_t> ids_;
  std::vector<float> logits_;
  std::vector<State> states_;
  std::vector<State*> pointers_;
};

Measured measure(const Model& model, const Case& of, const BenchModelCommand& options,
                 const ReadBandwidth& memory, ThreadPool& pool) {
  constexpr std::int64_t kWarmUp = 1024;  // longer prompts are read in such pieces
  Measured result{.of = of, .prefill = {}, .decode = {}, .bandwidth = {}, .ops = {}};
  Sequences sequences(model, of, options.model_options.device());
  sequences.forget();
  if (of.prompt > 0) sequences.read(std::min(of.prompt, kWarmUp));
  if (options.generated > 0) sequences.step(1);

  const auto bandwidth = [&] { return median(memory.measure(pool, kBandwidthPasses)); };
  const int prefill_runs = options.prefill_runs > 0 ? options.prefill_runs : options.runs;
  for (int run = 0; run < prefill_runs && of.prompt > 0; ++run) {
    sequences.forget();
    if (run == 0) start_op_times();
    result.prefill.push_back(seconds_of([&] { sequences.read(of.prompt); }));
    if (run == 0) result.ops = stop_op_times();
  }
  if (options.generated == 0) return result;
  if (of.prompt == 0) sequences.forget();
  result.step_bytes = sequences.step_bytes();
  const std::vector<State> behind_the_prompt = sequences.states();
  for (int run = 0; run < options.runs; ++run) {
    sequences.return_to(behind_the_prompt);
    const double before = bandwidth();
    result.decode.push_back(seconds_of([&] { sequences.step(options.generated); }));
    result.bandwidth.push_back((before + bandwidth()) / 2);
  }
  return result;
}

nlohmann::ordered_json to_json(const Measured& measured, std::int64_t generated) {
  const auto [prompt, batch] = measured.of;
  nlohmann::ordered_json json{{"prompt", prompt}, {"batch", batch}};
  if (!measured.prefill.empty()) {
    json["prefill_tokens_per_second"] =
        static_cast<double>(batch * prompt) / median(measured.prefill);
    json["prefill_seconds"] = measured.prefill;
    json["first_prefill_ops"] = nlohmann::ordered_json::array();
    for (const OpTime& time : measured.ops) {
      json["first_prefill_ops"].push_back(
          {{"op", time.op}, {"calls", time.calls}, {"seconds", time.seconds}});
    }
  }
  if (measured.decode.empty()) return json;
  std::vector<double> shares;
  const auto moved = static_cast<double>(measured.step_bytes * generated);
  for (std::size_t run = 0; run < measured.decode.size(); ++run) {
    shares.push_back(moved / measured.decode[run] / measured.bandwidth[run]);
  }
  json["gen"] = generated;
  json["decode_tokens_per_second"] =
      static_cast<double>(batch * generated) / median(measured.decode);
  json["decode_seconds"] = measured.decode;
  json["bytes_per_step"] = measured.step_bytes;
  json["decode_bytes_per_second"] = moved / median(measured.decode);
  json["read_bytes_per_second"] = measured.bandwidth;
  json["bandwidth_shares"] = shares;
  json["bandwidth_share"] = median(shares);
  return json;
}

std::string to_text(const Measured& measured, std::int64_t generated) {
  const nlohmann::ordered_json json = to_json(measured, generated);
  std::string text = fmt::format("\n{} x {} tokens\n", measured.of.batch, measured.of.prompt);
  if (!measured.prefill.empty()) {
    text += fmt::format("  prefill    {:.1f} tokens/s\n",
                        json.at("prefill_tokens_per_second").get<double>());
    for (const OpTime& time : measured.ops) {
      const double share = time.seconds / measured.prefill.front();
      if (share < 0.005) continue;
      text += fmt::format("    {:<24}{:>5.1f}%\n", time.op, 100 * share);
    }
  }
  if (!measured.decode.empty()) {
    text += fmt::format(
        "  decode     {:.1f} tokens/s\n"
        "    {}/s moved, {:.0f}% of the {}/s that reading memory reaches\n",
        json.at("decode_tokens_per_second").get<double>(),
        format_bytes(json.at("decode_bytes_per_second").get<double>()),
        100 * json.at("bandwidth_share").get<double>(), format_bytes(median(measured.bandwidth)));
  }
  return text;
}

void BenchModelCommand::check() const {
  const auto within = [](const char* option, std::int64_t value, std::int64_t min,
                         std::int64_t max) {
    if (value < min || value > max) {
      fail("{}: must be in [{}, {}], got {}", option, min, max, value);
    }
  };
  for (const std::int64_t prompt : prompts) within("--prompt", prompt, 0, kMaxTokens);
  for (const std::int64_t batch : batches) within("--batch", batch, 1, kMaxBatch);
  within("--gen", generated, 0, kMaxTokens);
  within("--runs", runs, 1, 1000);
  within("--prefill-runs", prefill_runs, 0, 1000);
}

void BenchModelCommand::run() const {
  check();
  // What a process pays once, whatever it loads, is timed by itself.
  const double context_seconds =
      model_options.device() == Device::kCuda ? seconds_of([] { cuda::make_stream(); }) : 0;
  std::optional<Model> loaded;
  const double load_seconds =
      seconds_of([&] { loaded.emplace(model_options.load(model_options.directory())); });
  const Model& model = *loaded;
  const ModelInfo& info = model.info();
  const ReadBandwidth memory;
  ThreadPool pool(model_options.threads());  // beside the model's own: its threads sleep meanwhile
  std::vector<Measured> all;
  for (const std::int64_t batch : batches) {
    for (const std::int64_t prompt : prompts) {
      all.push_back(measure(model, {.prompt = prompt, .batch = batch}, *this, memory, pool));
    }
  }

  const std::string dtype =
      model_options.dtype() ? std::string(torch_name(*model_options.dtype())) : "as stored";
  if (json) {
    nlohmann::ordered_json cases = nlohmann::ordered_json::array();
    for (const Measured& one : all) cases.push_back(to_json(one, generated));
    return print_json({{"cpu", processor_name()},
                       {"model", info.directory},
                       {"parameters", info.num_parameters},
                       {"dtype", dtype},
                       {"threads", pool.size()},
                       {"context_seconds", context_seconds},
                       {"load_seconds", load_seconds},
                       {"runs", runs},
                       {"cases", cases}});
  }
  std::string text = fmt::format(
      "{}, {} parameters, {}, {} threads, loaded in {:.3f} s, medians of {} runs\n", info.directory,
      format_count(info.num_parameters), dtype, pool.size(), load_seconds, runs);
  for (const Measured& one : all) text += to_text(one, generated);
  write_stdout(text);
}

}  // namespace

void add_bench_model(CLI::App& bench) {
  CLI::App* command =
      bench.add_subcommand("model", "Measure how fast a model reads prompts and writes tokens");
  const auto options = std::make_shared<BenchModelCommand>();
  options->model_options.add(*command);
  const auto list = [&](const char* name, std::vector<std::int64_t>& values, const char* help) {
    command->add_option(name, values, help)
        ->type_name("N[,N...]")
        ->delimiter(',')
        ->capture_default_str();
  };
  list("--prompt", options->prompts, "Tokens of each prompt; 0: none, to decode from the start");
  command->add_option("--gen", options->generated, "Steps of decoding after each; 0: none")
      ->type_name("N")
      ->capture_default_str();
  list("--batch", options->batches, "Sequences at a time");
  command->add_option("--runs", options->runs, "Runs; medians are shown")
      ->type_name("N")
      ->capture_default_str();
  command
      ->add_option("--prefill-runs", options->prefill_runs,
                   "Runs of reading the prompt, if not as many; 0: as many")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON, with the time of each run");
  command->footer(
      "Examples:\n"
      "  deltafox bench model --model DIR --dtype bfloat16 --threads 8 --prompt 512 --gen 64\n"
      "  deltafox bench model --model DIR --prompt 0,512,16384 --batch 1,16 --json");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
