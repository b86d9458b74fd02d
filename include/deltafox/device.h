// Where a model lives and computes.
#pragma once

#include <cstdint>
#include <string_view>

namespace deltafox {

enum class Device : std::uint8_t { kCpu, kCuda };

// "cpu", "cuda"
constexpr std::string_view name_of(Device device) {
  return device == Device::kCpu ? "cpu" : "cuda";
}

}  // namespace deltafox
