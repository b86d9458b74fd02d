// Every activation, for tests to go through.
#pragma once

#include "ops/activation.h"

namespace deltafox::test {

inline constexpr Activation kActivations[] = {Activation::kIdentity, Activation::kSilu,
                                              Activation::kSigmoid, Activation::kRelu,
                                              Activation::kEluPlusOne};

}  // namespace deltafox::test
