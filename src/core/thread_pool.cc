#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>

namespace deltafox {
namespace {

// A token is a few hundred loops of some ten microseconds: a worker that slept between them would
// wake too late for most. It spins for about as long as a gap between loops lasts, then sleeps.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int threads) {
  const int count = threads > 0 ? threads : available_cores();
  workers_.reserve(static_cast<std::size_t>(count - 1));
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::drain(int slot) {
  // Below zero, where threads find that others were first, the count stays until the next loop sets
  // it.
  std::int64_t done = 0;
  while (unclaimed_.load(std::memory_order_relaxed) > 0) {
    const std::int64_t left = unclaimed_.fetch_sub(1, std::memory_order_acquire);
    if (left <= 0) break;
    function_(closure_, tasks_ - left, slot);
    ++done;
  }
  // Once for all: the loop cannot end before.
  if (done > 0) done_.fetch_add(done, std::memory_order_release);
}

void ThreadPool::run(std::int64_t n, Function function, void* closure) {
  std::unique_lock lock(in_use_, std::defer_lock);
  if (n <= 1 || workers_.empty() || !lock.try_lock()) {
    for (std::int64_t i = 0; i < n; ++i) function(closure, i, 0);
    return;
  }
  function_ = function;
  closure_ = closure;
  tasks_ = n;
  done_.store(0, std::memory_order_relaxed);
  unclaimed_.store(n, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  drain(0);
  // What is left are tasks that workers are at. Where there are fewer free cores than threads, one
  // of them may need this one's.
  for (int spins = 0; done_.load(std::memory_order_acquire) != n; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int slot) {
  std::uint32_t seen = 0;
  while (true) {
    std::uint32_t current = generation_.load(std::memory_order_acquire);
    for (int spins = 0; current == seen; current = generation_.load(std::memory_order_acquire)) {
      if (++spins < kSpins) {
        relax();
      } else {
        generation_.wait(seen, std::memory_order_acquire);
      }
    }
    seen = current;
    if (stop_.load(std::memory_order_relaxed)) return;
    drain(slot);
  }
}

}  // namespace deltafox
