// The options of GenerationConfig on the command line, under the names of transformers.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "common.h"
#include "deltafox/generate.h"

namespace deltafox::app {

class GenerationOptions {
 public:
  void add(CLI::App& command);

  // The checkpoint's generation_config.json with what the command line says instead.
  GenerationConfig config(const std::string& directory) const;

 private:
  template <typename T>
  struct ValueOf {
    using Type = T;
  };
  template <typename T>
  struct ValueOf<std::optional<T>> {
    using Type = T;
  };

  // An option that sets `member` if it is given.
  template <typename T>
  CLI::Option* add(CLI::App& command, const std::string& name, T GenerationConfig::*member,
                   const std::string& help) {
    using Value = typename ValueOf<T>::Type;
    CLI::Option* const option = command.add_option_function<Value>(
        name,
        [this, member](const Value& value) {
          overrides_.emplace_back([=](GenerationConfig& config) { config.*member = value; });
        },
        help);
    if constexpr (std::is_integral_v<Value>) option->check(whole_number<Value>);
    return option->type_name(std::is_floating_point_v<Value> ? "X" : "N");
  }

  void add_lengths(CLI::App& command);
  void add_sampling(CLI::App& command);
  void add_beams(CLI::App& command);
  void add_endings(CLI::App& command);

  std::vector<std::function<void(GenerationConfig&)>> overrides_;
};

}  // namespace deltafox::app
