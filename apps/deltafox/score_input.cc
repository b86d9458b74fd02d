#include "score_input.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>

#include "core/error.h"
#include "io/safetensors.h"

namespace deltafox::app {
namespace {

constexpr std::int64_t kRowsOfAGroup = 16;

template <typename Int>
std::vector<std::int64_t> widened(const io::TensorEntry& tensor) {
  std::vector<std::int64_t> values(tensor.bytes / sizeof(Int));
  for (std::size_t i = 0; i < values.size(); ++i) {
    Int value{};
    std::memcpy(&value, tensor.data + i * sizeof(Int), sizeof(Int));  // may be misaligned
    values[i] = value;
  }
  return values;
}

// A tensor [B, T] of integers.
std::vector<std::int64_t> integers(const io::SafetensorsFile& file, const char* name) {
  const io::TensorEntry* const tensor = file.find(name);
  if (tensor == nullptr) fail("{}: tensor '{}' is missing", file.path(), name);
  if (tensor->shape.size() != 2 || tensor->bytes == 0) {
    fail("{}: tensor '{}': must have a shape [B, T] with B and T >= 1, got rank {} and {} bytes",
         file.path(), name, tensor->shape.size(), tensor->bytes);
  }
  if (tensor->dtype_name == "I64") return widened<std::int64_t>(*tensor);
  if (tensor->dtype_name == "I32") return widened<std::int32_t>(*tensor);
  if (tensor->dtype_name == "U8" || tensor->dtype_name == "BOOL") {
    return widened<std::uint8_t>(*tensor);
  }
  fail("{}: tensor '{}': must hold integers (I64 or I32), got {}", file.path(), name,
       tensor->dtype_name);
}

}  // namespace

void ScoreInputOptions::add(CLI::App& command, bool with_labels) {
  with_labels_ = with_labels;
  command
      .add_option("-i,--input", file_,
                  with_labels
                      ? "safetensors file with input_ids and labels [B, T], and perhaps "
                        "attention_mask [B, T] (0: padding, on the left or on the right)"
                      : "safetensors file with input_ids [B, T], and perhaps attention_mask [B, T] "
                        "(0: padding, on the left or on the right)")
      ->type_name("FILE");
  sequence_.add(command);
}

ScoreInput ScoreInputOptions::read_file(const Model& model) const {
  const io::SafetensorsFile file = io::SafetensorsFile::open(*file_);
  const std::vector<std::int64_t> ids = integers(file, "input_ids");
  const std::vector<std::int64_t>& shape = file.find("input_ids")->shape;
  const auto same_shape = [&](const char* name) {
    std::vector<std::int64_t> values = integers(file, name);
    if (file.find(name)->shape != shape) {
      fail("{}: tensor '{}': must have the shape of input_ids, [{}, {}]", *file_, name, shape[0],
           shape[1]);
    }
    return values;
  };
  ScoreInput input{.rows = shape[0], .columns = shape[1]};
  if (file.contains("attention_mask")) {
    for (const std::int64_t value : same_shape("attention_mask")) {
      if (value != 0 && value != 1) {
        fail("{}: tensor 'attention_mask': must be 0 or 1, got {}", *file_, value);
      }
      input.attention_mask.push_back(static_cast<std::uint8_t>(value));
    }
  }
  // What stands at padding is of no importance.
  const auto checked = [&](const std::vector<std::int64_t>& values, const char* name,
                           std::int64_t min) {
    std::vector<std::int32_t> result;
    result.reserve(values.size());
    for (const std::int64_t value : values) {
      const auto place = static_cast<std::int64_t>(result.size());
      const bool token = input.is_token(place);
      if (token && (value < min || value >= model.info().vocab_size)) {
        fail("{}: tensor '{}': id {} at [{}, {}] is out of range, the vocabulary has {} entries",
             *file_, name, value, place / shape[1], place % shape[1], model.info().vocab_size);
      }
      result.push_back(token ? static_cast<std::int32_t>(std::max<std::int64_t>(value, -1)) : 0);
    }
    return result;
  };
  input.input_ids = checked(ids, "input_ids", 0);
  if (with_labels_) {
    input.labels =
        checked(same_shape("labels"), "labels", std::numeric_limits<std::int64_t>::min());
  }
  return input;
}

ScoreInput ScoreInputOptions::read_sequence(const Model& model,
                                            const std::string& directory) const {
  ScoreInput input{.rows = 1};
  input.input_ids = sequence_.ids(directory);
  input.columns = std::ssize(input.input_ids);
  if (with_labels_) {
    if (!model.info().bos_token_id) {
      fail("{}/config.json: key 'bos_token_id': must be set, for the loss of a text's first token",
           directory);
    }
    input.labels = input.input_ids;
    std::rotate(input.input_ids.begin(), input.input_ids.end() - 1, input.input_ids.end());
    input.input_ids.front() = *model.info().bos_token_id;
  }
  return input;
}

ScoreInput ScoreInputOptions::read(const Model& model, const std::string& directory) const {
  if (file_.has_value() == sequence_.given()) {
    fail("give either --input or one of --text and --input-ids");
  }
  return file_ ? read_file(model) : read_sequence(model, directory);
}

void for_each_group(
    const ScoreInput& input, const Model& model,
    const std::function<void(std::int64_t first_row, const infer::PaddedBatch& batch,
                             std::span<State* const> states)>& visit) {
  for (std::int64_t row = 0; row < input.rows; row += kRowsOfAGroup) {
    const std::int64_t rows = std::min(kRowsOfAGroup, input.rows - row);
    const auto begin = static_cast<std::size_t>(row * input.columns);
    const auto size = static_cast<std::size_t>(rows * input.columns);
    const auto mask = input.attention_mask.empty()
                          ? std::span<const std::uint8_t>()
                          : std::span(input.attention_mask).subspan(begin, size);
    const infer::PaddedBatch batch(std::span(input.input_ids).subspan(begin, size), mask, rows,
                                   row);
    std::vector<State> states(static_cast<std::size_t>(rows), model.new_state());
    std::vector<State*> pointers;
    pointers.reserve(states.size());
    for (State& state : states) pointers.push_back(&state);
    visit(row, batch, pointers);
  }
}

}  // namespace deltafox::app
