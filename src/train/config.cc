#include "train/config.h"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "core/error.h"
#include "io/yaml.h"
#include "model/registry.h"

namespace deltafox::train {
namespace {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 50;

// A model that a configuration can name: its keys and their defaults are those of a preset, except
// for the sizes, which have to be given.
struct ModelClass {
  const char* name;
  const char* preset;
  std::vector<const char*> required;
};

const std::vector<ModelClass>& model_classes() {
  static const std::vector<ModelClass> classes{
      {"delta_net", "delta_net-760m", {"hidden_size", "num_hidden_layers", "num_heads"}},
      {"forgetting_transformer",
       "fox_llama-760m",
       {"hidden_size", "num_hidden_layers", "num_heads"}},
      {"hgrn2", "hgrn2-760m", {"hidden_size", "num_hidden_layers", "expand_ratio"}},
      {"mamba2",
       "mamba2-760m",
       {"hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size"}},
      {"samba", "samba-760m", {"hidden_size", "num_hidden_layers", "rope_base", "attn"}},
      {"transformer",
       "transformer_llama-760m",
       {"hidden_size", "num_hidden_layers", "num_heads", "rope_base"}},
  };
  return classes;
}

// What the preset says, overridden by the keys of `given`, which the preset must have.
void override_keys(const io::YamlNode& given, const std::string& prefix,
                   nlohmann::ordered_json& json) {
  for (std::size_t i = 0; i < given.keys.size(); ++i) {
    const auto& [key, where] = given.keys[i];
    const io::YamlNode& value = given.items[i];
    const bool is_size = key == "vocab_size" || key == "model_type" || key == "architectures";
    if (is_size || !json.contains(key)) fail("{}: key '{}{}' is unknown", where, prefix, key);
    if (json[key].is_object() && value.kind == io::YamlNode::Kind::kMap) {
      override_keys(value, prefix + key + ".", json[key]);
    } else {
      json[key] = io::to_json(value);
    }
  }
}

std::string read_model(io::YamlMap model) {
  const std::string name = model.string("name");
  for (const ModelClass& known : model_classes()) {
    if (name != known.name) continue;
    auto json = nlohmann::ordered_json::parse(preset_config(known.preset));
    io::YamlMap sizes = model.map("config");
    for (const char* key : known.required) {
      if (!sizes.has(key)) {
        fail("{}: key '{}': is missing", model.where("config"), sizes.name(key));
      }
    }
    override_keys(*model.raw("config"), "model.config.", json);
    model.close();
    return json.dump(2) + "\n";
  }
  std::string names;
  for (const ModelClass& known : model_classes()) names += std::string(" ") + known.name;
  fail("{}: key 'model.name': '{}' is none of{}", model.where("name"), name, names);
}

OptimizerConfig read_optimizer(io::YamlMap map) {
  if (const std::string name = map.string("name", "adamw"); name != "adamw") {
    fail("{}: key 'optimizer.name': must be adamw, got {}", map.where("name"), name);
  }
  OptimizerConfig optimizer;
  optimizer.lr = map.number("lr", 0, 1e6);
  const std::vector<double> betas = map.numbers("betas", 0, 0.9999999);
  if (betas.size() != 2) fail("{}: key 'optimizer.betas': must be two numbers", map.where("betas"));
  optimizer.betas = {betas[0], betas[1]};
  optimizer.eps = map.number("eps", 0, 1, 1e-8);
  optimizer.weight_decay = map.number("weight_decay", 0, 1e6);
  map.close();
  return optimizer;
}

Schedule read_schedule(io::YamlMap map, double lr) {
  constexpr double kMax = 1e6;
  Schedule schedule;
  const std::string name = map.string("name");
  try {
    schedule.kind = schedule_named(name);
  } catch (const Error& error) {
    fail("{}: key 'schedule.name': {}", map.where("name"), error.what());
  }
  if (schedule.kind == Schedule::Kind::kConstant) {
    schedule.value = map.number("value", 0, kMax, lr);
  } else {
    schedule.init_value = map.number("init_value", 0, kMax, 0);
    schedule.peak_value = map.number("peak_value", 0, kMax, lr);
    schedule.end_value = map.number("end_value", 0, kMax, 0);
    schedule.warmup_steps = map.integer("warmup_steps", 0, kMaxTokens);
    const bool anneals = schedule.kind == Schedule::Kind::kWarmupOneMinusSqrt;
    std::int64_t& whole = anneals ? schedule.total_steps : schedule.decay_steps;
    const char* const key = anneals ? "total_steps" : "decay_steps";
    whole = map.integer(key, 1, kMaxTokens);
    if (anneals) schedule.anneal_steps = map.integer("anneal_steps", 0, kMaxTokens);
    if (whole < schedule.warmup_steps + schedule.anneal_steps) {
      fail("{}: key 'schedule.{}': {} is less than warmup_steps {}{}", map.where(key), key, whole,
           schedule.warmup_steps, anneals ? " and anneal_steps" : "");
    }
  }
  map.close();
  return schedule;
}

// The official keys that only distribute or debug the work are accepted.
DataConfig read_data(io::YamlMap map, const std::string& data_dir, bool skip_eval) {
  constexpr std::int64_t kMaxLength = std::int64_t{1} << 24;
  DataConfig data;
  const std::string name = map.string("name");
  if (name == "longcrawl64") {
    data.kind = DataConfig::Kind::kLongCrawl64;
    const std::string directory = map.string("data_dir", data_dir + "/longcrawl64");
    data.train_path = directory + "/train.zarr";
    data.eval_path = directory + "/heldout.zarr";
    data.tokenizer_path = map.string("tokenizer", "");
  } else if (name == "tokens") {
    data.kind = DataConfig::Kind::kTokens;
    const std::string directory = map.string("data_dir", data_dir);
    data.train_path = directory + "/train.tokens";
    data.eval_path = directory + "/heldout.tokens";
    data.tokenizer_path = map.string("tokenizer", directory);
  } else {
    fail("{}: key 'datamodule.name': must be longcrawl64 or tokens, got {}", map.where("name"),
         name);
  }
  data.train.length = map.integer("train_batch_len", 2, kMaxLength);
  data.train.size = map.integer("train_batch_size", 1, kMaxLength);
  data.eval.length = map.integer("eval_batch_len", 2, kMaxLength, data.train.length);
  data.eval.size = map.integer("eval_local_batch_size", 1, kMaxLength, 1);
  if (map.has("eval_tokens")) data.eval_tokens = map.integer("eval_tokens", 1, kMaxTokens);
  if (!skip_eval && data.kind == DataConfig::Kind::kLongCrawl64 && !data.eval_tokens) {
    fail("{}: key 'datamodule.eval_tokens': is missing", map.where("eval_tokens"));
  }
  for (const char* key : {"train_num_workers", "eval_num_workers"}) map.ignore(key);
  map.close();
  return data;
}

void read_train(io::YamlMap map, Config& config) {
  config.max_tokens = map.integer("max_tokens", 1, kMaxTokens);
  config.grad_acc_tokens = map.integer("grad_acc_tokens", 1, kMaxTokens);
  config.max_grad_norm = map.number("max_grad_norm", 1e-30, 1e30);
  config.gradient_checkpointing = map.boolean("gradient_checkpointing", false);
  config.decay.bias = map.boolean("bias_weight_decay", false);
  config.decay.normalization = map.boolean("normalization_weight_decay", false);
  config.decay.convolution = map.boolean("conv_weight_decay", true);
  map.close();
}

Precision read_precision(io::YamlMap map) {
  const std::string name = map.string("precision", "bf16-mixed");
  map.ignore("devices");
  map.close();
  if (name == "bf16-mixed") return Precision::kBF16Mixed;
  if (name == "32-true") return Precision::kF32;
  fail("{}: key 'fabric.precision': must be bf16-mixed or 32-true, got {}", map.where("precision"),
       name);
}

// Throws Error unless `value` is a multiple of `unit`, as the official script asks.
void check_multiple(const io::YamlMap& map, const char* key, std::int64_t value, std::int64_t unit,
                    const char* what) {
  if (value % unit != 0) {
    fail("{}: key '{}': {} is no multiple of {} {}", map.where(key), key, value, what, unit);
  }
}

void read_intervals(io::YamlMap& map, Config& config) {
  struct Interval {
    const char* key;
    std::int64_t Config::*value;
    std::int64_t default_value;
  };
  const std::array intervals{
      Interval{"log_interval", &Config::log_interval, config.data.train.tokens()},
      Interval{"train_eval_interval", &Config::train_eval_interval, config.max_tokens},
      Interval{"eval_interval", &Config::eval_interval, config.max_tokens},
      Interval{"checkpoint_interval", &Config::checkpoint_interval, config.max_tokens},
  };
  for (const Interval& interval : intervals) {
    const std::int64_t value = map.integer(interval.key, 1, kMaxTokens, interval.default_value);
    check_multiple(map, interval.key, value, config.data.train.tokens(), "the tokens of a step,");
    config.*interval.value = value;
  }
  const char* const keep = "checkpoint_keep_interval";
  if (!map.has(keep)) return;
  config.checkpoint_keep_interval = map.integer(keep, 1, kMaxTokens);
  check_multiple(map, keep, config.checkpoint_keep_interval, config.checkpoint_interval,
                 "checkpoint_interval");
}

void check_steps(const io::YamlMap& map, const Config& config) {
  const BatchShape& batch = config.data.train;
  const std::int64_t windows = std::max<std::int64_t>(1, config.grad_acc_tokens / batch.length);
  if (config.max_tokens % batch.tokens() != 0) {
    fail("{}: key 'train.max_tokens': {} is no multiple of the tokens of a step, {}",
         map.where("train"), config.max_tokens, batch.tokens());
  }
  if (config.grad_acc_tokens % batch.length != 0 ||
      (windows < batch.size && batch.size % windows != 0)) {
    fail(
        "{}: key 'train.grad_acc_tokens': a step of {} windows of {} tokens does not fall into "
        "parts of {} tokens",
        map.where("train"), batch.size, batch.length, config.grad_acc_tokens);
  }
}

}  // namespace

Config load_config(const std::string& path, std::span<const std::string> overrides) {
  const io::YamlNode tree = io::load_yaml(path, overrides);
  io::YamlMap map(tree);
  Config config;
  config.text = io::to_json(tree).dump(2) + "\n";  // JSON is YAML
  config.seed = static_cast<std::uint64_t>(
      map.integer("seed", 0, std::numeric_limits<std::int64_t>::max(), 0));
  config.output_dir = map.string("output_dir");
  const std::string data_dir = map.string("data_dir", ".");
  config.resume = map.boolean("resume", true);
  config.pretrained = map.string("pretrained", "");
  config.fork_dir = map.string("fork_dir", "");
  if (!config.fork_dir.empty()) config.fork_step = map.integer("fork_step", 0, kMaxTokens);
  map.ignore("fork_step");
  config.skip_eval = map.boolean("skip_eval", true);
  config.final_eval = map.boolean("final_eval", true);
  io::YamlMap eval = map.map("eval");
  config.min_val_length = eval.integer("min_val_length", 1, kMaxTokens, 512);
  eval.close();

  read_train(map.map("train"), config);
  config.precision = read_precision(map.map("fabric"));
  config.optimizer = read_optimizer(map.map("optimizer"));
  config.schedule = read_schedule(map.map("schedule"), config.optimizer.lr);
  config.data = read_data(map.map("datamodule"), data_dir, config.skip_eval);
  config.model_json = read_model(map.map("model"));
  check_steps(map, config);
  read_intervals(map, config);
  // Names for the run, and what spreads it over processes: the official script has a use for them.
  for (const char* key : {"exp", "tag", "wandb", "strategy"}) map.ignore(key);
  map.close();
  return config;
}

std::string model_config(const Config& config, std::int32_t vocab_size, std::int32_t bos) {
  auto json = nlohmann::ordered_json::parse(config.model_json);
  json["vocab_size"] = vocab_size;
  json["bos_token_id"] = bos;
  json["eos_token_id"] = bos;
  return json.dump(2) + "\n";
}

}  // namespace deltafox::train
