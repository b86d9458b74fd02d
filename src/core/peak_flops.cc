#include "core/peak_flops.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/peak_flops.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace deltafox::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Does `rounds` rounds of independent multiply-adds; the operations done are added to `flops`.
float multiply_add(std::int64_t rounds, double& flops) {
  const hn::CappedTag<float, 16> f32;
  // Enough chains to hide the latency of two units, few enough for 16 registers.
  auto a = hn::Set(f32, 1.0F);
  auto b = hn::Set(f32, 1.1F);
  auto c = hn::Set(f32, 1.2F);
  auto d = hn::Set(f32, 1.3F);
  auto e = hn::Set(f32, 1.4F);
  auto f = hn::Set(f32, 1.5F);
  auto g = hn::Set(f32, 1.6F);
  auto h = hn::Set(f32, 1.7F);
  auto i = hn::Set(f32, 1.8F);
  auto j = hn::Set(f32, 1.9F);
  const auto factor = hn::Set(f32, 0.999F);
  const auto term = hn::Set(f32, 0.001F);
  for (std::int64_t round = 0; round < rounds; ++round) {
    a = hn::MulAdd(a, factor, term);
    b = hn::MulAdd(b, factor, term);
    c = hn::MulAdd(c, factor, term);
    d = hn::MulAdd(d, factor, term);
    e = hn::MulAdd(e, factor, term);
    f = hn::MulAdd(f, factor, term);
    g = hn::MulAdd(g, factor, term);
    h = hn::MulAdd(h, factor, term);
    i = hn::MulAdd(i, factor, term);
    j = hn::MulAdd(j, factor, term);
  }
  flops += 2.0 * 10 * static_cast<double>(hn::Lanes(f32)) * static_cast<double>(rounds);
  const auto sum = hn::Add(hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, d)), hn::Add(e, f)),
                           hn::Add(hn::Add(g, h), hn::Add(i, j)));
  return hn::GetLane(hn::SumOfLanes(f32, sum));
}

}  // namespace deltafox::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox {

HWY_EXPORT(multiply_add);

double measure_peak_flops(ThreadPool& threads) {
  constexpr int kPasses = 5;
  constexpr std::int64_t kRounds = 1 << 19;
  double best = 0;
  std::atomic<float> result{0};  // keeps the work from being optimised away
  for (int pass = 0; pass < kPasses; ++pass) {
    std::vector<double> flops(static_cast<std::size_t>(threads.size()));
    const auto begin = std::chrono::steady_clock::now();
    threads.parallel_for(threads.size(), [&](std::int64_t, int slot) {
      result = HWY_DYNAMIC_DISPATCH(multiply_add)(kRounds, flops[static_cast<std::size_t>(slot)]);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    double total = 0;
    for (const double part : flops) total += part;
    best = std::max(best, total / seconds.count());
  }
  return result.load() > 0 ? best : 0;
}

}  // namespace deltafox
#endif
