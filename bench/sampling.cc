// What choosing a token costs apart from the model: each logits processor and sampler on one row of
// 50257 logits, in microseconds, the median of 200 calls. One thread.
//
//   build/cpu/bench/bench_sampling
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <vector>

#include "infer/processors.h"
#include "infer/sampler.h"

namespace {

using namespace deltafox::infer;
using Row = std::vector<float>;

double median_microseconds(const Row& logits, const std::function<void(Row&)>& action) {
  std::vector<double> times;
  Row row;
  for (int call = 0; call < 200; ++call) {
    row = logits;
    const auto start = std::chrono::steady_clock::now();
    action(row);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    times.push_back(time.count());
  }
  const auto middle = times.begin() + std::ssize(times) / 2;
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

}  // namespace

int main() {
  constexpr std::size_t kVocab = 50257;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 3.0F);
  Row logits(kVocab);
  for (float& logit : logits) logit = normal(random);
  std::vector<std::int32_t> ids(4096);
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(random() % kVocab);
  ProcessorScratch scratch(kVocab);
  std::vector<std::uint64_t> weights;
  Row filtered = logits;
  top_k(filtered, 50, scratch);

  nlohmann::ordered_json times;
  const auto measure = [&](const char* name, const Row& row,
                           const std::function<void(Row&)>& action) {
    times[name] = median_microseconds(row, action);
  };
  measure("repetition_penalty, 4096 ids", logits,
          [&](Row& row) { repetition_penalty(row, ids, 1.2F, scratch); });
  measure("no_repeat_ngram 3, 4096 ids", logits, [&](Row& row) { no_repeat_ngram(row, ids, 3); });
  measure("temperature", logits, [&](Row& row) { temperature(row, 0.7F); });
  measure("top_k 50", logits, [&](Row& row) { top_k(row, 50, scratch); });
  measure("top_p 0.95", logits, [&](Row& row) { top_p(row, 0.95, 1, scratch); });
  measure("top_p 0.95 after top_k 50", filtered, [&](Row& row) { top_p(row, 0.95, 1, scratch); });
  measure("min_p 0.05", logits, [&](Row& row) { min_p(row, 0.05, 1, scratch); });
  measure("typical_p 0.9", logits, [&](Row& row) { typical_p(row, 0.9, 1, scratch); });
  measure("epsilon_cutoff 3e-4", logits, [&](Row& row) { epsilon_cutoff(row, 3e-4, 1, scratch); });
  measure("eta_cutoff 3e-4", logits, [&](Row& row) { eta_cutoff(row, 3e-4, 1, scratch); });
  measure("log_softmax", logits, [](Row& row) { log_softmax(row); });
  std::int32_t chosen = 0;  // printed, so that no call is left out
  measure("argmax", logits, [&](Row& row) { chosen ^= argmax(row); });
  measure("sample", logits, [&](Row& row) { chosen ^= sample(row, 0.5, weights); });
  measure("sample after top_k 50", filtered,
          [&](Row& row) { chosen ^= sample(row, 0.5, weights); });

  const nlohmann::ordered_json result = {{"benchmark", "sampling"},
                                         {"command", "build/cpu/bench/bench_sampling"},
                                         {"vocab_size", kVocab},
                                         {"checksum", chosen},
                                         {"median_us", times}};
  std::printf("%s\n", result.dump(2).c_str());
  return 0;
}
