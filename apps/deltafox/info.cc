// deltafox info: what a checkpoint holds.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>

#include "commands.h"
#include "common.h"
#include "io/safetensors.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

namespace fs = std::filesystem;

struct InfoCommand {
  ModelOptions options;
  bool json = false;

  void run() const;
};

struct File {
  std::string name;
  std::uintmax_t bytes;
};

std::vector<File> files_of(const std::string& directory) {
  std::vector<File> files;
  for (const auto& entry : fs::directory_iterator(directory)) {
    std::error_code error;
    if (!entry.is_regular_file(error)) continue;
    const std::uintmax_t bytes = entry.file_size(error);
    if (!error) files.push_back({entry.path().filename().string(), bytes});
  }
  std::sort(files.begin(), files.end(),
            [](const File& a, const File& b) { return a.name < b.name; });
  return files;
}

// The dtypes of the stored tensors, by the number of bytes in each, most first: "F32".
std::vector<std::string> stored_dtypes(const std::string& directory) {
  const io::Checkpoint checkpoint = io::Checkpoint::open(directory);
  std::map<std::string, std::size_t> bytes;
  for (const std::string& name : checkpoint.names()) {
    const io::TensorEntry& tensor = *checkpoint.find(name);
    bytes[std::string(tensor.dtype_name)] += tensor.bytes;
  }
  std::vector<std::string> names;
  names.reserve(bytes.size());
  for (const auto& [name, count] : bytes) names.push_back(name);
  std::stable_sort(names.begin(), names.end(), [&](const std::string& a, const std::string& b) {
    return bytes.at(a) > bytes.at(b);
  });
  return names;
}

nlohmann::ordered_json or_null(const std::optional<std::int32_t>& id) {
  return id ? nlohmann::ordered_json(*id) : nlohmann::ordered_json();
}

void InfoCommand::run() const {
  const std::string directory = options.directory();
  const Model model = options.load(directory);
  const ModelInfo& info = model.info();
  const std::vector<std::string> dtypes = stored_dtypes(directory);
  const std::vector<File> files = files_of(directory);
  if (json) {
    nlohmann::ordered_json sizes = nlohmann::ordered_json::object();
    for (const File& file : files) sizes[file.name] = file.bytes;
    return print_json(
        {{"directory", info.directory},
         {"model_type", info.model_type},
         {"vocab_size", info.vocab_size},
         {"hidden_size", info.hidden_size},
         {"num_hidden_layers", info.num_hidden_layers},
         {"parameters", info.num_parameters},
         {"non_embedding_parameters", info.num_non_embedding_parameters},
         {"stored_dtypes", dtypes},
         {"weight_bytes", info.weight_bytes},
         {"state_bytes", info.state_bytes},
         {"bos_token_id", or_null(info.bos_token_id)},
         {"eos_token_ids", info.eos_token_ids},
         {"pad_token_id", or_null(info.pad_token_id)},
         {"random_weights", info.random_weights},
         {"files", sizes},
         {"config", nlohmann::ordered_json::parse(info.config_json, nullptr, false)}});
  }
  std::string text;
  const auto line = [&](const char* label, const std::string& value) {
    text += fmt::format("{:<22}{}\n", label, value);
  };
  line("directory", info.directory);
  line("model type", info.model_type);
  line("parameters", format_count(info.num_parameters));
  line("  without embedding", format_count(info.num_non_embedding_parameters));
  line("layers", std::to_string(info.num_hidden_layers));
  line("hidden size", std::to_string(info.hidden_size));
  line("vocabulary", std::to_string(info.vocab_size));
  line("stored as", fmt::format("{}", fmt::join(dtypes, ", ")));
  line("memory of weights", format_bytes(static_cast<double>(info.weight_bytes)));
  line("memory of a state", format_bytes(static_cast<double>(info.state_bytes)));
  line("weights", info.random_weights ? "random, never trained" : "trained");
  for (const File& file : files) {
    line(&file == files.data() ? "files" : "",
         fmt::format("{:<26} {:>10}", file.name, format_bytes(static_cast<double>(file.bytes))));
  }
  write_stdout(text);
}

}  // namespace

void add_info(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("info", "Show a checkpoint's model, sizes, memory and files");
  const auto options = std::make_shared<InfoCommand>();
  options->options.add(*command);
  command->add_flag("--json", options->json, "Print JSON, with the whole config.json");
  command->footer(
      "The memory of weights is that with the given --dtype. Every tensor is checked against the\n"
      "config.\n\n"
      "Example:\n"
      "  deltafox info --model DIR --dtype bfloat16");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
