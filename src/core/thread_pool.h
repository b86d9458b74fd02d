// A persistent pool for data-parallel loops.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace deltafox {

// Runs loops over tasks 0..n-1 on `threads` threads, the caller among them. Which thread runs a
// task is not determined, so a task's result must not depend on it: then results are the same for
// any number of threads. If another thread is using the pool, the loop runs on the caller alone:
// callers never wait for one another and the machine is not oversubscribed.
class ThreadPool {
 public:
  // 0: one for each core this process may use.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // task(i) for i in [0, n), or task(i, slot), where slot < size() belongs to one thread at a time:
  // an index for scratch memory. Tasks must not throw.
  template <typename Task>
  void parallel_for(std::int64_t n, Task&& task) {
    using Plain = std::remove_reference_t<Task>;
    const Function call = [](void* closure, std::int64_t i, int slot) {
      if constexpr (std::is_invocable_v<Plain&, std::int64_t, int>) {
        (*static_cast<Plain*>(closure))(i, slot);
      } else {
        (*static_cast<Plain*>(closure))(i);
      }
    };
    run(n, call, const_cast<void*>(static_cast<const void*>(&task)));
  }

 private:
  using Function = void (*)(void* closure, std::int64_t i, int slot);

  void run(std::int64_t n, Function function, void* closure);
  void work(int slot);
  void drain(int slot);

  std::vector<std::thread> workers_;
  std::mutex in_use_;
  // The loop under way. A thread reads these once it has claimed a task: the loop cannot end, nor
  // the next begin, before that task is done.
  Function function_ = nullptr;
  void* closure_ = nullptr;
  std::int64_t tasks_ = 0;
  // Tasks that nobody has claimed. A worker that is late in one loop and claims of the next has
  // claimed what it then runs: it need not know which loop that is.
  // Each of these in a cache line of its own: threads that wait read one while others write
  // another.
  alignas(64) std::atomic<std::int64_t> unclaimed_{0};
  alignas(64) std::atomic<std::int64_t> done_{0};
  // Of loops, for workers to wait for the next.
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  std::atomic<bool> stop_{false};
};

// Cores this process may run on.
int available_cores();

}  // namespace deltafox
