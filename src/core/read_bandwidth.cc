#include "core/read_bandwidth.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace deltafox {
namespace {

constexpr std::size_t kStreams = 4;
constexpr std::size_t kWords = 8;  // of a cache line

// The sum of `size` words, a multiple of kStreams · kWords, read along kStreams streams at once.
std::uint64_t sum(const std::uint64_t* data, std::size_t size) {
  std::array<std::uint64_t, kStreams * kWords> sums{};
  const std::size_t stream = size / kStreams;
  for (std::size_t at = 0; at < stream; at += kWords) {
    for (std::size_t s = 0; s < kStreams; ++s) {
      for (std::size_t w = 0; w < kWords; ++w) {
        sums[s * kWords + w] += data[s * stream + at + w];
      }
    }
  }
  std::uint64_t total = 0;
  for (const std::uint64_t part : sums) total += part;
  return total;
}

}  // namespace

double measure_read_bandwidth(ThreadPool& threads, std::size_t bytes) {
  constexpr int kPasses = 5;
  constexpr std::size_t kPieceWords = std::size_t{1} << 18;  // 2 MiB a task
  const std::size_t pieces =
      std::max<std::size_t>(1, bytes / (kPieceWords * sizeof(std::uint64_t)));
  // Ones, not zeros: pages that were never written may all be the same one.
  const std::vector<std::uint64_t> data(pieces * kPieceWords, 1);
  std::atomic<std::uint64_t> total{0};  // keeps the reading from being optimised away
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    threads.parallel_for(static_cast<std::int64_t>(pieces), [&](std::int64_t i) {
      total += sum(data.data() + static_cast<std::size_t>(i) * kPieceWords, kPieceWords);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(data.size() * sizeof(data[0])) / seconds.count());
  }
  return total.load() > 0 ? best : 0;
}

}  // namespace deltafox
