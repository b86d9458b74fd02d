#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/error.h"
#include "deltafox/generate.h"
#include "io/file.h"
#include "io/json.h"

namespace deltafox {

namespace {

using Json = nlohmann::json;

// Each converts a JSON value, or returns false if it is of the wrong type; `expected` says what is
// right.
struct Converter {
  const char* expected = "";

  bool operator()(const Json& value, bool& out) {
    expected = "true or false";
    if (!value.is_boolean()) return false;
    out = value.get<bool>();
    return true;
  }
  template <typename Int>
  requires std::is_integral_v<Int>
  bool operator()(const Json& value, Int& out) {
    expected = sizeof(Int) == 8 ? "an integer" : "a 32-bit integer";
    if (value.is_number_unsigned()) {
      const auto number = value.get<std::uint64_t>();
      if (!std::in_range<Int>(number)) return false;
      out = static_cast<Int>(number);
      return true;
    }
    if (!value.is_number_integer()) return false;
    const auto number = value.get<std::int64_t>();
    if (!std::in_range<Int>(number)) return false;
    out = static_cast<Int>(number);
    return true;
  }
  bool operator()(const Json& value, double& out) {
    expected = "a number";
    if (!value.is_number()) return false;
    out = value.get<double>();
    return true;
  }
  bool operator()(const Json& value, std::string& out) {
    expected = "a string";
    if (!value.is_string()) return false;
    out = value.get<std::string>();
    return true;
  }
  bool operator()(const Json& value, EarlyStopping& out) {
    expected = "true, false or \"never\"";
    if (value.is_boolean()) {
      out = value.get<bool>() ? EarlyStopping::kTrue : EarlyStopping::kFalse;
      return true;
    }
    out = EarlyStopping::kNever;
    return value == "never";
  }
  template <typename T>
  bool operator()(const Json& value, std::optional<T>& out) {
    return (*this)(value, out.emplace());
  }
  // A list, or one value that stands for a list of one.
  template <typename T>
  bool operator()(const Json& value, std::vector<T>& out) {
    const auto read_one = [&](const Json& element) { return (*this)(element, out.emplace_back()); };
    if (!value.is_array()) return read_one(value);
    for (const Json& element : value) {
      if (!read_one(element)) return false;
    }
    return true;
  }
};

void require(bool holds, const char* option, const char* allowed, const auto& got) {
  if (!holds) fail("{}: must be {}, got {}", option, allowed, got);
}

// False for NaN.
bool within(double value, double low, double high) {
  return value >= low && value <= high;
}

}  // namespace

GenerationConfig GenerationConfig::from_json(std::string_view text, const std::string& source) {
  const Json json = io::parse_json(text, source, io::JsonDialect::kPython);
  if (!json.is_object()) fail("{}: must be a JSON object", source);

  GenerationConfig config;
  const auto read = [&](const char* key, auto& value) {
    const auto found = json.find(key);
    if (found == json.end() || found->is_null()) return;
    Converter convert;
    if (convert(*found, value)) return;
    const std::string got = found->dump(-1, ' ', false, Json::error_handler_t::replace);
    fail("{}: key '{}': must be {}, got {}", source, key, convert.expected, io::printable(got));
  };
  read("max_new_tokens", config.max_new_tokens);
  read("max_length", config.max_length);
  read("min_new_tokens", config.min_new_tokens);
  read("min_length", config.min_length);
  read("do_sample", config.do_sample);
  read("temperature", config.temperature);
  read("top_k", config.top_k);
  read("top_p", config.top_p);
  read("min_p", config.min_p);
  read("typical_p", config.typical_p);
  read("epsilon_cutoff", config.epsilon_cutoff);
  read("eta_cutoff", config.eta_cutoff);
  read("renormalize_logits", config.renormalize_logits);
  read("repetition_penalty", config.repetition_penalty);
  read("no_repeat_ngram_size", config.no_repeat_ngram_size);
  read("num_beams", config.num_beams);
  read("length_penalty", config.length_penalty);
  read("early_stopping", config.early_stopping);
  read("num_return_sequences", config.num_return_sequences);
  read("eos_token_id", config.eos_token_id);
  read("pad_token_id", config.pad_token_id);
  read("stop_strings", config.stop_strings);
  read("seed", config.seed);
  read("output_logprobs", config.output_logprobs);
  return config;
}

GenerationConfig GenerationConfig::load(const std::string& directory) {
  const std::string path = (std::filesystem::path(directory) / "generation_config.json").string();
  if (!std::filesystem::exists(path)) return {};
  constexpr std::size_t kMaxBytes = 1 << 20;
  return from_json(io::read_text_file(path, kMaxBytes), path);
}

void GenerationConfig::validate() const {
  if (max_new_tokens) require(*max_new_tokens >= 1, "max_new_tokens", ">= 1", *max_new_tokens);
  if (max_length) require(*max_length >= 1, "max_length", ">= 1", *max_length);
  require(min_new_tokens >= 0, "min_new_tokens", ">= 0", min_new_tokens);
  require(min_length >= 0, "min_length", ">= 0", min_length);
  if (max_new_tokens && min_new_tokens > *max_new_tokens) {
    fail("min_new_tokens: must be at most max_new_tokens ({}), got {}", *max_new_tokens,
         min_new_tokens);
  }

  require(temperature > 0 && std::isfinite(temperature), "temperature",
          "> 0 (for the likeliest token, turn do_sample off)", temperature);
  require(top_k >= 0, "top_k", ">= 0", top_k);
  require(within(top_p, 0, 1), "top_p", "in [0, 1]", top_p);
  if (min_p) require(within(*min_p, 0, 1), "min_p", "in [0, 1]", *min_p);
  require(within(typical_p, 0, 1) && typical_p > 0, "typical_p", "in (0, 1]", typical_p);
  require(within(epsilon_cutoff, 0, 1) && epsilon_cutoff < 1, "epsilon_cutoff", "in [0, 1)",
          epsilon_cutoff);
  require(within(eta_cutoff, 0, 1) && eta_cutoff < 1, "eta_cutoff", "in [0, 1)", eta_cutoff);
  require(repetition_penalty > 0, "repetition_penalty", "> 0", repetition_penalty);
  // Beyond these, quotients of ordinary logits would not be finite float32 numbers.
  constexpr double kTiny = 1e-10;
  require(temperature >= kTiny, "temperature", ">= 1e-10", temperature);
  require(within(repetition_penalty, kTiny, 1 / kTiny), "repetition_penalty", "in [1e-10, 1e10]",
          repetition_penalty);
  require(no_repeat_ngram_size >= 0, "no_repeat_ngram_size", ">= 0", no_repeat_ngram_size);

  require(num_beams >= 1 && num_beams <= 1024, "num_beams", "in [1, 1024]", num_beams);
  require(std::isfinite(length_penalty), "length_penalty", "finite", length_penalty);
  require(num_return_sequences >= 1 && num_return_sequences <= 4096, "num_return_sequences",
          "in [1, 4096]", num_return_sequences);
  if (num_beams > 1 && num_return_sequences > num_beams) {
    fail("num_return_sequences: must be at most num_beams ({}), got {}", num_beams,
         num_return_sequences);
  }
  if (num_beams == 1 && !do_sample) {
    require(num_return_sequences == 1, "num_return_sequences",
            "1 for greedy search (set do_sample, or num_beams > 1)", num_return_sequences);
  }

  for (const std::int32_t id : eos_token_id.value_or(std::vector<std::int32_t>())) {
    require(id >= 0, "eos_token_id", ">= 0", id);
  }
  if (pad_token_id) require(*pad_token_id >= 0, "pad_token_id", ">= 0", *pad_token_id);
  for (const std::string& stop : stop_strings) {
    if (stop.empty()) fail("stop_strings: must not hold an empty string");
  }
}

}  // namespace deltafox
