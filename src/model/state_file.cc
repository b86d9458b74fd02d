#include "model/state_file.h"

#include <charconv>
#include <cstring>
#include <map>

#include "core/error.h"
#include "io/safetensors.h"

namespace deltafox {
namespace {

constexpr const char* kFormat = "deltafox-state";
constexpr const char* kVersion = "1";

// visit("layers.<l>.<name>", Tensor&)
template <typename Visitor>
void visit_tensors(SequenceState& state, Visitor&& visit) {
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    std::visit(
        [&](auto& layer) {
          layer.visit([&](const char* name, Tensor& tensor) {
            if (tensor.bytes() > 0) visit(fmt::format("layers.{}.{}", l, name), tensor);
          });
        },
        state.layers[l]);
  }
}

}  // namespace

void write_state(SequenceState& state, const std::string& model_hash, const std::string& path) {
  std::vector<io::TensorDeclaration> tensors;
  visit_tensors(state, [&](const std::string& name, Tensor& tensor) {
    tensors.push_back({name, tensor.view().dtype, tensor.view().shape});
  });
  io::SafetensorsWriter writer(path, tensors,
                               {{"format", kFormat},
                                {"version", kVersion},
                                {"model", model_hash},
                                {"position", std::to_string(state.position)}});
  visit_tensors(state, [&](const std::string& name, Tensor& tensor) {
    writer.write(name, {static_cast<const std::byte*>(tensor.view().data), tensor.bytes()});
  });
  writer.finish();
}

void read_state(const std::string& path, const std::string& model_hash, SequenceState& state) {
  const io::SafetensorsFile file = io::SafetensorsFile::open(path);
  const std::map<std::string, std::string>& metadata = file.metadata();
  const auto value = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  if (value("format") != kFormat) fail("{}: not a deltafox state file", path);
  if (value("version") != kVersion) {
    fail("{}: state file of version '{}', this program reads version {}", path, value("version"),
         kVersion);
  }
  if (value("model") != model_hash) {
    fail("{}: the state belongs to another model (hash {}, this model's is {})", path,
         value("model"), model_hash);
  }
  const std::string position = value("position");
  const auto [end, error] =
      std::from_chars(position.data(), position.data() + position.size(), state.position);
  if (error != std::errc() || end != position.data() + position.size() || state.position < 0) {
    fail("{}: metadata 'position' must be a count of tokens, got '{}'", path, position);
  }
  visit_tensors(state, [&](const std::string& name, Tensor& tensor) {
    const ConstTensorView stored = file.view(name);
    const TensorView view = tensor.view();
    if (stored.shape != view.shape || stored.dtype != view.dtype) {
      fail("{}: tensor '{}' is {} {}, expected {} {}", path, name, name_of(stored.dtype),
           to_string(stored.shape), name_of(view.dtype), to_string(view.shape));
    }
    std::memcpy(view.data, stored.data, tensor.bytes());
  });
}

}  // namespace deltafox
