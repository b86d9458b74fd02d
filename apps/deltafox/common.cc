#include "common.h"

#include <fmt/ranges.h>

#include <array>
#include <charconv>
#include <filesystem>
#include <span>

#include "core/error.h"
#include "deltafox/hub.h"
#include "io/file.h"
#include "io/json.h"

namespace deltafox::app {
namespace {

struct NamedDType {
  const char* name;
  DType dtype;
};

constexpr std::array kDTypes{NamedDType{"float32", DType::kF32},
                             NamedDType{"bfloat16", DType::kBF16},
                             NamedDType{"float16", DType::kF16}, NamedDType{"int8", DType::kQ8},
                             NamedDType{"int4", DType::kQ4}};

}  // namespace

DType dtype_named(const std::string& name) {
  for (const NamedDType& known : kDTypes) {
    if (name == known.name) return known.dtype;
  }
  fail("--dtype: must be float32, bfloat16, float16, int8 or int4, got '{}'", io::printable(name));
}

Device device_named(const std::string& name) {
  for (const Device device : {Device::kCpu, Device::kCuda}) {
    if (name == name_of(device)) return device;
  }
  fail("--device: must be cpu or cuda, got '{}'", io::printable(name));
}

std::string_view torch_name(DType dtype) {
  for (const NamedDType& known : kDTypes) {
    if (dtype == known.dtype) return known.name;
  }
  return name_of(dtype);
}

void CheckpointOptions::add(CLI::App& command) {
  command
      .add_option("-m,--model", model_,
                  "Checkpoint directory, or the hub id of one that `deltafox pull` fetched")
      ->type_name("DIR|ID")
      ->required();
  command.add_option("--revision", revision_, "Branch, tag or commit of a hub id")
      ->type_name("NAME")
      ->capture_default_str();
}

std::string CheckpointOptions::directory() const {
  return hub::resolve(model_, revision_);
}

void ModelOptions::add(CLI::App& command) {
  checkpoint_.add(command);
  command
      .add_option(
          "--dtype", dtype_,
          "How the weight matrices are kept in memory: as stored (auto), float32, bfloat16, "
          "float16, int8 or int4")
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--device", device_, "Where to compute: cpu or cuda")
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--threads", threads_, "Threads; 0: one for each core")
      ->type_name("N")
      ->capture_default_str();
  command.add_flag("--copy-weights", copy_weights_,
                   "On a CPU, copy the weights into memory instead of mapping their files: loading "
                   "takes longer, each token less");
}

std::optional<DType> ModelOptions::dtype() const {
  if (dtype_ == "auto") return std::nullopt;
  return dtype_named(dtype_);
}

Device ModelOptions::device() const {
  return device_named(device_);
}

Model ModelOptions::load(const std::string& directory) const {
  return Model::load(
      directory,
      {.dtype = dtype(), .threads = threads_, .copy_weights = copy_weights_, .device = device()});
}

bool has_tokenizer(const std::string& directory) {
  const std::filesystem::path path(directory);
  return std::filesystem::exists(path / "vocab.json") ||
         std::filesystem::exists(path / "tokenizer.json");
}

std::vector<std::int32_t> parse_ids(std::string_view text, const std::string& source) {
  constexpr std::string_view kSeparators = ", \t\r\n";
  std::vector<std::int32_t> ids;
  while (true) {
    const std::size_t begin = text.find_first_not_of(kSeparators);
    if (begin == std::string_view::npos) return ids;
    const std::size_t end = std::min(text.find_first_of(kSeparators, begin), text.size());
    const std::string_view entry = text.substr(begin, end - begin);
    const auto [rest, error] =
        std::from_chars(entry.data(), entry.data() + entry.size(), ids.emplace_back());
    if (error != std::errc() || rest != entry.data() + entry.size()) {
      fail("{}: entry {}: '{}' is not a token id", source, ids.size() - 1, io::printable(entry));
    }
    text.remove_prefix(end);
  }
}

std::string format_ids(std::span<const std::int32_t> ids) {
  return fmt::format("{}", fmt::join(ids, ","));
}

std::string read_input(const std::string& path) {
  constexpr std::size_t kMaxBytes = std::size_t{1} << 30;
  return io::read_text_file(path == "-" ? "/dev/stdin" : path, kMaxBytes);
}

void SequenceOptions::add(CLI::App& command) {
  command.add_option("--text", text_, "A text to read")->type_name("TEXT");
  command.add_option("--input-ids", input_ids_, "Token ids to read, as in 464,3139,286")
      ->type_name("IDS");
}

std::vector<std::int32_t> SequenceOptions::ids(const std::string& directory) const {
  if (text_ && input_ids_) fail("--text, --input-ids: only one of them can be given");
  std::vector<std::int32_t> ids = input_ids_
                                      ? parse_ids(*input_ids_, "--input-ids")
                                      : Tokenizer::load(directory).encode(text_.value_or(""));
  if (ids.empty()) fail("{}: is empty", input_ids_ ? "--input-ids" : "--text");
  return ids;
}

}  // namespace deltafox::app
