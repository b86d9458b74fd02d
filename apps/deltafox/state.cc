// deltafox state: what a model remembers of a text, as a file.
#include <fmt/format.h>

#include <array>
#include <charconv>
#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct StateInfoCommand {
  std::string path;
  bool json = false;

  void run() const;
};

struct StateSaveCommand {
  ModelOptions model_options;
  SequenceOptions sequence;
  std::string load;
  std::string output;
  bool json = false;

  void run() const;
};

void StateInfoCommand::run() const {
  const io::SafetensorsFile file = io::SafetensorsFile::open(path);
  const auto value = [&](const char* key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? std::string() : found->second;
  };
  if (value("format") != "deltafox-state") fail("{}: not a deltafox state file", path);
  const std::string text = value("position");
  std::int64_t position = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), position);
  if (error != std::errc() || end != text.data() + text.size()) {
    fail("{}: metadata 'position' must be a count of tokens, got '{}'", path, io::printable(text));
  }
  std::size_t bytes = 0;
  nlohmann::ordered_json tensors = nlohmann::ordered_json::object();
  std::string lines;
  for (const io::TensorEntry& tensor : file.tensors()) {
    bytes += tensor.bytes;
    const nlohmann::ordered_json shape = tensor.shape;
    tensors[tensor.name] = {{"dtype", tensor.dtype_name}, {"shape", shape}};
    lines += fmt::format("  {:<24} {} {}\n", io::printable(tensor.name), tensor.dtype_name,
                         shape.dump());
  }
  if (json) {
    return print_json({{"version", value("version")},
                       {"model", value("model")},
                       {"position", position},
                       {"bytes", bytes},
                       {"tensors", tensors}});
  }
  write_stdout(
      fmt::format("version   {}\nmodel     {}\nposition  {} tokens\nsize      {}\ntensors\n{}",
                  io::printable(value("version")), io::printable(value("model")), position,
                  format_bytes(static_cast<double>(bytes)), lines));
}

void StateSaveCommand::run() const {
  const std::string directory = model_options.directory();
  const Model model = model_options.load(directory);
  const std::vector<std::int32_t> ids = sequence.ids(directory);
  State state = load.empty() ? model.new_state() : model.load_state(load);
  State* const pointer = &state;
  const std::array<std::int64_t, 2> cu_seqlens{0, std::ssize(ids)};
  model.forward({ids, cu_seqlens}, std::span(&pointer, 1), {});
  model.save_state(state, output);
  if (!json) return write_stdout(fmt::format("{}: {} tokens\n", output, state.position()));
  print_json({{"output", output}, {"position", state.position()}, {"bytes", state.bytes()}});
}

}  // namespace

void add_state(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("state", "Save what a model remembers of a text, or show such a file");
  command->require_subcommand(1);

  CLI::App* info = command->add_subcommand("info", "Show a state file's model, position and sizes");
  const auto info_options = std::make_shared<StateInfoCommand>();
  info->add_option("FILE", info_options->path, "The state file")->type_name("")->required();
  info->add_flag("--json", info_options->json, "Print JSON");
  info->footer("Example:\n  deltafox state info prefix.state");
  info->callback([info_options] { info_options->run(); });

  CLI::App* save = command->add_subcommand("save", "Read a text and save the state behind it");
  const auto save_options = std::make_shared<StateSaveCommand>();
  save_options->model_options.add(*save);
  save_options->sequence.add(*save);
  save->add_option("--load-state", save_options->load, "Go on from this state file")
      ->type_name("FILE");
  save->add_option("-o,--output", save_options->output, "State file to write")
      ->type_name("FILE")
      ->required();
  save->add_flag("--json", save_options->json, "Print what was written as JSON");
  save->footer(
      "Examples:\n"
      "  deltafox state save --model DIR --text \"$(cat rules.txt)\" --output rules.state\n"
      "  deltafox generate --model DIR --load-state rules.state \" First question: ...\"");
  save->callback([save_options] { save_options->run(); });

  command->footer(
      "Examples:\n"
      "  deltafox state save --model DIR --text \"Once upon a time\" --output prefix.state\n"
      "  deltafox state info prefix.state");
}

}  // namespace deltafox::app
