// Where the pages of a KvCache lie in device memory, and how their elements are ordered.
//
// A page is one block of memory with the keys, the values, the gates and the key norms of kKvPage
// tokens. Head sizes are padded with zeros to kDim = 32, 64 or 128:
//   keys       [G, kDim, kKvPage]: as in ops/kv_cache.h, for a dimension the keys side by side
//   values     float32: [G, kKvPage, kDim];  bfloat16: [G, panels, kKvPage, min(kDim, 64)]
//   gates      [2, H, kKvPage] float32
//   key norms  [G, kKvPage] float32
// The 16-byte chunks of bfloat16 rows are permuted within their row as the tensor cores of sm_90
// read shared memory (128- or 64-byte swizzle), so that a page's part is copied there in one piece.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

namespace deltafox::cuda {

constexpr int kPageTokens = 64;
// Keys of one split of a query of one token.
constexpr int kSplitKeys = 4 * kPageTokens;

// One sequence's pages; an array of these lies in device memory.
struct KvSequence {
  std::byte* const* pages;  // [end_page - first_page]
  std::int32_t first_page;
  std::int32_t end_page;
  std::int32_t length;  // tokens, those of this call included
  std::int32_t row;     // this call's first row of the packed batch
  std::int32_t rows;    // this call's rows: the last positions before length

  // As of a later run of a recorded step.
  __device__ void advance(const std::int32_t* runs) {
    if (runs != nullptr) length += *runs;
  }
  __device__ std::int32_t position() const { return length - rows; }  // of the first row
  __device__ std::byte* page(std::int32_t p) const { return pages[p - first_page]; }
};

constexpr int padded_dim(std::int64_t dim) {
  return dim <= 32 ? 32 : dim <= 64 ? 64 : 128;
}

// Byte offsets within a page.
struct KvPageLayout {
  std::int32_t kv_heads;    // G
  std::int32_t gate_heads;  // H or 0
  std::int32_t dim;         // D
  std::int32_t head_bytes;  // of one head's keys, and of its values
  bool has_norms;

  KvPageLayout(std::int64_t kv_heads_, std::int64_t gate_heads_, std::int64_t dim_,
               std::size_t element_size, bool has_norms_)
      : kv_heads(static_cast<std::int32_t>(kv_heads_)),
        gate_heads(static_cast<std::int32_t>(gate_heads_)),
        dim(static_cast<std::int32_t>(dim_)),
        head_bytes(padded_dim(dim_) * kPageTokens * static_cast<std::int32_t>(element_size)),
        has_norms(has_norms_) {}

  __host__ __device__ std::int64_t keys(int g) const {
    return static_cast<std::int64_t>(g) * head_bytes;
  }
  __host__ __device__ std::int64_t values(int g) const {
    return static_cast<std::int64_t>(kv_heads + g) * head_bytes;
  }
  // Of the sums' high parts; the low parts lie gate_heads rows behind.
  __host__ __device__ std::int64_t gates(int h) const {
    return values(kv_heads) + static_cast<std::int64_t>(h) * kPageTokens * 4;
  }
  __host__ __device__ std::int64_t low_gates(int h) const { return gates(gate_heads + h); }
  __host__ __device__ std::int64_t norms(int g) const { return gates(2 * gate_heads + g); }
  __host__ __device__ std::int64_t bytes() const { return norms(has_norms ? kv_heads : 0); }
};

// Byte offset, within a head's keys, of dimension d of 16 bytes of tokens: chunk c.
template <typename T>
__device__ constexpr int key_chunk(int d, int c) {
  if (sizeof(T) == 4) return d * 256 + c * 16;
  return d * 128 + ((c ^ (d & 7)) * 16);
}

// Byte offset, within a head's values, of token t's 16 bytes of dimensions: chunk c.
template <typename T, int kDim>
__device__ constexpr int value_chunk(int t, int c) {
  if (sizeof(T) == 4) return t * kDim * 4 + c * 16;
  if (kDim == 32) return t * 64 + ((c ^ ((t >> 1) & 3)) * 16);
  return (c >> 3) * (kPageTokens * 128) + t * 128 + (((c & 7) ^ (t & 7)) * 16);
}

}  // namespace deltafox::cuda
