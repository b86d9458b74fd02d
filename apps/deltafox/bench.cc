// deltafox bench: what the machine can do, and what a model gets out of it.
#include "bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <map>

#include "commands.h"

namespace deltafox::app {

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

std::string processor_name() {
  std::map<std::string, std::string> fields;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line) && !line.empty();) {  // of the first core
    const std::size_t colon = line.find(':');
    const std::size_t value = line.find_first_not_of(" \t", colon + 1);
    if (colon == std::string::npos || value == std::string::npos) continue;
    fields[line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1)] = line.substr(value);
  }
  if (!fields.contains("model name")) return "unknown";
  if (!fields.contains("cpu family") || !fields.contains("model")) return fields["model name"];
  return fmt::format("{} (family {}, model {})", fields["model name"], fields["cpu family"],
                     fields["model"]);
}

void add_bench(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure this machine, or a model on it");
  command->require_subcommand(1);
  add_bench_machine(*command);
  add_bench_model(*command);
  command->footer(
      "Examples:\n"
      "  deltafox bench machine --json\n"
      "  deltafox bench model --model DIR --dtype bfloat16 --prompt 512 --gen 64");
}

}  // namespace deltafox::app
