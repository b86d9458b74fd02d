// Every call of the CUDA runtime and every launch passes through one of these.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace deltafox::cuda {

// Throws Error: "CUDA: WHAT failed: <the runtime's words>". Not inline: kernels' sources need no
// formatting library.
[[noreturn]] void fail_cuda(cudaError_t status, const char* what);

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) [[unlikely]]
    fail_cuda(status, what);
}

// After each launch.
inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

}  // namespace deltafox::cuda
