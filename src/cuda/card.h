// What kernels are chosen by.
#pragma once

namespace deltafox::cuda {

// Of the card's compute capability, and no more than DELTAFOX_CUDA_MAJOR if that is set: newer
// cards run what older ones take, for tests and comparisons.
int compute_major();

// Whether products are plain where cuBLASLt would take them: DELTAFOX_PLAIN_PRODUCTS is set, for
// tools that its kernels do not run under.
bool plain_products();

// Of shared memory, that a thread block may ask for.
int most_shared_bytes();

}  // namespace deltafox::cuda
