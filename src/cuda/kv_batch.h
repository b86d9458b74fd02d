// The KV caches of a batch, as kernels see them.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "core/context.h"
#include "core/error.h"
#include "core/sequences.h"
#include "cuda/kv_pages.cuh"
#include "cuda/stream.h"
#include "ops/kv_cache.h"

namespace deltafox::cuda {

static_assert(kPageTokens == kKvPage);
constexpr std::int64_t kMaxHeadDim = 128;

// Calls `upload_all` until all that it uploads lies in device memory at the same time.
template <typename UploadAll>
void upload_together(Context& ctx, const UploadAll& upload_all) {
  std::uint64_t generation = 0;
  do {
    generation = ctx.stream().uploads_generation();
    upload_all();
  } while (generation != ctx.stream().uploads_generation());
}

inline KvPageLayout page_layout(const char* op, const KvLayout& layout) {
  if (layout.head_dim > kMaxHeadDim) {
    fail("{}: CUDA has heads of at most {}, not {}", op, kMaxHeadDim, layout.head_dim);
  }
  if (layout.device != Device::kCuda) fail("{}: a cache lies in the host's memory", op);
  return {layout.kv_heads, layout.gate_heads, layout.head_dim, size_of(layout.dtype),
          layout.key_norms};
}

// [B] in device memory.
template <typename Cache>
const KvSequence* upload_sequences(Context& ctx, const Sequences& sequences,
                                   std::span<Cache* const> caches) {
  ScratchScope scratch(ctx);
  const std::int64_t count = sequences.count();
  std::int64_t pages = 0;
  for (const Cache* cache : caches) pages += cache->room_page() - cache->first_page();
  const std::span<std::byte*> pointers = scratch.array<std::byte*>(pages);
  const std::span<KvSequence> batch = scratch.array<KvSequence>(count);
  std::size_t at = 0;
  for (const Cache* cache : caches) {
    for (std::int64_t p = cache->first_page(); p < cache->room_page(); ++p) {
      // Kernels that read take the same table as those that write.
      const void* page = cache->page(p).block.view().data;
      pointers[at++] = static_cast<std::byte*>(const_cast<void*>(page));
    }
  }
  std::byte* const* on_device = upload(ctx, pointers);
  for (std::int64_t b = 0; b < count; ++b) {
    const auto i = static_cast<std::size_t>(b);
    batch[i] = {.pages = on_device,
                .first_page = static_cast<std::int32_t>(caches[i]->first_page()),
                .end_page = static_cast<std::int32_t>(caches[i]->room_page()),
                .length = static_cast<std::int32_t>(caches[i]->length()),
                .row = static_cast<std::int32_t>(sequences.begin(b)),
                .rows = static_cast<std::int32_t>(sequences.length(b))};
    on_device += caches[i]->room_page() - caches[i]->first_page();
  }
  return upload(ctx, batch);
}

// Splits of the keys of a query of one token, as far as there is room.
template <typename Cache>
std::int64_t most_splits(std::span<Cache* const> caches) {
  std::int64_t most = 0;
  for (const Cache* cache : caches) {
    const std::int64_t end = (cache->room_page() * kKvPage + kSplitKeys - 1) / kSplitKeys;
    most = std::max(most, end - cache->first_page() * kKvPage / kSplitKeys);
  }
  return most;
}

inline bool all_single(const Sequences& sequences) {
  for (std::int64_t b = 0; b < sequences.count(); ++b) {
    if (sequences.length(b) != 1) return false;
  }
  return true;
}

}  // namespace deltafox::cuda
