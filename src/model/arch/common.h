// What the official configuration classes have in common.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>

#include "io/json.h"
#include "model/causal_lm.h"
#include "ops/activation.h"

namespace deltafox::arch {

// Bounds that keep every product of sizes far inside 64 bits and a damaged config from asking for
// the whole machine's memory.
constexpr std::int64_t kMaxVocab = std::int64_t{1} << 24;
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 20;
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxStateSize = 65536;
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

// hidden_size · ratio · 2/3 rounded up to a multiple of 256. The ratio is what `key` gives, where
// the official classes take null for 4.
std::int64_t hidden_ratio_size(const io::JsonObject& config, const char* key,
                               std::int64_t hidden_size, double default_ratio);

// intermediate_size where given, else what hidden_ratio makes of it.
std::int64_t intermediate_size(const io::JsonObject& config, std::int64_t hidden_size,
                               double default_ratio);

// hidden_act: swish, silu or sigmoid
Activation hidden_activation(const io::JsonObject& config, const char* default_name);

// The bias of Mamba's time steps: time_step_min, time_step_max and time_step_floor.
Init time_step_bias_init(const io::JsonObject& config);

}  // namespace deltafox::arch
