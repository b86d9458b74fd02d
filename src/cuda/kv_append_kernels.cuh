// Writing new tokens into the pages of KV caches. See ops/kv_append.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kv_pages.cuh"

namespace deltafox::cuda {

// A page that a call writes to.
struct AppendTile {
  std::int32_t sequence;
  std::int32_t page;
};

struct AppendParams {
  const void* k;                // [T, G, D]
  const void* v;                // [T, G, D]
  const float* log_gates;       // [T, H], or null
  const KvSequence* sequences;  // [B], in device memory
  std::int32_t sequence_count;
  const std::int32_t* recorded_runs;  // see Context
  KvPageLayout layout;
};

// Tiles: each page of each sequence, in device memory.
void launch_kv_append(const AppendParams& params, const AppendTile* tiles, int tile_count,
                      bool bf16, cudaStream_t stream);
// Of sequences with one row each.
void launch_kv_append_single(const AppendParams& params, bool bf16, cudaStream_t stream);

}  // namespace deltafox::cuda
