#include "model/arch/common.h"

#include "core/error.h"

namespace deltafox::arch {

std::int64_t hidden_ratio_size(const io::JsonObject& config, const char* key,
                               std::int64_t hidden_size, double default_ratio) {
  const double ratio = config.optional_number(key, default_ratio, 1e-3, 1e3).value_or(4);
  const auto wanted = static_cast<std::int64_t>(static_cast<double>(hidden_size) * ratio * 2 / 3);
  return (wanted + 255) / 256 * 256;
}

std::int64_t intermediate_size(const io::JsonObject& config, std::int64_t hidden_size,
                               double default_ratio) {
  const auto given = config.optional_integer("intermediate_size", std::nullopt, 1, kMaxWidth);
  return given ? *given : hidden_ratio_size(config, "hidden_ratio", hidden_size, default_ratio);
}

Activation hidden_activation(const io::JsonObject& config, const char* default_name) {
  const std::string name = config.choice("hidden_act", default_name, {"swish", "silu", "sigmoid"});
  return name == "sigmoid" ? Activation::kSigmoid : Activation::kSilu;
}

Init time_step_bias_init(const io::JsonObject& config) {
  const double min = config.number("time_step_min", 0.001, 1e-9, 1e3);
  const double max = config.number("time_step_max", 0.1, 1e-9, 1e3);
  const double floor = config.number("time_step_floor", 1e-4, 0, 1e3);
  if (min > max) fail("{}: key 'time_step_min': is above time_step_max", config.file());
  return Init::time_step_bias(min, max, floor);
}

}  // namespace deltafox::arch
