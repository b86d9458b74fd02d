#include "cuda/zero_blocks.h"

#include <algorithm>

#include "cuda/check.h"

namespace deltafox::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kParts = 16;  // of a block of memory

struct Batch {
  static constexpr std::size_t kLimit = 128;
  MemoryBlock blocks[kLimit];
};

__global__ void __launch_bounds__(kThreads) zero_kernel(const __grid_constant__ Batch batch) {
  const MemoryBlock& block = batch.blocks[blockIdx.y];
  auto* vectors = static_cast<uint4*>(block.memory);
  const std::size_t count = block.bytes / sizeof(uint4);
  for (std::size_t i = blockIdx.x * std::size_t{kThreads} + threadIdx.x; i < count;
       i += std::size_t{kParts} * kThreads) {
    vectors[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace

void zero_blocks(std::span<const MemoryBlock> blocks, cudaStream_t stream) {
  while (!blocks.empty()) {
    const auto some = blocks.first(std::min(blocks.size(), Batch::kLimit));
    Batch batch;
    std::copy(some.begin(), some.end(), batch.blocks);
    zero_kernel<<<dim3(kParts, static_cast<unsigned>(some.size())), kThreads, 0, stream>>>(batch);
    check_launch("zero_blocks");
    blocks = blocks.subspan(some.size());
  }
}

}  // namespace deltafox::cuda
