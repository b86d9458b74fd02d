// deltafox generate: continues prompts.
#include "deltafox/generate.h"

#include <fmt/format.h>

#include <chrono>
#include <memory>
#include <optional>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "generation_options.h"
#include "prompts.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

using Clock = std::chrono::steady_clock;
using Prompts = std::vector<std::vector<std::int32_t>>;

struct GenerateCommand {
  ModelOptions model_options;
  PromptOptions prompt_options;
  GenerationOptions generation_options;
  bool output_ids = false;
  bool pad = false;
  bool echo = true;
  bool stream = true;
  bool skip_special_tokens = true;
  bool keep_stop_string = true;
  bool logprobs = false;
  bool json = false;
  std::string load_state;
  std::string save_state;

  void run() const;
  void check(const Prompts& prompts, const GenerationConfig& config) const;
};

// One call of generate(), its output and its timing.
class Generation {
 public:
  Generation(const GenerateCommand& command, const Model& model, const Tokenizer* tokenizer,
             const GenerationConfig& config, const Prompts& prompts)
      : command_(command),
        model_(model),
        tokenizer_(tokenizer),
        config_(config),
        prompts_(prompts),
        streams_(command.stream && !command.json && !command.prompt_options.jsonl() &&
                 !command.output_ids && prompts.size() == 1 && config.num_beams == 1 &&
                 config.num_return_sequences == 1) {}

  void run();

 private:
  GenerateOptions options();
  void print_texts(const std::vector<GeneratedSequence>& sequences) const;
  void print_ids(const std::vector<GeneratedSequence>& sequences) const;
  nlohmann::ordered_json to_json(const GeneratedSequence& sequence) const;
  void print_as_json(const std::vector<GeneratedSequence>& sequences) const;
  void print_statistics(const std::vector<GeneratedSequence>& sequences) const;
  std::string prompt_text(std::size_t prompt) const {
    return command_.echo ? tokenizer_->decode(prompts_[prompt], command_.skip_special_tokens) : "";
  }

  const GenerateCommand& command_;
  const Model& model_;
  const Tokenizer* tokenizer_;
  const GenerationConfig& config_;
  const Prompts& prompts_;
  bool streams_;
  std::vector<State> initial_states_;
  Clock::time_point begin_;
  std::optional<Clock::time_point> first_token_;
  Clock::time_point end_;
};

GenerateOptions Generation::options() {
  GenerateOptions options;
  options.tokenizer = tokenizer_;
  options.skip_special_tokens = command_.skip_special_tokens;
  options.keep_stop_string = command_.keep_stop_string;
  options.return_states = !command_.save_state.empty();
  if (!command_.load_state.empty()) {
    initial_states_.push_back(model_.load_state(command_.load_state));
    options.initial_states = initial_states_;
  }
  if (config_.num_beams == 1) {
    options.on_token = [this](const TokenEvent& event) {
      if (!first_token_) {
        first_token_ = Clock::now();
        if (streams_) write_stdout(prompt_text(0));
      }
      if (streams_) write_stdout(event.text);
      return true;
    };
  }
  return options;
}

void Generation::print_texts(const std::vector<GeneratedSequence>& sequences) const {
  for (const GeneratedSequence& sequence : sequences) {
    if (sequences.size() > 1) {
      const auto index = &sequence - sequences.data();
      write_stdout(fmt::format("{}-- prompt {}, sequence {} --\n", index > 0 ? "\n" : "",
                               sequence.prompt, index));
    }
    write_stdout(prompt_text(static_cast<std::size_t>(sequence.prompt)) + sequence.text + "\n");
  }
}

void Generation::print_ids(const std::vector<GeneratedSequence>& sequences) const {
  if (command_.pad) {
    for (const auto& row : padded_ids(sequences, pad_token_id(model_, config_))) {
      write_stdout(format_ids(row) + "\n");
    }
    return;
  }
  for (const GeneratedSequence& sequence : sequences) {
    write_stdout(format_ids(command_.echo ? std::span<const std::int32_t>(sequence.ids)
                                          : sequence.new_ids()) +
                 "\n");
  }
}

nlohmann::ordered_json Generation::to_json(const GeneratedSequence& sequence) const {
  nlohmann::ordered_json value{
      {"prompt", sequence.prompt},
      {"ids", sequence.ids},
      {"num_prompt_ids", sequence.num_prompt_ids},
      {"finish_reason", name_of(sequence.finish_reason)},
  };
  if (tokenizer_ != nullptr) {
    value["prompt_text"] = tokenizer_->decode(prompts_[static_cast<std::size_t>(sequence.prompt)],
                                              command_.skip_special_tokens);
    value["text"] = sequence.text;
  }
  if (!sequence.stop_string.empty()) value["stop_string"] = sequence.stop_string;
  if (sequence.score) value["score"] = *sequence.score;
  if (command_.logprobs) {
    value["logprobs"] = sequence.logprobs;
    value["model_logprobs"] = sequence.model_logprobs;
  }
  return value;
}

void Generation::print_as_json(const std::vector<GeneratedSequence>& sequences) const {
  if (command_.prompt_options.jsonl()) {
    for (const GeneratedSequence& sequence : sequences) write_stdout(json_line(to_json(sequence)));
    return;
  }
  std::size_t prompt_tokens = 0;
  std::size_t new_tokens = 0;
  for (const auto& prompt : prompts_) prompt_tokens += prompt.size();
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const GeneratedSequence& sequence : sequences) {
    list.push_back(to_json(sequence));
    new_tokens += sequence.new_ids().size();
  }
  print_json({{"model", model_.info().directory},
              {"random_weights", model_.info().random_weights},
              {"seed", config_.seed},
              {"sequences", list},
              {"prompt_tokens", prompt_tokens},
              {"new_tokens", new_tokens},
              {"seconds", std::chrono::duration<double>(end_ - begin_).count()}},
             -1);
}

void Generation::print_statistics(const std::vector<GeneratedSequence>& sequences) const {
  std::size_t prompt_tokens = 0;
  std::size_t new_tokens = 0;
  for (const auto& prompt : prompts_) prompt_tokens += prompt.size();
  for (const GeneratedSequence& sequence : sequences) new_tokens += sequence.new_ids().size();
  const auto seconds = [](Clock::duration duration) {
    return std::chrono::duration<double>(duration).count();
  };
  std::string line = fmt::format("{} prompt tokens, {} new tokens in {:.2f} s", prompt_tokens,
                                 new_tokens, seconds(end_ - begin_));
  if (first_token_ && new_tokens > sequences.size()) {
    // The first token of each sequence belongs to the reading of the prompts.
    line += fmt::format(
        "; {:.2f} s to the first, then {:.1f} tokens/s", seconds(*first_token_ - begin_),
        static_cast<double>(new_tokens - sequences.size()) / seconds(end_ - *first_token_));
  }
  fmt::print(stderr, "{}\n", line);
}

void Generation::run() {
  begin_ = Clock::now();
  const std::vector<GeneratedSequence> sequences = generate(model_, prompts_, config_, options());
  end_ = Clock::now();
  if (!command_.save_state.empty()) {
    model_.save_state(sequences.front().state.value(), command_.save_state);
  }
  if (command_.json || command_.prompt_options.jsonl()) {
    print_as_json(sequences);
  } else if (command_.output_ids) {
    print_ids(sequences);
  } else if (streams_) {
    write_stdout("\n");
  } else {
    print_texts(sequences);
  }
  if (stderr_is_terminal()) print_statistics(sequences);
  if (model_.info().random_weights) {
    note("the weights of this model are random, so its text means nothing");
  }
}

void GenerateCommand::check(const Prompts& prompts, const GenerationConfig& config) const {
  if (logprobs && !json && !prompt_options.jsonl()) fail("--logprobs: needs --json or --jsonl");
  if (pad && (!output_ids || !echo)) fail("--pad: needs --output-ids, with the prompt's");
  if (load_state.empty() && save_state.empty()) return;
  const char* const option = load_state.empty() ? "--save-state" : "--load-state";
  if (prompts.size() != 1 || config.num_return_sequences != 1 || config.num_beams != 1) {
    fail("{}: is for one prompt, one sequence and one beam", option);
  }
}

void GenerateCommand::run() const {
  const std::string directory = model_options.directory();
  GenerationConfig config = generation_options.config(directory);
  config.output_logprobs = logprobs;
  const bool jsonl = prompt_options.jsonl();
  const bool needs_text =
      prompt_options.is_text() || !config.stop_strings.empty() || !(output_ids || json || jsonl);
  const bool welcomes_text = (json || jsonl) && has_tokenizer(directory);
  std::optional<Tokenizer> tokenizer;
  if (needs_text || welcomes_text) tokenizer = Tokenizer::load(directory);
  const Prompts prompts = prompt_options.read(tokenizer ? &*tokenizer : nullptr);
  check(prompts, config);
  const Model model = model_options.load(directory);
  Generation(*this, model, tokenizer ? &*tokenizer : nullptr, config, prompts).run();
}

void add_output_options(CLI::App& command, GenerateCommand& options) {
  command.add_flag("--echo,!--no-echo", options.echo,
                   "Print the prompt in front of what continues it (default)");
  command.add_flag("--output-ids", options.output_ids,
                   "Print token ids instead of text, a line for each sequence");
  command.add_flag("--pad", options.pad,
                   "With --output-ids: fill the lines up to one length with the pad token");
  command.add_flag("--stream,!--no-stream", options.stream,
                   "Print a single sequence as it comes (default)");
  command.add_flag("--skip-special-tokens,!--no-skip-special-tokens", options.skip_special_tokens,
                   "Leave special tokens such as BOS out of the text (default)");
  command.add_flag("--keep-stop-string,!--no-keep-stop-string", options.keep_stop_string,
                   "Print the text of --stop that ended a sequence (default)");
  command.add_flag("--logprobs", options.logprobs,
                   "With --json or --jsonl: the log-probability of each new token, as it was drawn "
                   "and as the model gave it");
  command.add_flag("--json", options.json, "Print one JSON object with all sequences");
  command
      .add_option("--load-state", options.load_state,
                  "Go on from what this state file remembers; the prompt is what follows it")
      ->type_name("FILE");
  command
      .add_option("--save-state", options.save_state,
                  "Save what the model remembers after the prompt and all new tokens")
      ->type_name("FILE");
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt");
  const auto options = std::make_shared<GenerateCommand>();
  options->model_options.add(*command);
  command->option_defaults()->group("Prompt");
  options->prompt_options.add(*command);
  options->generation_options.add(*command);
  command->option_defaults()->group("Output");
  add_output_options(*command, *options);
  command->footer(
      "Options mean what they mean in Hugging Face transformers; the likeliest token is taken\n"
      "unless --do-sample is given. What the checkpoint's generation_config.json says holds where\n"
      "the command line says nothing. The same seed gives the same text on any number of threads.\n"
      "A prompt that begins with a dash goes behind --, or is written as --prompt=-5.\n\n"
      "Examples:\n"
      "  deltafox generate --model DIR \"The capital of France is\" --max-new-tokens 20\n"
      "  deltafox generate --model DIR \"Once upon a time\" -n 200 --do-sample --top-p 0.9 --seed "
      "7\n"
      "  deltafox generate --model DIR --prompt-file prompts.jsonl --jsonl > texts.jsonl");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
