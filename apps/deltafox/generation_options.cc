#include "generation_options.h"

#include "core/error.h"
#include "io/json.h"

namespace deltafox::app {
namespace {

EarlyStopping early_stopping_named(const std::string& name) {
  if (name == "true") return EarlyStopping::kTrue;
  if (name == "false") return EarlyStopping::kFalse;
  if (name == "never") return EarlyStopping::kNever;
  fail("--early-stopping: must be true, false or never, got '{}'", io::printable(name));
}

}  // namespace

void GenerationOptions::add_lengths(CLI::App& command) {
  using Config = GenerationConfig;
  add(command, "-n,--max-new-tokens", &Config::max_new_tokens,
      "New tokens at most (20, unless generation_config.json says otherwise)");
  add(command, "--max-length", &Config::max_length, "The same, prompt included");
  add(command, "--min-new-tokens", &Config::min_new_tokens,
      "No end-of-sequence token before so many new ones");
  add(command, "--min-length", &Config::min_length, "The same, prompt included");
}

void GenerationOptions::add_sampling(CLI::App& command) {
  using Config = GenerationConfig;
  command.add_flag_function(
      "--do-sample,!--no-do-sample",
      [this](std::int64_t count) {
        overrides_.emplace_back([=](Config& config) { config.do_sample = count > 0; });
      },
      "Draw tokens instead of taking the likeliest");
  add(command, "--temperature", &Config::temperature, "Divides the logits (1.0)");
  add(command, "--top-k", &Config::top_k, "Only the k likeliest tokens (50); 0: all");
  add(command, "--top-p", &Config::top_p, "Only the likeliest tokens that make up p together");
  add(command, "--min-p", &Config::min_p, "Only tokens of at least p times the likeliest one's");
  add(command, "--typical-p", &Config::typical_p, "Only the most typical tokens that make up p");
  add(command, "--epsilon-cutoff", &Config::epsilon_cutoff, "Only tokens of at least this p");
  add(command, "--eta-cutoff", &Config::eta_cutoff, "The same, adapted to the entropy");
  add(command, "--seed", &Config::seed, "Seed of every draw (0)");
  add(command, "--repetition-penalty", &Config::repetition_penalty,
      "Above 1: makes tokens that occurred less likely (also without --do-sample)");
  add(command, "--no-repeat-ngram-size", &Config::no_repeat_ngram_size,
      "No run of n tokens twice (also without --do-sample)");
  command.add_flag_function(
      "--renormalize-logits",
      [this](std::int64_t) {
        overrides_.emplace_back([](Config& config) { config.renormalize_logits = true; });
      },
      "Normalise the logits again after all of these");
}

void GenerationOptions::add_beams(CLI::App& command) {
  using Config = GenerationConfig;
  add(command, "--num-beams", &Config::num_beams, "Beams of a beam search (1: none)");
  add(command, "--length-penalty", &Config::length_penalty,
      "Beam scores are divided by length to this power (1.0)");
  command
      .add_option_function<std::string>(
          "--early-stopping",
          [this](const std::string& name) {
            overrides_.emplace_back([value = early_stopping_named(name)](Config& config) {
              config.early_stopping = value;
            });
          },
          "When a beam search ends: true, false or never")
      ->type_name("WHEN");
  add(command, "--num-return-sequences", &Config::num_return_sequences,
      "Continuations of each prompt (1)");
}

void GenerationOptions::add_endings(CLI::App& command) {
  using Config = GenerationConfig;
  add(command, "--eos-token-id", &Config::eos_token_id,
      "Ids that end a sequence, instead of the model's; may be given several times")
      ->type_name("ID")
      ->check(whole_number<std::int32_t>)
      ->allow_extra_args(false)
      ->delimiter(',');
  command.add_flag_function(
      "--ignore-eos",
      [this](std::int64_t) {
        overrides_.emplace_back([](Config& config) { config.eos_token_id.emplace(); });
      },
      "No id ends a sequence, only the length does");
  add(command, "--pad-token-id", &Config::pad_token_id,
      "What --pad fills up with, instead of the model's pad token")
      ->type_name("ID");
  add(command, "--stop", &Config::stop_strings,
      "A text that ends a sequence; may be given several times")
      ->type_name("TEXT")
      ->allow_extra_args(false);
}

void GenerationOptions::add(CLI::App& command) {
  const auto grouped = [&](const char* group, void (GenerationOptions::*add_some)(CLI::App&)) {
    command.option_defaults()->group(group);
    (this->*add_some)(command);
  };
  grouped("Length", &GenerationOptions::add_lengths);
  grouped("Choice of tokens", &GenerationOptions::add_sampling);
  grouped("Beams and sequences", &GenerationOptions::add_beams);
  grouped("Ends", &GenerationOptions::add_endings);
}

GenerationConfig GenerationOptions::config(const std::string& directory) const {
  GenerationConfig config = GenerationConfig::load(directory);
  for (const auto& override : overrides_) override(config);
  config.validate();
  return config;
}

}  // namespace deltafox::app
