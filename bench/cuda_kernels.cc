// Ops on a GPU with random inputs as models have them, in BF16. Prints JSON: microseconds by the
// GPU's clock, medians. Calls take turns at several sets of inputs, together larger than the
// second-level cache.
//
//   bench_cuda_kernels [RUNS]
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>

#include "core/context.h"
#include "core/device_clock.h"
#include "core/error.h"
#include "core/float_convert.h"
#include "ops/delta_rule.h"

namespace deltafox {
namespace {

// Beyond the caches of all cards that there are.
constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;

class Bench {
 public:
  explicit Bench(int runs) : runs_(runs) {}

  Context& ctx() { return ctx_; }

  // Median microseconds of work(set) over `runs` calls, which take turns at the sets.
  double microseconds(std::size_t sets, const std::function<void(std::size_t)>& work) {
    constexpr int kWarmUp = 3;
    std::vector<double> times;
    for (int i = 0; i < kWarmUp + runs_; ++i) {
      const std::size_t set = static_cast<std::size_t>(i) % sets;
      const double seconds = cuda::seconds_of(ctx_.stream(), [&] { work(set); });
      if (i >= kWarmUp) times.push_back(seconds * 1e6);
    }
    const auto middle = times.begin() + std::ssize(times) / 2;
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
  }

  // Normal numbers in the GPU's memory; rows of length 1 if `unit`. A pattern that repeats, lest
  // the host takes longer than the GPU.
  Tensor normal(const Shape& shape, DType dtype, bool unit = false) {
    const std::int64_t width = shape[shape.rank() - 1];
    const std::int64_t rows = std::min<std::int64_t>(shape.size() / width, 4099);
    Tensor pattern(DType::kF32, {rows, width});
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = pattern.f32() + r * width;
      double squares = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        row[i] = draw_(random_);
        squares += static_cast<double>(row[i]) * row[i];
      }
      if (!unit) continue;
      const auto factor = static_cast<float>(1 / std::sqrt(squares));
      for (std::int64_t i = 0; i < width; ++i) row[i] *= factor;
    }
    Tensor rounded(dtype, {rows, width});
    convert(pattern.view(), rounded.view());
    Tensor device(dtype, shape, Device::kCuda);
    for (std::size_t at = 0; at < device.bytes(); at += rounded.bytes()) {
      cuda::copy(static_cast<std::byte*>(device.view().data) + at, rounded.view().data,
                 std::min(rounded.bytes(), device.bytes() - at));
    }
    return device;
  }

 private:
  int runs_;
  ThreadPool threads_{1};
  Context ctx_{threads_, Device::kCuda, DType::kBF16};
  std::mt19937 random_{1};
  std::normal_distribution<float> draw_;
};

std::size_t sets_of(std::size_t bytes) {
  return kRotatedBytes / bytes + 1;
}

// 12 heads of 128, as the 760M DeltaNet has them.
nlohmann::ordered_json delta_rule(Bench& bench, std::int64_t batch, std::int64_t tokens) {
  constexpr std::int64_t kHeads = 12;
  constexpr std::int64_t kSize = 128;
  const Shape shape{batch * tokens, kHeads, kSize};
  struct Set {
    Tensor q, k, v, d_o, beta;
  };
  std::vector<Set> sets;
  for (std::size_t i = 0; i < sets_of(4 * bytes_of(DType::kBF16, shape)); ++i) {
    Tensor beta(DType::kF32, {batch * tokens, kHeads}, Device::kCuda);
    Tensor host(DType::kF32, beta.view().shape);
    for (std::int64_t j = 0; j < host.view().shape.size(); ++j) {
      host.f32()[j] = static_cast<float>(j * 7919 % 1009 + 1) / 1010;
    }
    cuda::copy(beta.view().data, host.view().data, host.bytes());
    sets.push_back({bench.normal(shape, DType::kBF16, true),
                    bench.normal(shape, DType::kBF16, true), bench.normal(shape, DType::kBF16),
                    bench.normal(shape, DType::kBF16), std::move(beta)});
  }
  Tensor o(DType::kBF16, shape, Device::kCuda);
  Tensor dq(DType::kBF16, shape, Device::kCuda);
  Tensor dk(DType::kBF16, shape, Device::kCuda);
  Tensor dv(DType::kBF16, shape, Device::kCuda);
  Tensor dbeta(DType::kF32, {batch * tokens, kHeads}, Device::kCuda);
  Tensor memory(DType::kF32, {batch, kHeads, kSize, kSize}, Device::kCuda);
  std::vector<float*> states;
  std::vector<std::int64_t> cu{0};
  for (std::int64_t b = 0; b < batch; ++b) {
    states.push_back(memory.f32() + b * kHeads * kSize * kSize);
    cu.push_back(cu.back() + tokens);
  }
  const auto forward = [&](std::size_t i) {
    const Set& set = sets[i];
    ops::delta_rule(bench.ctx(), {.q = set.q.view(),
                                  .k = set.k.view(),
                                  .v = set.v.view(),
                                  .beta = set.beta.view(),
                                  .sequences = Sequences(cu),
                                  .states = states,
                                  .o = o.view()});
  };
  const auto backward = [&](std::size_t i) {
    const Set& set = sets[i];
    ops::delta_rule_backward(bench.ctx(), {.q = set.q.view(),
                                           .k = set.k.view(),
                                           .v = set.v.view(),
                                           .beta = set.beta.view(),
                                           .sequences = Sequences(cu),
                                           .d_o = set.d_o.view(),
                                           .dq = dq.view(),
                                           .dk = dk.view(),
                                           .dv = dv.view(),
                                           .dbeta = dbeta.view()});
  };
  nlohmann::ordered_json times;
  times["forward_us"] = bench.microseconds(sets.size(), forward);
  times["backward_us"] = bench.microseconds(sets.size(), backward);
  times["forward_backward_us"] = bench.microseconds(sets.size(), [&](std::size_t i) {
    forward(i);
    backward(i);
  });
  return times;
}

void run(int runs) {
  Bench bench(runs);
  nlohmann::ordered_json results;
  for (const auto& [batch, tokens] :
       {std::array<std::int64_t, 2>{1, 16384}, {8, 2048}, {1, 65536}, {32, 2048}}) {
    results["delta_rule B" + std::to_string(batch) + " T" + std::to_string(tokens)] =
        delta_rule(bench, batch, tokens);
  }
  std::cout << results.dump(2) << '\n';
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  try {
    deltafox::run(argc > 1 ? std::atoi(argv[1]) : 20);
    return 0;
  } catch (const deltafox::Error& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
