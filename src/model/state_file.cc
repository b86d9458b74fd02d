#include "model/state_file.h"

#include <charconv>
#include <cstring>
#include <map>
#include <utility>

#include "core/device.h"
#include "core/error.h"
#include "io/safetensors.h"

namespace deltafox {
namespace {

constexpr const char* kFormat = "deltafox-state";
constexpr const char* kStateVersion = "1";
// Bounds sizes computed from a position far inside 64 bits.
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 36;

// visit("layers.<l>.<name>", StateTensor)
template <typename Visitor>
void visit_tensors(SequenceState& state, Visitor&& visit) {
  for (std::size_t l = 0; l < state.layers.size(); ++l) {
    std::visit(
        [&](auto& layer) {
          layer.visit([&](const char* name, const StateTensor& tensor) {
            if (tensor.bytes() > 0) visit(fmt::format("layers.{}.{}", l, name), tensor);
          });
        },
        state.layers[l]);
  }
}

// Growing states get the room that they need at state.position.
void grow(SequenceState& state) {
  for (MixerState& layer : state.layers) {
    std::visit(
        [&](auto& of_layer) {
          if constexpr (requires { of_layer.grow_to(state.position); }) {
            of_layer.grow_to(state.position);
          }
        },
        layer);
  }
}

std::int64_t grown_bytes(const SequenceState& state) {
  std::int64_t bytes = 0;
  for (const MixerState& layer : state.layers) {
    std::visit(
        [&](const auto& of_layer) {
          if constexpr (requires { of_layer.bytes_at(state.position); }) {
            bytes += of_layer.bytes_at(state.position);
          }
        },
        layer);
  }
  return bytes;
}

}  // namespace

void write_state(SequenceState& state, const std::string& model_hash, const std::string& path) {
  std::vector<io::TensorDeclaration> tensors;
  visit_tensors(state, [&](const std::string& name, const StateTensor& tensor) {
    tensors.push_back({name, tensor.dtype(), tensor.shape()});
  });
  io::SafetensorsWriter writer(path, tensors,
                               {{"format", kFormat},
                                {"version", kStateVersion},
                                {"model", model_hash},
                                {"position", std::to_string(state.position)}});
  visit_tensors(state, [&](const std::string& name, const StateTensor& tensor) {
    const std::size_t bytes = tensor.bytes() / tensor.parts().size();
    std::vector<std::byte> host(state.device == Device::kCpu ? 0 : bytes);
    for (const TensorView& part : tensor.parts()) {
      if (!host.empty()) cuda::copy(host.data(), part.data, bytes);
      writer.write(name,
                   {host.empty() ? static_cast<const std::byte*>(part.data) : host.data(), bytes});
    }
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
  if (value("version") != kStateVersion) {
    fail("{}: state file of version '{}', this program reads version {}", path, value("version"),
         kStateVersion);
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
  // Before memory is taken for a position that the file could not hold.
  std::size_t stored_bytes = 0;
  for (const io::TensorEntry& tensor : file.tensors()) stored_bytes += tensor.bytes;
  if (state.position > kMaxPosition || std::cmp_greater(grown_bytes(state), stored_bytes)) {
    fail("{}: metadata 'position' is {}, more tokens than the file holds", path, state.position);
  }
  grow(state);
  visit_tensors(state, [&](const std::string& name, const StateTensor& tensor) {
    const ConstTensorView stored = file.view(name);
    if (stored.shape != tensor.shape() || stored.dtype != tensor.dtype()) {
      fail("{}: tensor '{}' is {} {}, expected {} {}", path, name, name_of(stored.dtype),
           to_string(stored.shape), name_of(tensor.dtype()), to_string(tensor.shape()));
    }
    const std::size_t bytes = tensor.bytes() / tensor.parts().size();
    const auto* from = static_cast<const std::byte*>(stored.data);
    for (const TensorView& part : tensor.parts()) {
      if (state.device == Device::kCpu) {
        std::memcpy(part.data, from, bytes);
      } else {
        cuda::copy(part.data, from, bytes);
      }
      from += bytes;
    }
  });
}

}  // namespace deltafox
