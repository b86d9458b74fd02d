// deltafox pull: a checkpoint from the hub into the cache.
#include <memory>

#include "commands.h"
#include "deltafox/hub.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct PullCommand {
  std::string id;
  std::string revision = "main";
  bool json = false;

  void run() const {
    ProgressBar progress(ProgressBar::Unit::kBytes);
    hub::PullOptions options;
    options.revision = revision;
    options.on_progress = [&](const hub::Progress& now) {
      progress.update(now.file.empty() ? "list of files" : now.file, now.done_bytes,
                      now.total_bytes);
      return true;
    };
    const std::string directory = hub::pull(id, options);
    progress.clear();
    if (!json) return write_stdout(directory + "\n");
    print_json({{"id", id}, {"revision", revision}, {"directory", directory}});
  }
};

}  // namespace

void add_pull(CLI::App& app) {
  CLI::App* command = app.add_subcommand("pull", "Download a checkpoint and print its directory");
  const auto options = std::make_shared<PullCommand>();
  command->add_option("ID", options->id, "The checkpoint's hub id, ORG/NAME")
      ->type_name("")
      ->required();
  command->add_option("--revision", options->revision, "Branch, tag or commit")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print id, revision and directory as JSON");
  command->footer(
      "Files go to the cache of Python's huggingface_hub; those it holds are not fetched again.\n"
      "After Ctrl-C or a lost connection, the same command goes on where it stopped. Environment:\n"
      "HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE.\n\n"
      "Example:\n"
      "  deltafox pull ORG/NAME && deltafox generate --model ORG/NAME \"Once upon a time\"");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
