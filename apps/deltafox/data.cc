// deltafox data: texts to the token files that training reads.
#include <fmt/format.h>

#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "deltafox/hub.h"
#include "io/prepare_data.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct DataCommand {
  io::PrepareOptions options;
  std::string tokenizer;
  bool train_tokenizer = false;
  std::int32_t vocab_size = 8192;
  bool json = false;

  void run() {
    if (train_tokenizer == !tokenizer.empty()) {
      fail("give either --tokenizer or --train-tokenizer");
    }
    if (train_tokenizer) {
      options.vocab_size = vocab_size;
    } else {
      options.tokenizer = hub::resolve(tokenizer, "main");
    }
    ProgressBar progress(ProgressBar::Unit::kBytes);
    options.on_progress = [&](const std::string& label, std::int64_t done, std::int64_t total) {
      progress.update(label, done, total);
    };
    const io::PreparedData data = io::prepare_data(options);
    progress.clear();
    if (json) {
      return print_json({{"directory", options.output},
                         {"documents", data.documents},
                         {"bytes", data.bytes},
                         {"train_tokens", data.train_tokens},
                         {"heldout_tokens", data.heldout_tokens},
                         {"vocab_size", data.vocab_size},
                         {"resumed_bytes", data.resumed_bytes}});
    }
    write_stdout(
        fmt::format("{}: {} documents, {}, {} tokens to train on, {} held out, vocabulary "
                    "of {}\n",
                    options.output, format_count(data.documents),
                    format_bytes(static_cast<double>(data.bytes)), format_count(data.train_tokens),
                    format_count(data.heldout_tokens), format_count(data.vocab_size)));
  }
};

}  // namespace

void add_data(CLI::App& app) {
  CLI::App* command = app.add_subcommand("data", "Tokenize and pack texts, to train on");
  const auto data = std::make_shared<DataCommand>();
  command
      ->add_option("INPUT", data->options.inputs,
                   "Texts (each file a document), .jsonl files (each line one), and directories of "
                   ".txt and .jsonl")
      ->type_name("")
      ->required();
  command->add_option("-o,--output", data->options.output, "Directory to make")
      ->type_name("DIR")
      ->required();
  command->add_option("--tokenizer", data->tokenizer, "A checkpoint whose tokenizer to use")
      ->type_name("DIR|ID");
  command->add_flag("--train-tokenizer", data->train_tokenizer,
                    "Learn a byte-level BPE vocabulary from these texts instead");
  command->add_option("--vocab-size", data->vocab_size, "Of the vocabulary to learn")
      ->check(whole_number<std::int32_t>)
      ->type_name("N")
      ->capture_default_str();
  command
      ->add_option("--heldout", data->options.heldout_share,
                   "Share of the documents to keep for validation")
      ->type_name("X")
      ->capture_default_str();
  command->add_option("--field", data->options.field, "Where a line of JSON has its text")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--threads", data->options.threads, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", data->json, "Print what was made as JSON");
  command->footer(
      "Makes train.tokens, heldout.tokens and the tokenizer's files. Interrupted, it goes on where "
      "it was when run again.\n\n"
      "Examples:\n"
      "  deltafox data books/ --train-tokenizer --vocab-size 8192 --heldout 0.01 -o data\n"
      "  deltafox data pages.jsonl --tokenizer models/english-9m -o data");
  command->callback([data] { data->run(); });
}

}  // namespace deltafox::app
