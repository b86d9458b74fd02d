// deltafox tokenize and detokenize: text to token ids and back.
#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "deltafox/tokenizer.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct TokenizeCommand {
  CheckpointOptions checkpoint;
  std::string text = "-";
  std::string file;
  bool add_special_tokens = true;
  bool json = false;

  void run(bool text_given) const {
    if (text_given && !file.empty()) fail("TEXT, --file: only one of them can be given");
    const Tokenizer tokenizer = Tokenizer::load(checkpoint.directory());
    const std::string source = text == "-" ? read_input(file.empty() ? "-" : file) : text;
    const std::vector<std::int32_t> ids = tokenizer.encode(source, add_special_tokens);
    if (!json) return write_stdout(format_ids(ids) + "\n");
    print_json({{"ids", ids}, {"count", ids.size()}}, -1);
  }
};

struct DetokenizeCommand {
  CheckpointOptions checkpoint;
  std::vector<std::string> ids;
  bool skip_special_tokens = false;
  bool json = false;

  void run() const {
    const Tokenizer tokenizer = Tokenizer::load(checkpoint.directory());
    std::vector<std::int32_t> parsed;
    if (ids.empty()) parsed = parse_ids(read_input("-"), "stdin");
    for (const std::string& list : ids) {
      const std::vector<std::int32_t> more = parse_ids(list, "IDS");
      parsed.insert(parsed.end(), more.begin(), more.end());
    }
    std::string text = tokenizer.decode(parsed, skip_special_tokens);
    if (json) return print_json({{"text", text}}, -1);
    if (stdout_is_terminal()) text += '\n';
    write_stdout(text);
  }
};

}  // namespace

void add_tokenize(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenize", "Print the token ids of a text");
  const auto options = std::make_shared<TokenizeCommand>();
  options->checkpoint.add(*command);
  const CLI::Option* text =
      command->add_option("TEXT", options->text, "The text; - or nothing: stdin")->type_name("");
  command->add_option("--file", options->file, "Read the text from a file; -: stdin")
      ->type_name("FILE");
  command->add_flag("--add-special-tokens,!--no-add-special-tokens", options->add_special_tokens,
                    "Put the BOS token in front where the tokenizer's configuration says so "
                    "(default)");
  command->add_flag("--json", options->json, "Print {\"ids\": [...], \"count\": n}");
  command->footer(
      "Examples:\n"
      "  deltafox tokenize --model DIR \"Hello world\"\n"
      "  deltafox tokenize --model DIR < book.txt > book.ids");
  command->callback([options, text] { options->run(text->count() > 0); });
}

void add_detokenize(CLI::App& app) {
  CLI::App* command = app.add_subcommand("detokenize", "Print the text of token ids");
  const auto options = std::make_shared<DetokenizeCommand>();
  options->checkpoint.add(*command);
  command
      ->add_option("IDS", options->ids, "Ids, separated by commas or spaces; nothing: from stdin")
      ->type_name("");
  command->add_flag("--skip-special-tokens,!--no-skip-special-tokens", options->skip_special_tokens,
                    "Leave out special tokens such as BOS");
  command->add_flag("--json", options->json, "Print {\"text\": ...}");
  command->footer(
      "The text is printed to the byte; only on a terminal a newline follows.\n\n"
      "Example:\n"
      "  deltafox detokenize --model DIR 15496,995");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
