// What kernels are chosen by.
#pragma once

namespace deltafox::cuda {

// Of the card's compute capability, and no more than DELTAFOX_CUDA_MAJOR if that is set: newer
// cards run what older ones take, for tests and comparisons.
int compute_major();

// Of shared memory, that a thread block may ask for.
int most_shared_bytes();

}  // namespace deltafox::cuda
