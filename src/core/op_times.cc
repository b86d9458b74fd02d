#include "core/op_times.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

namespace deltafox {
namespace {

struct Record {
  std::mutex mutex;
  std::map<std::string, OpTime> ops;
  std::function<void()> wait;
};

Record& record() {
  static Record instance;
  return instance;
}

}  // namespace

std::atomic<bool> OpTimer::recording_{false};

void OpTimer::add(const char* op, Clock::time_point begin) {
  Record& kept = record();
  const std::lock_guard lock(kept.mutex);
  if (kept.wait) kept.wait();
  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  OpTime& time = kept.ops[op];
  time.op = op;
  time.calls += 1;
  time.seconds += seconds;
}

void start_op_times(std::function<void()> wait) {
  const std::lock_guard lock(record().mutex);
  record().ops.clear();
  record().wait = std::move(wait);
  OpTimer::recording_ = true;
}

std::vector<OpTime> stop_op_times() {
  OpTimer::recording_ = false;
  const std::lock_guard lock(record().mutex);
  std::vector<OpTime> times;
  for (auto& [op, time] : record().ops) times.push_back(std::move(time));
  record().ops.clear();
  std::sort(times.begin(), times.end(),
            [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return times;
}

}  // namespace deltafox
