// Buffer, Scratch, ThreadPool.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "core/context.h"
#include "deltafox/error.h"

namespace deltafox {
namespace {

TEST(Buffer, IsZeroedAlignedAndCopiesItsContents) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{100}, std::size_t{5} << 20}) {
    Buffer buffer(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0U);
    for (std::size_t i = 0; i < bytes; ++i) ASSERT_EQ(buffer.data()[i], std::byte{0});
    buffer.data()[bytes - 1] = std::byte{7};
    const Buffer copy = buffer;
    buffer.data()[bytes - 1] = std::byte{8};
    EXPECT_EQ(copy.data()[bytes - 1], std::byte{7});
  }
}

// Of a size that is cut from larger pieces, in any order of use.
TEST(Buffer, IsZeroedAndItsOwnWhereSeveralSharePages) {
  std::mt19937 random(1);
  std::vector<Buffer> buffers;
  std::vector<std::byte> marks;
  for (int round = 0; round < 300; ++round) {
    if (round % 100 == 99) {  // all at once, so that pieces are used for another size
      buffers.clear();
      marks.clear();
    }
    if (buffers.size() == 40 || (!buffers.empty() && random() % 3 == 0)) {
      const std::size_t i = random() % buffers.size();
      std::swap(buffers[i], buffers.back());
      std::swap(marks[i], marks.back());
      const auto* bytes = buffers.back().data();
      const auto all_marked = [&](std::byte byte) { return byte == marks.back(); };
      ASSERT_TRUE(std::all_of(bytes, bytes + buffers.back().size(), all_marked));
      buffers.pop_back();
      marks.pop_back();
      continue;
    }
    Buffer& buffer = buffers.emplace_back((300 + 100 * (random() % 3)) * 1024);
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0U);
    const auto zero = [](std::byte byte) { return byte == std::byte{0}; };
    ASSERT_TRUE(std::all_of(buffer.data(), buffer.data() + buffer.size(), zero));
    marks.push_back(static_cast<std::byte>(1 + random() % 255));
    std::fill(buffer.data(), buffer.data() + buffer.size(), marks.back());
  }
}

TEST(Buffer, SaysHowMuchItCouldNotGet) {
  try {
    Buffer buffer(std::size_t{1} << 62);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "out of memory: 4611686018427387904 bytes could not be allocated");
  }
}

TEST(Scratch, GivesTheSameMemoryTheSecondTime) {
  ThreadPool threads(1);
  Context ctx(threads);
  const auto use = [&] {
    ScratchScope outer(ctx);
    const TensorView a = outer.tensor({1000, 1000});
    ScratchScope inner(ctx);
    const TensorView b = inner.tensor({500, 1000});
    EXPECT_NE(a.data, b.data);
    return std::pair(a.data, b.data);
  };
  use();
  const std::size_t capacity = ctx.scratch().capacity();
  const auto second = use();
  EXPECT_EQ(use(), second);
  EXPECT_EQ(ctx.scratch().capacity(), capacity);
}

TEST(ThreadPool, RunsEveryTaskOnce) {
  ThreadPool threads(4);
  for (int round = 0; round < 200; ++round) {
    std::vector<int> counts(static_cast<std::size_t>(round));
    threads.parallel_for(round, [&](std::int64_t i) { ++counts[static_cast<std::size_t>(i)]; });
    for (const int count : counts) ASSERT_EQ(count, 1);
  }
}

// A worker that is late for a short loop must not take a task of the long one that follows.
TEST(ThreadPool, ShortAndLongLoopsInTurnRunEveryTaskOnce) {
  ThreadPool threads(8);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::atomic<int>> counts(round % 2 == 0 ? 2 : 40);
    threads.parallel_for(static_cast<std::int64_t>(counts.size()), [&](std::int64_t i) {
      counts[static_cast<std::size_t>(i)].fetch_add(1, std::memory_order_relaxed);
    });
    for (const std::atomic<int>& count : counts) ASSERT_EQ(count.load(), 1);
  }
}

TEST(ThreadPool, ASlotBelongsToOneThreadAtATime) {
  ThreadPool threads(4);
  std::vector<std::atomic<int>> in_use(4);
  threads.parallel_for(1000, [&](std::int64_t, int slot) {
    ASSERT_EQ(in_use[static_cast<std::size_t>(slot)].fetch_add(1), 0);
    in_use[static_cast<std::size_t>(slot)].fetch_sub(1);
  });
}

TEST(ThreadPool, ServesSeveralCallersAndNestedLoops) {
  ThreadPool threads(3);
  std::atomic<std::int64_t> total{0};
  std::vector<std::thread> callers;
  callers.reserve(4);
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        threads.parallel_for(20, [&](std::int64_t) {
          threads.parallel_for(5, [&](std::int64_t i) { total.fetch_add(i); });
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total.load(), 4 * 50 * 20 * 10);
}

}  // namespace
}  // namespace deltafox
