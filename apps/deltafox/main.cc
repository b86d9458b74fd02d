// The deltafox program: reads the command line and hands over to a subcommand.
//
// Exit codes: 0, also when the reader of stdout went away; 2 after an error, which is one line on
// stderr; 130 after Ctrl-C or SIGTERM.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "core/error.h"
#include "help.h"
#include "io/file.h"
#include "terminal.h"

namespace {

constexpr int kError = 2;
constexpr int kInterrupted = 130;

void end_interrupted(int) {
  deltafox::io::remove_pending_files();
  _exit(kInterrupted);
}

void handle_signals() {
  struct sigaction action {};
  action.sa_handler = end_interrupted;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  // A write that cannot be done then fails with a reason instead.
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
  sigaction(SIGXFSZ, &action, nullptr);
}

bool is_option(const CLI::App& app, const std::string& name) {
  const std::vector<const CLI::App*> commands =
      app.get_subcommands([](const CLI::App*) { return true; });
  return app.get_option_no_throw(name) != nullptr ||
         std::any_of(commands.begin(), commands.end(),
                     [&](const CLI::App* command) { return is_option(*command, name); });
}

// The arguments as CLI11 takes them, last first. --max_new_tokens is --max-new-tokens, and
// --text=x is --text x, which also holds for an empty x.
std::vector<std::string> normalised(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> arguments;
  bool options = true;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--") options = false;
    const std::size_t equals = argument.find('=');
    std::string name = argument.substr(0, equals);
    std::replace(name.begin(), name.end(), '_', '-');
    if (!options || !name.starts_with("--") || !is_option(app, name)) {
      arguments.push_back(argument);
      continue;
    }
    arguments.push_back(name);
    if (equals != std::string::npos) arguments.push_back(argument.substr(equals + 1));
  }
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

// The subcommand that the command line names, and its whole name.
std::pair<const CLI::App*, std::string> chosen_command(const CLI::App& app) {
  const CLI::App* command = &app;
  std::string name = app.get_name();
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    name += " " + command->get_name();
  }
  return {command, name};
}

[[noreturn]] void refuse(const CLI::App& app, const CLI::ParseError& error) {
  const auto [command, name] = chosen_command(app);
  // What is unknown explains whatever else is wrong.
  const std::vector<std::string> unknown = app.remaining(true);
  const bool needs_command = command->get_require_subcommand_min() > 0;
  std::string problem = error.what();
  if (!unknown.empty()) {
    const char* const kind = unknown.front().starts_with("-") ? "unknown option"
                             : needs_command                  ? "unknown command"
                                                              : "unexpected argument";
    problem = fmt::format("{} '{}'", kind, unknown.front());
  } else if (needs_command) {
    problem = "a command is needed";
  }
  deltafox::fail("{} (see {} --help)", problem, name);
}

void run(int argc, char** argv) {
  using namespace deltafox::app;
  CLI::App app("Language models of the DeltaNet family: text, logits and losses.", "deltafox");
  app.set_version_flag("--version", "deltafox " DELTAFOX_VERSION);
  app.require_subcommand(1);
  app.formatter(std::make_shared<HelpFormatter>());
  app.footer(
      "Each command explains itself: deltafox generate --help. Words of an option may be joined by "
      "- or _.\n\n"
      "Example:\n"
      "  deltafox generate --model DIR \"The capital of France is\" --max-new-tokens 20");
  add_generate(app);
  add_logits(app);
  add_loss(app);
  add_tokenize(app);
  add_detokenize(app);
  add_info(app);
  add_init(app);
  add_quantize(app);
  add_pull(app);
  add_state(app);
  add_bench(app);
  add_data(app);
  add_train(app);
  add_export(app);
  try {
    app.parse(normalised(app, argc, argv));
  } catch (const CLI::CallForHelp&) {
    const auto [command, name] = chosen_command(app);
    write_stdout(command->get_formatter()->make_help(command, name, CLI::AppFormatMode::Normal));
  } catch (const CLI::CallForVersion&) {
    write_stdout(app.version() + "\n");
  } catch (const CLI::ParseError& error) {
    refuse(app, error);
  }
}

int fail_with(std::string_view message) {
  fmt::print(stderr, "deltafox: error: {}\n", deltafox::app::one_line(message));
  return kError;
}

}  // namespace

int main(int argc, char** argv) {
  handle_signals();
  try {
    run(argc, argv);
  } catch (const deltafox::app::BrokenPipe&) {
    return 0;
  } catch (const deltafox::app::Interrupted&) {
    return kInterrupted;
  } catch (const std::bad_alloc&) {
    return fail_with("out of memory");
  } catch (const std::exception& error) {
    return fail_with(error.what());
  }
  return 0;
}
