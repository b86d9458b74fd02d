// Writes the keys, values and log forget gates of new tokens into caches: sequence b's rows become
// the last length(b) positions of caches[b], for which KvCache::extend has made room.
#pragma once

#include <span>

#include "core/context.h"
#include "core/sequences.h"
#include "ops/kv_cache.h"

namespace deltafox {

struct KvAppendArgs {
  ConstTensorView k;               // [T, G, D]
  ConstTensorView v;               // [T, G, D]
  ConstTensorView log_gates = {};  // [T, H], none of them positive; no data if the caches keep none
  Sequences sequences;
  std::span<KvCache* const> caches;  // [B]
};

namespace ops {
void kv_append(Context& ctx, const KvAppendArgs& args);
}
namespace cpu {
void kv_append(Context& ctx, const KvAppendArgs& args);
}
namespace cuda {
void kv_append(Context& ctx, const KvAppendArgs& args);
}
}  // namespace deltafox
