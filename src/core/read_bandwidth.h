// How fast this machine reads memory: the bound of everything that touches each weight once.
#pragma once

#include <cstddef>

#include "core/thread_pool.h"

namespace deltafox {

// Bytes a second at which the pool's threads together read a buffer of `bytes`, each thread along
// several streams: the best of a few passes. The buffer should be several times the last cache.
double measure_read_bandwidth(ThreadPool& threads, std::size_t bytes);

}  // namespace deltafox
