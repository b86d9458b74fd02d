// deltafox init: a checkpoint with random weights.
#include "model/init.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "io/file.h"
#include "model/registry.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct InitCommand {
  std::string name;
  std::string config;
  std::string output;
  std::string dtype = "float32";
  std::uint64_t seed = 0;
  int threads = 0;
  bool json = false;

  void run() const;
  std::string config_text() const;
};

std::string InitCommand::config_text() const {
  if (name.empty() == config.empty()) fail("give either the NAME of a model or --config");
  if (config.empty()) return preset_config(name);
  constexpr std::size_t kMaxBytes = std::size_t{16} << 20;
  std::string text = io::read_text_file(config, kMaxBytes);
  build_model(io::JsonObject::parse(text, config));  // so that an Error names the file
  return text;
}

void InitCommand::run() const {
  if (is_packed(dtype_named(dtype))) {
    fail("--dtype: weights are initialised as float32, bfloat16 or float16, got '{}'", dtype);
  }
  ProgressBar progress(ProgressBar::Unit::kBytes);
  write_initialised(config_text(), output,
                    {.seed = seed,
                     .dtype = dtype_named(dtype),
                     .threads = threads,
                     .on_progress = [&](std::int64_t done, std::int64_t total) {
                       progress.update("model.safetensors", done, total);
                     }});
  progress.clear();
  if (!json) return write_stdout(output + "\n");
  print_json({{"directory", output}, {"dtype", dtype}, {"seed", seed}});
}

}  // namespace

void add_init(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("init", "Make a checkpoint with random weights, to train or to measure");
  const auto options = std::make_shared<InitCommand>();
  command
      ->add_option("NAME", options->name,
                   fmt::format("A size of the paper: {}", fmt::join(preset_names(), ", ")))
      ->type_name("");
  command->add_option("--config", options->config, "A config.json of any size instead")
      ->type_name("FILE");
  command
      ->add_option("-o,--output", options->output,
                   "Directory to make; it must not hold a checkpoint yet")
      ->type_name("DIR")
      ->required();
  command
      ->add_option("--dtype", options->dtype,
                   "What the weights are stored as: float32, bfloat16 or float16")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "The same seed gives the same file on any machine")
      ->check(whole_number<std::uint64_t>)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print what was made as JSON");
  command->footer(
      "Initialised as the official code does. The config.json says that the weights are random.\n\n"
      "Example:\n"
      "  deltafox init delta_net-125m --output my-model --dtype bfloat16 --seed 1");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
