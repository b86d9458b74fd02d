// What a training run is: the keys of a configuration file, those of the official training script
// where they mean the same. docs/training.md lists them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "train/data.h"
#include "train/schedule.h"

namespace deltafox::train {

enum class Precision : std::uint8_t {
  kF32,
  kBF16Mixed,  // products of bfloat16 where the device has them; masters and sums are float32
};

struct DecayRule {
  bool bias = false;
  bool normalization = false;
  bool convolution = true;
};

struct DataConfig {
  enum class Kind : std::uint8_t { kLongCrawl64, kTokens };
  Kind kind = Kind::kLongCrawl64;
  std::string train_path;
  std::string eval_path;
  std::string tokenizer_path;  // a directory; may hold none
  BatchShape train;
  BatchShape eval;
  std::optional<std::int64_t> eval_tokens;
};

struct OptimizerConfig {
  double lr = 0;
  std::array<double, 2> betas{0.9, 0.999};
  double eps = 1e-8;
  double weight_decay = 0;
};

// Intervals count tokens.
struct Config {
  std::uint64_t seed = 0;
  std::string output_dir;
  bool resume = true;
  std::string pretrained;  // a checkpoint in the Hugging Face layout to start from; may be empty
  std::string fork_dir;    // another run's output_dir to start from; may be empty
  std::int64_t fork_step = 0;

  std::int64_t log_interval = 0;
  std::int64_t train_eval_interval = 0;
  std::int64_t eval_interval = 0;
  std::int64_t checkpoint_interval = 0;
  std::int64_t checkpoint_keep_interval = 0;  // 0: only the newest is kept
  bool skip_eval = true;
  bool final_eval = true;
  std::int64_t min_val_length = 512;

  Precision precision = Precision::kBF16Mixed;
  std::int64_t max_tokens = 0;
  std::int64_t grad_acc_tokens = 0;
  double max_grad_norm = 1;
  bool gradient_checkpointing = false;
  DecayRule decay;
  OptimizerConfig optimizer;
  Schedule schedule;
  DataConfig data;
  std::string model_json;  // a config.json without vocab_size and ids of special tokens
  std::string text;        // all of it, as YAML with everything resolved
};

// Reads a file and those it builds on, with "key=value" overrides. Throws Error naming the file and
// line of an unknown key, of a value of another type, or of intervals that are no whole steps.
Config load_config(const std::string& path, std::span<const std::string> overrides = {});

// The config.json of the model to train on data of this vocabulary.
std::string model_config(const Config& config, std::int32_t vocab_size, std::int32_t bos);

}  // namespace deltafox::train
