// Copies of tiles of matrices between memory and the shared memory of a pair of thread blocks on
// sm_90, in the layout of 128-byte swizzles that products read.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "core/tensor.h"
#include "cuda/check.h"
#include "cuda/sm90.cuh"

namespace deltafox::cuda {

__device__ inline std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

__device__ inline void arrive_at(std::uint64_t* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(sm90::shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void load_tile(void* to, const CUtensorMap& map, int column, int row,
                                 std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(sm90::shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(sm90::shared_address(barrier))
      : "memory");
}

// To both blocks of a pair.
__device__ inline void load_shared_tile(void* to, const CUtensorMap& map, int column, int row,
                                        std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(sm90::shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(sm90::shared_address(barrier)), "h"(std::uint16_t{3})
      : "memory");
}

__device__ inline void store_tile(const CUtensorMap& map, int column, int row, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(sm90::shared_address(from))
      : "memory");
}

using Encode = decltype(&cuTensorMapEncodeTiled);

inline Encode encoder() {
  static const Encode function = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPoint");
    return reinterpret_cast<Encode>(address);
  }();
  return function;
}

// Of a BF16 tensor; strides are bytes, of all dimensions but the first.
template <std::size_t kRank>
CUtensorMap encode_map(const void* data, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                       CUtensorMapL2promotion promotion) {
  CUtensorMap map{};
  cuuint32_t steps[kRank];
  std::fill_n(steps, kRank, 1);
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) fail_cuda(cudaErrorInvalidValue, "cuTensorMapEncodeTiled");
  return map;
}

// Tiles of `tile_rows` rows by 128 bytes of a BF16 matrix of which `columns` are used.
inline CUtensorMap map_of(const ConstTensorView& matrix, std::int64_t columns, int tile_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns),
                              static_cast<cuuint64_t>(matrix.shape[0])};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.shape[1]) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tile_rows)};
  return encode_map(matrix.data, sizes, strides, box, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// Whether tiles of it can be copied.
inline bool has_tiles(const ConstTensorView& matrix) {
  return reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.shape[1] * static_cast<std::int64_t>(size_of(matrix.dtype)) % 16 == 0;
}

}  // namespace deltafox::cuda
