#include "core/read_bandwidth.h"

#include <gtest/gtest.h>

namespace deltafox {
namespace {

TEST(ReadBandwidth, IsThatOfAMachineOfThisWorld) {
  ThreadPool threads(2);
  const double bandwidth = measure_read_bandwidth(threads, std::size_t{32} << 20);
  EXPECT_GT(bandwidth, 1e7);
  EXPECT_LT(bandwidth, 1e14);  // more would mean that nothing was read
}

}  // namespace
}  // namespace deltafox
