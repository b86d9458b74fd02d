// Programmatic dependent launch: a kernel starts while the one before it ends, up to
// wait_for_input.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

// The kernel ahead, and so all before it, has ended.
__device__ inline void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start when all of this one's have come here.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Before it, only what no kernel of the last two may write is read: weights, states.
__device__ inline void wait_for_input() {
  wait_for_kernel_ahead();
  let_next_start();  // only now, so that a kernel never runs beside the one before the last
}

// In clusters of kCluster blocks, where that is not 1 on sm_90 only.
template <int kCluster = 1, typename... Parameters, typename... Args>
void launch_dependent(Context& ctx, const char* name, void (*kernel)(Parameters...), dim3 grid,
                      unsigned threads, std::size_t shared, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = ctx.stream().major() < 9 ? 0 : kCluster == 1 ? 1 : 2;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

}  // namespace deltafox::cuda
