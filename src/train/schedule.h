// The learning rate as a function of the tokens trained on so far.
//
// The names and formulas are those of the official schedules: with t the tokens seen before the
// step, w the warm-up, p the peak and e the end value,
//   t < w        init + (p − init)·t/w
//   cosine       e + (p − e)·(1 + cos(π·s))/2         s = (t − w)/(decay − w), at most 1
//   linear       p + (e − p)·s
//   1 − sqrt     p until total − anneal, then p + (e − p)·√s with s = (t − (total − anneal))/anneal
#pragma once

#include <cstdint>
#include <string>

namespace deltafox::train {

struct Schedule {
  enum class Kind : std::uint8_t { kConstant, kWarmupCosine, kWarmupLinear, kWarmupOneMinusSqrt };

  Kind kind = Kind::kConstant;
  double value = 0;  // kConstant
  double init_value = 0;
  double peak_value = 0;
  double end_value = 0;
  std::int64_t warmup_steps = 0;  // tokens, as everything that counts steps here
  std::int64_t decay_steps = 0;   // the whole schedule, warm-up included; cosine and linear
  std::int64_t total_steps = 0;   // 1 − sqrt: the whole schedule,
  std::int64_t anneal_steps = 0;  // of which these are the end

  double operator()(std::int64_t tokens) const;
};

// constant, warmup_cosine, warmup_linear, warmup_one_minus_sqrt. Throws Error that lists the names.
Schedule::Kind schedule_named(const std::string& name);

}  // namespace deltafox::train
