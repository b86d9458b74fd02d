#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace deltafox::train {
namespace {

// How far t is from `begin` on its way over `length` tokens, in [0, 1].
double share(std::int64_t t, std::int64_t begin, std::int64_t length) {
  if (length <= 0) return t >= begin ? 1 : 0;
  return std::clamp(static_cast<double>(t - begin) / static_cast<double>(length), 0.0, 1.0);
}

}  // namespace

double Schedule::operator()(std::int64_t tokens) const {
  if (kind == Kind::kConstant) return value;
  if (tokens < warmup_steps) {
    return init_value + (peak_value - init_value) * share(tokens, 0, warmup_steps);
  }
  const auto toward_end = [&](double part) { return peak_value + (end_value - peak_value) * part; };
  if (kind == Kind::kWarmupOneMinusSqrt) {
    return toward_end(std::sqrt(share(tokens, total_steps - anneal_steps, anneal_steps)));
  }
  const double part = share(tokens, warmup_steps, decay_steps - warmup_steps);
  if (kind == Kind::kWarmupLinear) return toward_end(part);
  return toward_end((1 - std::cos(std::numbers::pi * part)) / 2);
}

Schedule::Kind schedule_named(const std::string& name) {
  if (name == "constant") return Schedule::Kind::kConstant;
  if (name == "warmup_cosine") return Schedule::Kind::kWarmupCosine;
  if (name == "warmup_linear") return Schedule::Kind::kWarmupLinear;
  if (name == "warmup_one_minus_sqrt") return Schedule::Kind::kWarmupOneMinusSqrt;
  fail("schedule '{}' is none of constant, warmup_cosine, warmup_linear, warmup_one_minus_sqrt",
       name);
}

}  // namespace deltafox::train
