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
#include "ops/choose_token.h"
#include "ops/delta_rule.h"
#include "ops/gla.h"
#include "ops/short_conv.h"
#include "ops/ssd.h"

namespace deltafox {
namespace {

// Beyond the caches of all cards that there are.
constexpr std::size_t kRotatedBytes = std::size_t{256} << 20;

class Bench {
 public:
  explicit Bench(int runs) : runs_(runs) {}

  Context& ctx() { return ctx_; }

  // Median microseconds of work(set) over `runs` calls, which take turns at the sets. A call from
  // an idle GPU: some 5 µs of it are no kernel's.
  double microseconds(std::size_t sets, const std::function<void(std::size_t)>& work) {
    // Each set at least once: what is uploaded for it is kept.
    const int warm_up = std::max(3, static_cast<int>(sets));
    std::vector<double> times;
    for (int i = 0; i < warm_up + runs_; ++i) {
      const std::size_t set = static_cast<std::size_t>(i) % sets;
      const double seconds = cuda::seconds_of(ctx_.stream(), [&] { work(set); });
      if (i >= warm_up) times.push_back(seconds * 1e6);
    }
    const auto middle = times.begin() + std::ssize(times) / 2;
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
  }

  // Normal numbers in the GPU's memory; rows of length 1 if `unit`. A pattern that repeats, lest
  // the host takes longer than the GPU.
  Tensor normal(const Shape& shape, DType dtype, bool unit = false, float scale = 1) {
    const std::int64_t width = shape[shape.rank() - 1];
    const std::int64_t rows = std::min<std::int64_t>(shape.size() / width, 4099);
    Tensor pattern(DType::kF32, {rows, width});
    for (std::int64_t r = 0; r < rows; ++r) {
      float* row = pattern.f32() + r * width;
      double squares = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        row[i] = scale * draw_(random_);
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
  // F32.
  static Tensor constant(const Shape& shape, float value) {
    Tensor host(DType::kF32, shape);
    std::fill_n(host.f32(), shape.size(), value);
    Tensor device(DType::kF32, shape, Device::kCuda);
    cuda::copy(device.view().data, host.view().data, host.bytes());
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

// [B+1] cu_seqlens of `batch` sequences of as many tokens.
std::vector<std::int64_t> equal_lengths(std::int64_t batch, std::int64_t tokens) {
  std::vector<std::int64_t> cu;
  for (std::int64_t b = 0; b <= batch; ++b) cu.push_back(b * tokens);
  return cu;
}

// States of one shape for each of `batch` sequences.
struct States {
  States(std::int64_t batch, const Shape& shape)
      : memory(DType::kF32, {batch, shape.size()}, Device::kCuda) {
    for (std::int64_t b = 0; b < batch; ++b) pointers.push_back(memory.f32() + b * shape.size());
  }
  Tensor memory;
  std::vector<float*> pointers;
};

// Sets of states that together exceed the caches.
std::vector<States> sets_of_states(std::int64_t batch, const Shape& shape) {
  std::vector<States> sets;
  const std::size_t bytes = static_cast<std::size_t>(batch) * bytes_of(DType::kF32, shape);
  for (std::size_t i = 0; i < sets_of(bytes); ++i) sets.emplace_back(batch, shape);
  return sets;
}

constexpr std::int64_t kHeads = 12;
constexpr std::int64_t kSize = 128;

// 12 heads of 128, as the 760M DeltaNet has them.
nlohmann::ordered_json delta_rule(Bench& bench, std::int64_t batch, std::int64_t tokens) {
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
  const States states(batch, {kHeads, kSize, kSize});
  const std::vector<std::int64_t> cu = equal_lengths(batch, tokens);
  const auto forward = [&](std::size_t i) {
    const Set& set = sets[i];
    ops::delta_rule(bench.ctx(), {.q = set.q.view(),
                                  .k = set.k.view(),
                                  .v = set.v.view(),
                                  .beta = set.beta.view(),
                                  .sequences = Sequences(cu),
                                  .states = states.pointers,
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

// One token of each of `batch` sequences: states are read and written once.
double delta_rule_token(Bench& bench, std::int64_t batch) {
  const Shape shape{batch, kHeads, kSize};
  const std::vector<States> sets = sets_of_states(batch, {kHeads, kSize, kSize});
  const Tensor q = bench.normal(shape, DType::kBF16, true);
  const Tensor k = bench.normal(shape, DType::kBF16, true);
  const Tensor v = bench.normal(shape, DType::kBF16);
  const Tensor beta = Bench::constant({batch, kHeads}, 0.5F);
  Tensor o(DType::kBF16, shape, Device::kCuda);
  const std::vector<std::int64_t> cu = equal_lengths(batch, 1);
  return bench.microseconds(sets.size(), [&](std::size_t i) {
    ops::delta_rule(bench.ctx(), {.q = q.view(),
                                  .k = k.view(),
                                  .v = v.view(),
                                  .beta = beta.view(),
                                  .sequences = Sequences(cu),
                                  .states = sets[i].pointers,
                                  .o = o.view()});
  });
}

double gla_token(Bench& bench, std::int64_t batch) {
  const Shape shape{batch, kHeads, kSize};
  const std::vector<States> sets = sets_of_states(batch, {kHeads, kSize, kSize});
  const Tensor q = bench.normal(shape, DType::kBF16);
  const Tensor k = Bench::constant(shape, 0.1F);
  const Tensor g = Bench::constant(shape, 0.9F);
  const Tensor v = bench.normal(shape, DType::kBF16);
  Tensor o(DType::kBF16, shape, Device::kCuda);
  const std::vector<std::int64_t> cu = equal_lengths(batch, 1);
  return bench.microseconds(sets.size(), [&](std::size_t i) {
    ops::gla(bench.ctx(), {.q = q.view(),
                           .k = k.view(),
                           .g = g.view(),
                           .v = v.view(),
                           .sequences = Sequences(cu),
                           .states = sets[i].pointers,
                           .o = o.view()});
  });
}

// As the 760M Mamba-2 has it: 48 heads, N 128, P 64.
double ssd(Bench& bench, std::int64_t batch, std::int64_t tokens) {
  constexpr std::int64_t kSsdHeads = 48;
  constexpr std::int64_t kStates = 128;
  constexpr std::int64_t kHeadDim = 64;
  const std::int64_t rows = batch * tokens;
  const Shape inputs{rows, kSsdHeads * kHeadDim + 2 * kStates};
  const std::vector<States> states = sets_of_states(batch, {kSsdHeads, kStates, kHeadDim});
  std::vector<Tensor> xbc;
  for (std::size_t i = 0; i < sets_of(bytes_of(DType::kBF16, inputs)) && i < states.size(); ++i) {
    xbc.push_back(bench.normal(inputs, DType::kBF16));
  }
  const Tensor dt = Bench::constant({rows, kSsdHeads}, -4);
  const Tensor dt_bias = Bench::constant({kSsdHeads}, 0);
  const Tensor a_log = Bench::constant({kSsdHeads}, 1);
  const Tensor d = Bench::constant({kSsdHeads}, 1);
  Tensor y(DType::kBF16, {rows, kSsdHeads, kHeadDim}, Device::kCuda);
  const std::vector<std::int64_t> cu = equal_lengths(batch, tokens);
  return bench.microseconds(states.size(), [&](std::size_t i) {
    ops::ssd(bench.ctx(), {.xbc = xbc[i % xbc.size()].view(),
                           .dt = dt.view(),
                           .dt_bias = dt_bias.view(),
                           .a_log = a_log.view(),
                           .d = d.view(),
                           .dt_max = INFINITY,
                           .sequences = Sequences(cu),
                           .states = states[i].pointers,
                           .y = y.view()});
  });
}

double short_conv(Bench& bench, std::int64_t tokens, std::int64_t channels) {
  constexpr std::int64_t kWidth = 4;
  const Shape shape{tokens, channels};
  std::vector<Tensor> x;
  for (std::size_t i = 0; i < sets_of(2 * bytes_of(DType::kBF16, shape)); ++i) {
    x.push_back(bench.normal(shape, DType::kBF16));
  }
  const Tensor w = bench.normal({channels, kWidth}, DType::kF32);
  const States states(1, {channels, kWidth});
  Tensor y(DType::kBF16, shape, Device::kCuda);
  const std::vector<std::int64_t> cu{0, tokens};
  return bench.microseconds(x.size(), [&](std::size_t i) {
    ops::short_conv(bench.ctx(), {.x = x[i].view(),
                                  .w = w.view(),
                                  .sequences = Sequences(cu),
                                  .states = states.pointers,
                                  .activation = Activation::kSilu,
                                  .y = y.view()});
  });
}

// Of a row of 50,257 normal logits of this size.
double choose_token(Bench& bench, const TokenOptions& options, float scale) {
  constexpr std::int64_t kVocabulary = 50257;
  const Tensor logits = bench.normal({1, kVocabulary}, DType::kF32, false, scale);
  Tensor sequences(DType::kU8, {static_cast<std::int64_t>(sizeof(TokenSequence))}, Device::kCuda);
  Tensor ids(DType::kI32, {1}, Device::kCuda);
  const std::shared_ptr<void> memory = cuda::allocate_shared(sizeof(ChosenToken));
  return bench.microseconds(1, [&](std::size_t) {
    ops::choose_token(bench.ctx(), {.logits = logits.view(),
                                    .classes = kVocabulary,
                                    .options = options,
                                    .sequences = sequences.view(),
                                    .ids = ids.view(),
                                    .chosen = static_cast<ChosenToken*>(memory.get()),
                                    .slots = 1});
  });
}

void run(int runs) {
  Bench bench(runs);
  nlohmann::ordered_json results;
  for (const auto& [batch, tokens] : {std::array<std::int64_t, 2>{1, 16384},
                                      {8, 2048},
                                      {1, 65536},
                                      {32, 2048},
                                      {1, 512},
                                      {1, 1024},
                                      {1, 2048},
                                      {1, 4096}}) {
    results["delta_rule B" + std::to_string(batch) + " T" + std::to_string(tokens)] =
        delta_rule(bench, batch, tokens);
  }
  for (const std::int64_t batch : {1, 8, 64, 256}) {
    results["a token of the delta rule B" + std::to_string(batch)] = delta_rule_token(bench, batch);
  }
  results["a token of GLA B64"] = gla_token(bench, 64);
  for (const auto& [batch, tokens] :
       {std::array<std::int64_t, 2>{64, 1}, {1, 2048}, {8, 2048}, {1, 16384}}) {
    results["state space B" + std::to_string(batch) + " T" + std::to_string(tokens)] =
        ssd(bench, batch, tokens);
  }
  results["short convolution T16384 C1536"] = short_conv(bench, 16384, 1536);
  results["token: argmax"] = choose_token(bench, {}, 3);
  results["token: temperature, top_k 50, top_p 0.9"] =
      choose_token(bench, {.do_sample = true, .temperature = 0.8F, .top_k = 50, .top_p = 0.9}, 3);
  results["token: of all classes"] = choose_token(bench, {.do_sample = true}, 3);
  results["token: top_p 0.9 of flat logits"] =
      choose_token(bench, {.do_sample = true, .top_p = 0.9}, 0.01F);
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
