#include "train/checkpoint.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/float_convert.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace deltafox::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kState = "deltafox_training";
constexpr const char* kConfig = "config";
constexpr const char* kTokenizer = "tokenizer";
constexpr const char* kLosses = "loss_sums_float64";
constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 60;
constexpr std::size_t kMaxTokenizerFile = std::size_t{256} << 20;

// The tokens in a checkpoint's name, if it is one.
std::optional<std::int64_t> tokens_of(const fs::path& path) {
  constexpr std::string_view kHead = "step-";
  constexpr std::string_view kTail = ".safetensors";
  const std::string name = path.filename().string();
  if (!name.starts_with(kHead) || !name.ends_with(kTail)) return std::nullopt;
  std::int64_t tokens = 0;
  const char* const begin = name.data() + kHead.size();
  const char* const end = name.data() + name.size() - kTail.size();
  const auto [rest, error] = std::from_chars(begin, end, tokens);
  if (begin == end || error != std::errc() || rest != end) return std::nullopt;
  return tokens;
}

std::vector<std::pair<std::int64_t, fs::path>> checkpoints_in(const fs::path& directory) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  if (!fs::is_directory(directory)) return found;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (const auto tokens = tokens_of(entry.path())) found.emplace_back(*tokens, entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

// One of the weights, m or v of an entry.
const float* read_tensor(const io::SafetensorsFile& file, const std::string& name,
                         const Shape& shape) {
  const ConstTensorView view = file.view(name);
  if (view.dtype != DType::kF32 || view.shape != shape) {
    fail("{}: tensor '{}': is not F32 of shape {}", file.path(), name, to_string(shape));
  }
  return view.f32();
}

const std::string& metadata(const io::SafetensorsFile& file, const char* key) {
  const auto found = file.metadata().find(key);
  if (found == file.metadata().end()) fail("{}: is no training checkpoint", file.path());
  return found->second;
}

void write_text(const fs::path& path, const std::string& text) {
  io::AtomicFile file(path.string());
  file.append(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace

std::string checkpoint_path(const std::string& run_directory, std::int64_t tokens) {
  return fmt::format("{}/checkpoints/step-{:015}.safetensors", run_directory, tokens);
}

std::optional<std::string> newest_checkpoint(const std::string& run_directory) {
  const auto found = checkpoints_in(fs::path(run_directory) / "checkpoints");
  if (found.empty()) return std::nullopt;
  return found.back().second.string();
}

Progress load_checkpoint(const std::string& path, Parameters& parameters, LossByPosition& losses) {
  const io::SafetensorsFile file = io::SafetensorsFile::open(path);
  const io::JsonObject state = io::JsonObject::parse(metadata(file, kState), path);
  state.integer("version", 0, kVersion, kVersion);
  for (Parameters::Entry& entry : parameters.entries()) {
    const Shape& shape = entry.param->shape;
    parameters.set_weight(entry, read_tensor(file, "weights." + entry.name, shape));
    if (!entry.trained) continue;
    entry.m.read_from(read_tensor(file, "m." + entry.name, shape));
    entry.v.read_from(read_tensor(file, "v." + entry.name, shape));
  }
  const io::TensorEntry* sums = file.find(kLosses);
  const std::size_t bytes = losses.sums().size() * sizeof(double);
  // Of windows of another length: what they summed up does not go on.
  if (sums != nullptr && sums->bytes == bytes) {
    std::memcpy(losses.sums().data(), sums->data, bytes);
    losses.set_windows(state.integer("loss_windows", 0, 0, kMaxCount));
  }
  return {.tokens = state.integer("tokens", 0, 0, kMaxCount),
          .steps = state.integer("steps", 0, 0, kMaxCount),
          .seconds = state.number("seconds", 0, 0, 1e15)};
}

void export_checkpoint(const std::string& path, const std::string& directory, DType dtype,
                       ThreadPool& threads) {
  constexpr std::string_view kWeights = "weights.";
  constexpr std::int64_t kPiece = std::int64_t{1} << 16;
  const io::SafetensorsFile file = io::SafetensorsFile::open(path);
  auto config = nlohmann::ordered_json::parse(metadata(file, kConfig));
  config["torch_dtype"] = dtype == DType::kBF16  ? "bfloat16"
                          : dtype == DType::kF16 ? "float16"
                                                 : "float32";
  fs::create_directories(directory);

  std::vector<io::TensorDeclaration> tensors;
  for (const io::TensorEntry& entry : file.tensors()) {
    if (!entry.name.starts_with(kWeights)) continue;
    tensors.push_back({entry.name.substr(kWeights.size()), dtype, file.view(entry.name).shape});
  }
  const fs::path root(directory);
  io::SafetensorsWriter writer((root / "model.safetensors").string(), tensors, {{"format", "pt"}},
                               io::SafetensorsWriter::kCacheLine);
  for (const io::TensorDeclaration& tensor : tensors) {
    const ConstTensorView from = file.view(std::string(kWeights) + tensor.name);
    Tensor to(dtype, from.shape);
    const std::int64_t size = from.shape.size();
    threads.parallel_for((size + kPiece - 1) / kPiece, [&](std::int64_t task) {
      const std::int64_t begin = task * kPiece;
      const std::int64_t count = std::min(kPiece, size - begin);
      auto* data = static_cast<std::byte*>(to.view().data);
      convert({from.f32() + begin, DType::kF32, {count}},
              {data + static_cast<std::size_t>(begin) * size_of(dtype), dtype, {count}});
    });
    writer.write(tensor.name, {static_cast<const std::byte*>(to.view().data), to.bytes()});
  }
  writer.finish();
  write_text(root / "config.json", config.dump(2) + "\n");

  const fs::path tokenizer(metadata(file, kTokenizer));
  for (const char* name : {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json"}) {
    if (tokenizer.empty() || !fs::exists(tokenizer / name)) continue;
    write_text(root / name, io::read_text_file((tokenizer / name).string(), kMaxTokenizerFile));
  }
}

CheckpointWriter::CheckpointWriter(std::string run_directory, std::int64_t keep_interval,
                                   ModelDescription model)
    : directory_(std::move(run_directory)),
      keep_interval_(keep_interval),
      model_(std::move(model)) {
  fs::create_directories(fs::path(directory_) / "checkpoints");
}

CheckpointWriter::~CheckpointWriter() {
  if (writing_.valid()) writing_.wait();
}

void CheckpointWriter::save(const Progress& progress, const Parameters& parameters,
                            const LossByPosition& losses, ThreadPool& threads) {
  wait();
  if (copies_.empty()) {
    for (const Parameters::Entry& entry : parameters.entries()) {
      const Shape& shape = entry.param->shape;
      copies_.push_back({"weights." + entry.name, Tensor(DType::kF32, shape)});
      if (!entry.trained) continue;
      copies_.push_back({"m." + entry.name, Tensor(DType::kF32, shape)});
      copies_.push_back({"v." + entry.name, Tensor(DType::kF32, shape)});
    }
    const auto bytes = static_cast<std::int64_t>(losses.sums().size() * sizeof(double));
    copies_.push_back({kLosses, Tensor(DType::kU8, {bytes})});
  }
  std::vector<const Tensor*> sources;
  for (const Parameters::Entry& entry : parameters.entries()) {
    sources.push_back(&entry.weight);
    if (!entry.trained) continue;
    sources.push_back(&entry.m);
    sources.push_back(&entry.v);
  }
  threads.parallel_for(std::ssize(sources), [&](std::int64_t i) {
    const auto at = static_cast<std::size_t>(i);
    sources[at]->write_to(copies_[at].tensor.f32());
  });
  copies_.back().tensor.read_from(losses.sums().data());
  const nlohmann::ordered_json state{{"version", kVersion},
                                     {"tokens", progress.tokens},
                                     {"steps", progress.steps},
                                     {"seconds", progress.seconds},
                                     {"loss_windows", losses.windows()}};
  writing_path_ = checkpoint_path(directory_, progress.tokens);
  writing_ = std::async(std::launch::async, [this, path = writing_path_, text = state.dump(),
                                             tokens = progress.tokens] {
    write(path, text);
    remove_old(tokens);
  });
}

void CheckpointWriter::write(const std::string& path, const std::string& state) const {
  std::vector<io::TensorDeclaration> tensors;
  for (const Copied& copy : copies_) {
    const ConstTensorView view = copy.tensor.view();
    tensors.push_back({copy.name, view.dtype, view.shape});
  }
  io::SafetensorsWriter writer(
      path, tensors,
      {{kState, state}, {kConfig, model_.config_json}, {kTokenizer, model_.tokenizer_directory}});
  for (const Copied& copy : copies_) {
    writer.write(copy.name,
                 {static_cast<const std::byte*>(copy.tensor.view().data), copy.tensor.bytes()});
  }
  writer.finish();
}

void CheckpointWriter::remove_old(std::int64_t newest) const {
  for (const auto& [tokens, path] : checkpoints_in(fs::path(directory_) / "checkpoints")) {
    if (tokens >= newest || (keep_interval_ > 0 && tokens % keep_interval_ == 0)) continue;
    std::error_code ignored;  // it only takes room
    fs::remove(path, ignored);
  }
}

void CheckpointWriter::wait() {
  if (!writing_.valid()) return;
  writing_.get();
  last_ = writing_path_;
}

void CheckpointWriter::clear() {
  for (const auto& found : checkpoints_in(fs::path(directory_) / "checkpoints")) {
    fs::remove(found.second);
  }
}

}  // namespace deltafox::train
