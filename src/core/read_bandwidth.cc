#include "core/read_bandwidth.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <chrono>
#include <cstdint>
#include <cstring>

namespace deltafox {
namespace {

constexpr std::size_t kStreams = 4;
constexpr std::size_t kWords = 16;                          // two cache lines of a stream at a time
constexpr std::size_t kAhead = 64;                          // words from a read to its prefetch
constexpr std::size_t kPieceWords = std::size_t{16} << 17;  // 16 MiB a task

// The sum of `size` words, a multiple of kStreams · kWords, read along kStreams streams at once.
std::uint64_t sum(const std::uint64_t* data, std::size_t size) {
  std::array<std::uint64_t, kWords> sums{};
  const std::size_t stream = size / kStreams;
  for (std::size_t at = 0; at < stream; at += kWords) {
    for (std::size_t s = 0; s < kStreams; ++s) {
      const std::uint64_t* const words = data + s * stream + at;
      __builtin_prefetch(words + kAhead);
      __builtin_prefetch(words + kAhead + kWords / 2);
      for (std::size_t w = 0; w < kWords; ++w) sums[w] += words[w];
    }
  }
  std::uint64_t total = 0;
  for (const std::uint64_t part : sums) total += part;
  return total;
}

}  // namespace

ReadBandwidth::ReadBandwidth(std::size_t bytes)
    : data_(std::max<std::size_t>(1, bytes / (kPieceWords * 8)) * kPieceWords * 8) {
  // Pages that were never written may all be the same one.
  std::memset(data_.data(), 1, data_.size());
}

std::vector<double> ReadBandwidth::measure(ThreadPool& threads, int passes) const {
  assert(passes >= 1);
  const auto* const words = reinterpret_cast<const std::uint64_t*>(data_.data());
  const std::size_t pieces = data_.size() / (kPieceWords * 8);
  std::atomic<std::uint64_t> total{0};  // keeps the reading from being optimised away
  std::vector<double> rates;
  for (int pass = 0; pass < passes; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    threads.parallel_for(static_cast<std::int64_t>(pieces), [&](std::int64_t i) {
      total += sum(words + static_cast<std::size_t>(i) * kPieceWords, kPieceWords);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    rates.push_back(static_cast<double>(data_.size()) / seconds.count());
  }
  return total.load() > 0 ? rates : std::vector<double>{};
}

}  // namespace deltafox
