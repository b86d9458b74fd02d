// Programmatic dependent launch: a kernel starts while the one before it ends, up to
// wait_for_input.
#pragma once

#include <cuda_runtime.h>

#include "cuda/check.h"
#include "cuda/stream.h"

namespace deltafox::cuda {

// Before it, only what no kernel of the last two may write is read: weights, states.
__device__ inline void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  // Only now, so that a kernel never runs beside the one before the last.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <typename... Parameters, typename... Args>
void launch_dependent(Context& ctx, const char* name, void (*kernel)(Parameters...), dim3 grid,
                      unsigned threads, std::size_t shared, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream_of(ctx);
  config.attrs = &attribute;
  config.numAttrs = ctx.stream().major() >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

}  // namespace deltafox::cuda
