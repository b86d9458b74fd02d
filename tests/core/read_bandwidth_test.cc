#include "core/read_bandwidth.h"

#include <gtest/gtest.h>

namespace deltafox {
namespace {

TEST(ReadBandwidth, IsThatOfAMachineOfThisWorld) {
  ThreadPool threads(2);
  const std::vector<double> rates = ReadBandwidth(std::size_t{32} << 20).measure(threads, 2);
  ASSERT_EQ(rates.size(), 2U);
  for (const double rate : rates) {
    EXPECT_GT(rate, 1e7);
    EXPECT_LT(rate, 1e14);  // more would mean that nothing was read
  }
}

}  // namespace
}  // namespace deltafox
