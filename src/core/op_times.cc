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
};

Record& record() {
  static Record instance;
  return instance;
}

}  // namespace

std::atomic<bool> OpTimer::recording_{false};

void OpTimer::add(const char* op, double seconds) {
  Record& kept = record();
  const std::lock_guard lock(kept.mutex);
  OpTime& time = kept.ops[op];
  time.op = op;
  time.calls += 1;
  time.seconds += seconds;
}

void start_op_times() {
  const std::lock_guard lock(record().mutex);
  record().ops.clear();
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
