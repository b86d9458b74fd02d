// What the tests of generation share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "deltafox/generate.h"
#include "deltafox/model.h"
#include "infer/golden.h"

namespace deltafox::test {

using Ids = std::vector<std::int32_t>;
using Prompts = std::vector<Ids>;

inline Model golden_model(const std::string& name, int threads = 1) {
  LoadOptions options;
  options.threads = threads;
  return Model::load(golden_path(name), options);
}

inline Model tiny_model(int threads = 1) {
  return golden_model("delta_net-tiny", threads);
}

// Without an end-of-sequence token.
inline GenerationConfig greedy(std::int64_t max_new_tokens) {
  GenerationConfig config;
  config.max_new_tokens = max_new_tokens;
  config.eos_token_id.emplace();
  return config;
}

}  // namespace deltafox::test
