// deltafox bench machine: the limits that decoding (memory) and prefill (arithmetic) come up
// against.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "bench.h"
#include "core/error.h"
#include "core/read_bandwidth.h"
#include "ops/peak_rate.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct BenchMachineCommand {
  int threads = 0;
  int passes = 7;
  int megabytes = 1024;
  bool json = false;

  void run() const;
};

struct Limits {
  int threads = 0;
  std::vector<double> read;  // bytes per second of each pass
  std::vector<cpu::PeakRate> peaks;
};

// 1, 2, 4, ... and the number itself.
std::vector<int> thread_counts(int most) {
  std::vector<int> counts;
  for (int n = 1; n < most; n *= 2) counts.push_back(n);
  counts.push_back(most);
  return counts;
}

nlohmann::ordered_json summary(const std::vector<double>& rates) {
  if (rates.empty()) return nullptr;
  return {{"median", median(rates)},
          {"least", *std::min_element(rates.begin(), rates.end())},
          {"greatest", *std::max_element(rates.begin(), rates.end())}};
}

nlohmann::ordered_json to_json(const Limits& limits) {
  nlohmann::ordered_json peaks = nlohmann::ordered_json::array();
  for (const cpu::PeakRate& peak : limits.peaks) {
    peaks.push_back({{"dtype", peak.dtype},
                     {"instruction", peak.instruction},
                     {"operations_per_second", summary(peak.rates)}});
  }
  return {{"threads", limits.threads},
          {"read_bytes_per_second", summary(limits.read)},
          {"peaks", peaks}};
}

std::string to_text(const Limits& limits) {
  std::string text =
      fmt::format("{} thread{}\n  {:<30}{:>10.1f} GB/s\n", limits.threads,
                  limits.threads == 1 ? "" : "s", "memory read", median(limits.read) / 1e9);
  for (const cpu::PeakRate& peak : limits.peaks) {
    const std::string name = fmt::format("{}, {}", peak.dtype, peak.instruction);
    text += peak.rates.empty()
                ? fmt::format("  {:<30} not available\n", name)
                : fmt::format("  {:<30}{:>10.1f} G{}/s\n", name, median(peak.rates) / 1e9,
                              peak.dtype == "int8" ? "OP" : "FLOP");
  }
  return text;
}

void BenchMachineCommand::run() const {
  const auto within = [](const char* option, int value, int max) {
    if (value < 1 || value > max) fail("{}: must be in [1, {}], got {}", option, max, value);
  };
  within("--runs", passes, 1000);
  within("--megabytes", megabytes, 1 << 20);
  const int most = threads > 0 ? threads : available_cores();
  const ReadBandwidth memory(static_cast<std::size_t>(megabytes) << 20);
  std::vector<Limits> all;
  for (const int count : thread_counts(most)) {
    ThreadPool pool(count);
    Limits limits{.threads = count, .read = memory.measure(pool, passes), .peaks = {}};
    limits.peaks = cpu::measure_peak_rates(pool, passes);
    all.push_back(std::move(limits));
  }
  const std::vector<std::string_view> sets = cpu::instruction_sets();
  if (json) {
    nlohmann::ordered_json limits = nlohmann::ordered_json::array();
    for (const Limits& one : all) limits.push_back(to_json(one));
    return print_json({{"cpu", processor_name()},
                       {"cores", available_cores()},
                       {"instruction_sets", sets},
                       {"runs", passes},
                       {"limits", limits}});
  }
  std::string text = fmt::format("{}, {} cores\ninstruction sets: {}\n", processor_name(),
                                 available_cores(), fmt::join(sets, ", "));
  for (const Limits& one : all) text += "\n" + to_text(one);
  write_stdout(text);
}

}  // namespace

void add_bench_machine(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand(
      "machine", "Measure how fast this machine reads memory, multiplies and adds");
  const auto options = std::make_shared<BenchMachineCommand>();
  command
      ->add_option("--threads", options->threads,
                   "Measure 1, 2, 4, ... up to so many threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--runs", options->passes, "Passes; medians are shown")
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--megabytes", options->megabytes, "Memory to read")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print JSON, with least and greatest figures");
  command->footer(
      "A multiplication and an addition are two operations.\n\n"
      "Example:\n"
      "  deltafox bench machine --threads 2");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
