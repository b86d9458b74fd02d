// Any text is either read as generation options or refused with an Error.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "deltafox/error.h"
#include "deltafox/generate.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    deltafox::GenerationConfig::from_json(text, "generation_config.json").validate();
  } catch (const deltafox::Error&) {
    return 0;
  }
  return 0;
}
