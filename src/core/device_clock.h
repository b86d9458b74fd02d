// Time by a GPU's own clock.
#pragma once

#include <functional>

#include "core/device.h"

namespace deltafox::cuda {

// Runs `work` and waits for it: the seconds that the stream's GPU took.
double seconds_of(Stream& stream, const std::function<void()>& work);

}  // namespace deltafox::cuda
