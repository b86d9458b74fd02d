// Zeroes many small pieces of device memory with few launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

namespace deltafox::cuda {

struct MemoryBlock {
  void* memory;       // aligned to 256 bytes
  std::size_t bytes;  // a multiple of 256
};

void zero_blocks(std::span<const MemoryBlock> blocks, cudaStream_t stream);

}  // namespace deltafox::cuda
