// State files, read for a model of constant state and for one whose state grows with the position.
// What is accepted holds no more than the file.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "deltafox/error.h"
#include "io/json.h"
#include "model/registry.h"
#include "model/state_file.h"

namespace {

using namespace deltafox;

// A file in memory.
class File {
 public:
  explicit File(const void* data, std::size_t size) : fd_(memfd_create("state", MFD_CLOEXEC)) {
    if (fd_ < 0 || write(fd_, data, size) != static_cast<ssize_t>(size)) __builtin_trap();
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close(fd_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

CausalLM model_of(const char* config) {
  return build_model(io::JsonObject::parse(config, "fuzz"));
}

const std::string kHash = "fuzz";  // the seeds' model

bool accepted(const File& file, SequenceState& state) {
  try {
    read_state(file.path(), kHash, state);
    return true;
  } catch (const Error& error) {
    if (std::string_view(error.what()).find('\n') != std::string_view::npos) __builtin_trap();
    return false;
  }
}

void try_with(const CausalLM& model, const File& file, std::size_t size) {
  SequenceState state = model.new_state();
  if (!accepted(file, state)) return;
  std::size_t bytes = 0;
  for (MixerState& layer : state.layers) {
    std::visit(
        [&](auto& of_layer) {
          of_layer.visit([&](const char*, const StateTensor& tensor) { bytes += tensor.bytes(); });
        },
        layer);
  }
  if (state.position < 0 || bytes > size) __builtin_trap();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const CausalLM kConstant = model_of(
      R"({"model_type": "delta_net-project_fox", "hidden_size": 4, "num_heads": 1,
          "num_hidden_layers": 1, "vocab_size": 2})");
  static const CausalLM kGrowing = model_of(
      R"({"model_type": "forgetting_transformer-project_fox", "hidden_size": 2, "num_heads": 1,
          "num_hidden_layers": 1, "vocab_size": 2, "use_k_shift": true})");
  const File file(data, size);
  try_with(kConstant, file, size);
  try_with(kGrowing, file, size);
  return 0;
}
