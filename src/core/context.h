// What an op needs besides its arguments: the device, the threads, scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "core/tensor.h"
#include "core/thread_pool.h"

namespace deltafox {

enum class Device : std::uint8_t { kCpu };

// Memory that is handed out in stack order. It grows while a shape is new and is one block from
// then on, so the second call with the same shapes allocates nothing.
class Scratch {
 public:
  struct Mark {
    std::size_t block;
    std::size_t used;
  };
  // Uninitialised memory, aligned to a cache line.
  std::byte* allocate(std::size_t bytes);
  Mark mark() const { return {block_, used_}; }
  void release(Mark mark);
  std::size_t capacity() const;

 private:
  std::vector<Buffer> blocks_;
  std::size_t block_ = 0;  // the block in use
  std::size_t used_ = 0;   // bytes used of it
};

// What ops have done since the Context was made.
struct Statistics {
  std::int64_t attention_blocks = 0;          // of queries and keys, with causality and window
  std::int64_t attention_blocks_skipped = 0;  // of them, by adaptive computation pruning
};

// Not thread safe: one Context a calling thread.
class Context {
 public:
  explicit Context(ThreadPool& threads) : threads_(&threads) {}

  Device device() const { return Device::kCpu; }
  ThreadPool& threads() { return *threads_; }
  Scratch& scratch() { return scratch_; }
  Statistics& statistics() { return statistics_; }

 private:
  ThreadPool* threads_;
  Scratch scratch_;
  Statistics statistics_;
};

// Hands out scratch tensors that live as long as it does; or, with `keep`, as long as the scope
// around it.
class ScratchScope {
 public:
  explicit ScratchScope(Context& ctx, bool keep = false)
      : scratch_(ctx.scratch()), mark_(scratch_.mark()), keep_(keep) {}
  ~ScratchScope() {
    if (!keep_) scratch_.release(mark_);
  }
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

  TensorView tensor(const Shape& shape, DType dtype = DType::kF32) {
    return {scratch_.allocate(static_cast<std::size_t>(shape.size()) * size_of(dtype)), dtype,
            shape};
  }
  template <typename T>
  std::span<T> array(std::int64_t n) {
    static_assert(std::is_trivially_destructible_v<T>);
    const auto count = static_cast<std::size_t>(n);
    // NOLINTNEXTLINE(bugprone-sizeof-expression): of pointers too.
    return {reinterpret_cast<T*>(scratch_.allocate(count * sizeof(T))), count};
  }

 private:
  Scratch& scratch_;
  Scratch::Mark mark_;
  bool keep_;
};

}  // namespace deltafox
