// Where a computation's time goes, op by op. Off unless asked for; then every call of an op adds
// its wall time, as its caller sees it, under its name. Of the whole process: for one measurement
// at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deltafox {

struct OpTime {
  std::string op;
  std::int64_t calls = 0;
  double seconds = 0;
};

// Forgets what was recorded and records from now on. `wait` is called at the end of each op, within
// its time: on a GPU it waits for the op's work.
void start_op_times(std::function<void()> wait = {});
// Ends the recording and returns it, the longest first.
std::vector<OpTime> stop_op_times();

// Times one call, from its making to its end. It costs a load while nothing is recorded.
class OpTimer {
 public:
  explicit OpTimer(const char* op)
      : op_(recording_.load(std::memory_order_relaxed) ? op : nullptr) {
    if (op_ != nullptr) begin_ = Clock::now();
  }
  ~OpTimer() {
    if (op_ != nullptr) add(op_, begin_);
  }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  friend void start_op_times(std::function<void()> wait);
  friend std::vector<OpTime> stop_op_times();

  static void add(const char* op, Clock::time_point begin);

  static std::atomic<bool> recording_;
  const char* op_;
  Clock::time_point begin_;
};

}  // namespace deltafox
