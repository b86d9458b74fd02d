// What several subcommands share: options that name a model, ids and texts on the command line.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "deltafox/model.h"
#include "deltafox/tokenizer.h"

namespace deltafox::app {

// --model and --revision.
class CheckpointOptions {
 public:
  void add(CLI::App& command);

  // The checkpoint's directory. Throws Error if neither the disk nor the cache holds it.
  std::string directory() const;
  const std::string& revision() const { return revision_; }

 private:
  std::string model_;
  std::string revision_ = "main";
};

// Those, and --dtype, --device, --threads and --copy-weights: how a model is loaded.
class ModelOptions {
 public:
  void add(CLI::App& command);

  std::string directory() const { return checkpoint_.directory(); }
  int threads() const { return threads_; }
  std::optional<DType> dtype() const;
  Device device() const;
  Model load(const std::string& directory) const;

 private:
  CheckpointOptions checkpoint_;
  std::string dtype_ = "auto";
  int threads_ = 0;
  std::string device_ = "cpu";
  bool copy_weights_ = false;
};

// cpu or cuda; what --device says.
Device device_named(const std::string& name);

// float32, bfloat16, float16, as PyTorch calls them; int8 and int4, the packed forms.
DType dtype_named(const std::string& name);
std::string_view torch_name(DType dtype);

// A check of options that are whole numbers: the complaint, or nothing. CLI11 by itself takes -1
// for a large unsigned number, 010 for 8, and cuts off what is out of range.
template <typename Int>
std::string whole_number(const std::string& text) {
  Int value{};
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  const bool octal = text.size() > 1 && text.front() == '0';
  if (error == std::errc() && rest == end && !octal) return {};
  return (std::is_signed_v<Int> ? "must be a whole number, got '"
                                : "must be a whole number >= 0, got '") +
         text + "'";
}

// Whether the directory holds a tokenizer's files.
bool has_tokenizer(const std::string& directory);

// "1,2,3" or "1 2 3". Throws Error naming `source` and the entry that is no id.
std::vector<std::int32_t> parse_ids(std::string_view text, const std::string& source);
// "1,2,3"
std::string format_ids(std::span<const std::int32_t> ids);

// A whole text file; "-" is stdin.
std::string read_input(const std::string& path);

// The one sequence that a command reads: --text or --input-ids.
class SequenceOptions {
 public:
  void add(CLI::App& command);

  bool given() const { return text_ || input_ids_; }
  // Throws Error if it is empty, or if both are given.
  std::vector<std::int32_t> ids(const std::string& directory) const;

 private:
  std::optional<std::string> text_;
  std::optional<std::string> input_ids_;
};

}  // namespace deltafox::app
