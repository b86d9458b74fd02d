#pragma once
#include <cuda_runtime_api.h>
#include <cstdio>
#include <cstdlib>
namespace deltafox::cuda {
inline void check(cudaError_t status) {
  if (status != cudaSuccess) {
    std::fprintf(stderr, "cuda: %s\n", cudaGetErrorString(status));
    std::exit(1);
  }
}
}  // namespace deltafox::cuda
