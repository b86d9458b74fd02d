// deltafox train and export: the training loop at the terminal, and its checkpoints as models.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "io/file.h"
#include "terminal.h"
#include "train/checkpoint.h"
#include "train/trainer.h"

namespace deltafox::app {
namespace {

constexpr int kInterrupted = 130;

std::atomic<bool> stop_requested{false};

// The first signal asks the loop to stop; the second does not wait for it.
void request_stop(int) {
  if (!stop_requested.exchange(true)) return;
  io::remove_pending_files();
  _exit(kInterrupted);
}

// While it lives, SIGINT and SIGTERM stop the training cleanly.
class StopOnSignal {
 public:
  StopOnSignal() {
    struct sigaction action {};
    action.sa_handler = request_stop;
    sigaction(SIGINT, &action, &interrupt_);
    sigaction(SIGTERM, &action, &terminate_);
  }
  StopOnSignal(const StopOnSignal&) = delete;
  StopOnSignal& operator=(const StopOnSignal&) = delete;
  ~StopOnSignal() {
    sigaction(SIGINT, &interrupt_, nullptr);
    sigaction(SIGTERM, &terminate_, nullptr);
  }

 private:
  struct sigaction interrupt_ {};
  struct sigaction terminate_ {};
};

std::string line_of(const train::StepReport& report) {
  return fmt::format(
      "{:5.1f}%  {} tokens  loss {:.4f}  lr {:.3g}  grad norm {:.3f}  {} tokens/s  MFU {:.1f}%  "
      "ETA {}",
      100 * static_cast<double>(report.tokens) / static_cast<double>(report.max_tokens),
      format_count(report.tokens), report.loss, report.lr, report.grad_norm,
      format_count(static_cast<std::int64_t>(report.tokens_per_second)),
      100 * report.flops_utilization, format_duration(report.seconds_left));
}

struct TrainCommand {
  std::string config;
  std::vector<std::string> overrides;
  std::string device = "cpu";
  int threads = 0;
  bool quiet = false;
  bool json = false;

  void run() const;
};

void TrainCommand::run() const {
  const StopOnSignal signals;
  const train::Config settings = train::load_config(config, overrides);
  const bool terminal = stderr_is_terminal();
  double loss = 0;
  ProgressBar validation(ProgressBar::Unit::kTokens);
  train::Listener listener;
  listener.on_step = [&](const train::StepReport& report) {
    loss = report.loss;
    if (quiet) return;
    // On a terminal every step rewrites the line; what is logged stays.
    if (terminal) {
      fmt::print(stderr, "\r\x1b[K{}{}", line_of(report), report.logged ? "\n" : "");
    } else if (report.logged) {
      fmt::print(stderr, "{}\n", line_of(report));
    }
  };
  listener.on_note = [&](const std::string& text) {
    validation.clear();
    if (!quiet) note(text);
  };
  listener.on_validation = [&](std::int64_t done, std::int64_t total) {
    if (!quiet) validation.update("validation", done, total);
  };
  train::Trainer trainer(settings, threads, device_named(device), std::move(listener));
  if (!quiet) {
    note(fmt::format("{} parameters, {} of {} tokens done, writing to {}",
                     format_count(trainer.num_parameters()), format_count(trainer.tokens()),
                     format_count(settings.max_tokens), settings.output_dir));
  }
  const train::Outcome outcome = trainer.run(stop_requested);
  if (outcome == train::Outcome::kStopped) {
    note(fmt::format("stopped after {} tokens; the same command goes on from there",
                     format_count(trainer.tokens())));
    throw Interrupted{};
  }
  const std::string model = settings.output_dir + "/model";
  if (!json) return write_stdout(model + "\n");
  print_json({{"model", model}, {"tokens", trainer.tokens()}, {"loss", loss}});
}

struct ExportCommand {
  std::string run_directory;
  std::string output;
  std::string dtype = "float32";
  std::int64_t tokens = 0;
  int threads = 0;

  void run() const {
    const auto newest = train::newest_checkpoint(run_directory);
    if (!newest) fail("{}: holds no training checkpoints", run_directory);
    if (std::filesystem::exists(std::filesystem::path(output) / "model.safetensors")) {
      fail("{}: holds a model already", output);
    }
    ThreadPool pool(threads);
    train::export_checkpoint(tokens > 0 ? train::checkpoint_path(run_directory, tokens) : *newest,
                             output, dtype_named(dtype), pool);
    write_stdout(output + "\n");
  }
};

}  // namespace

void add_train(CLI::App& app) {
  CLI::App* command = app.add_subcommand("train", "Train a model as a configuration file says");
  const auto options = std::make_shared<TrainCommand>();
  command->add_option("CONFIG", options->config, "A YAML file; see configs/ and docs/training.md")
      ->type_name("")
      ->required();
  command
      ->add_option("OVERRIDES", options->overrides,
                   "Values of single keys, as in optimizer.lr=0.001")
      ->type_name("");
  command->add_option("--device", options->device, "Where to compute: cpu or cuda")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("-q,--quiet", options->quiet, "No progress on stderr");
  command->add_flag("--json", options->json, "Print the result as JSON");
  command->footer(
      "A run that was stopped goes on from its newest checkpoint when it is started again, to the "
      "same bits. Ctrl-C finishes the step and writes one. At the end output_dir/model is a model "
      "for the other commands.\n\n"
      "Example:\n"
      "  deltafox train configs/longcrawl64/delta_net/125m_2b.yaml data_dir=data output_dir=run");
  command->callback([options] { options->run(); });
}

void add_export(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("export", "Make a model of a training checkpoint, finished or not");
  const auto options = std::make_shared<ExportCommand>();
  command->add_option("RUN", options->run_directory, "The output_dir of the training")
      ->type_name("")
      ->required();
  command->add_option("-o,--output", options->output, "Directory to make")
      ->type_name("DIR")
      ->required();
  command
      ->add_option("--tokens", options->tokens, "Of the checkpoint after N tokens; 0: the newest")
      ->check(whole_number<std::int64_t>)
      ->type_name("N")
      ->capture_default_str();
  command
      ->add_option("--dtype", options->dtype,
                   "What the weights are stored as: float32, bfloat16 or float16")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->footer(
      "Example:\n"
      "  deltafox export run --output model --dtype bfloat16");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
