// When kernels write past the caches.
#pragma once

#include <cstdint>

namespace deltafox::cpu {

// What a call that writes more than this wrote will have left the caches when it is read. Stores
// that go past them need not read the lines first.
constexpr std::int64_t kStreamedBytes = std::int64_t{4} << 20;

}  // namespace deltafox::cpu
