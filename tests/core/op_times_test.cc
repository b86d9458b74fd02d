#include "core/op_times.h"

#include <gtest/gtest.h>

namespace deltafox {
namespace {

TEST(OpTimes, AddUpCallsOfWhatRanWhileTheyWereRecorded) {
  { const OpTimer unrecorded("a"); }
  start_op_times();
  for (int i = 0; i < 3; ++i) const OpTimer timer("a");
  { const OpTimer timer("b"); }
  const std::vector<OpTime> times = stop_op_times();
  { const OpTimer unrecorded("b"); }
  ASSERT_EQ(times.size(), 2U);
  EXPECT_GE(times[0].seconds, times[1].seconds);
  const OpTime& a = times[0].op == "a" ? times[0] : times[1];
  EXPECT_EQ(a.calls, 3);
  start_op_times();
  EXPECT_TRUE(stop_op_times().empty());
}

}  // namespace
}  // namespace deltafox
