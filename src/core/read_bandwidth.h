// How fast this machine reads memory, to measure decoding against.
#pragma once

#include <cstddef>
#include <vector>

#include "core/buffer.h"
#include "core/thread_pool.h"

namespace deltafox {

// Memory of its own on huge pages, read by all threads of a pool, along several streams each and
// with prefetching: what the machine can do, not what a plain loop gets.
class ReadBandwidth {
 public:
  // Far more than the caches hold, for a figure that means memory.
  static constexpr std::size_t kDefaultBytes = std::size_t{1} << 30;

  explicit ReadBandwidth(std::size_t bytes = kDefaultBytes);

  // Bytes per second of each pass over the memory; passes >= 1.
  std::vector<double> measure(ThreadPool& threads, int passes) const;

 private:
  Buffer data_;
};

}  // namespace deltafox
