// How fast this machine multiplies and adds: what model FLOPs utilisation is counted against.
#pragma once

#include "core/thread_pool.h"

namespace deltafox {

// float32 operations a second (a fused multiply-add is two) that the pool's threads together reach
// out of registers, with the best instruction set of the machine: the best of a few passes of some
// milliseconds.
double measure_peak_flops(ThreadPool& threads);

}  // namespace deltafox
