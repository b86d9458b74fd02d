// deltafox quantize: a checkpoint with weights of fewer bits.
#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "model/quantize.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct QuantizeCommand {
  CheckpointOptions checkpoint;
  std::string output;
  std::string dtype;
  int threads = 0;
  bool json = false;

  void run() const;
};

void QuantizeCommand::run() const {
  const DType kept = dtype_named(dtype);
  if (kept != DType::kBF16 && !is_packed(kept)) {
    fail("--dtype: must be bfloat16, int8 or int4, got '{}'", dtype);
  }
  ProgressBar progress(ProgressBar::Unit::kBytes);
  std::int64_t bytes = 0;
  write_quantized(checkpoint.directory(), output,
                  {.dtype = kept,
                   .threads = threads,
                   .on_progress = [&](std::int64_t done, std::int64_t total) {
                     bytes = total;
                     progress.update("model.safetensors", done, total);
                   }});
  progress.clear();
  if (!json) return write_stdout(output + "\n");
  print_json({{"directory", output}, {"dtype", dtype}, {"bytes", bytes}});
}

}  // namespace

void add_quantize(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "quantize", "Make a smaller and faster checkpoint: bfloat16, int8 or int4 weights");
  const auto options = std::make_shared<QuantizeCommand>();
  options->checkpoint.add(*command);
  command
      ->add_option("-o,--output", options->output,
                   "Directory to make; it must not hold a checkpoint yet")
      ->type_name("DIR")
      ->required();
  command
      ->add_option("--dtype", options->dtype,
                   "bfloat16, int8 (8.125 bits a weight) or int4 (4.25 bits)")
      ->type_name("NAME")
      ->required();
  command->add_option("--threads", options->threads, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print what was made as JSON");
  command->footer(
      "docs/quantization.md says what it costs in quality. What is made is read like any other "
      "checkpoint.\n\n"
      "Example:\n"
      "  deltafox quantize --model DIR --output DIR-int8 --dtype int8");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
