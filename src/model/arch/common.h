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
constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

// intermediate_size where given, else hidden_size · ratio · 2/3 rounded up to a multiple of 256.
std::int64_t intermediate_size(const io::JsonObject& config, std::int64_t hidden_size,
                               double default_ratio);

// hidden_act: swish, silu or sigmoid
Activation hidden_activation(const io::JsonObject& config, const char* default_name);

}  // namespace deltafox::arch
