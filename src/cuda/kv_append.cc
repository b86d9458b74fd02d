#include "ops/kv_append.h"

#include "cuda/check.h"
#include "cuda/kv_append_kernels.cuh"
#include "cuda/kv_batch.h"

namespace deltafox::cuda {

void kv_append(Context& ctx, const KvAppendArgs& args) {
  const KvLayout& layout = args.caches[0]->layout();
  if (args.k.dtype != layout.dtype || args.v.dtype != layout.dtype) {
    fail("kv_append: keys of dtype {} do not fit a cache of {}", name_of(args.k.dtype),
         name_of(layout.dtype));
  }
  AppendParams params{.k = args.k.data,
                      .v = args.v.data,
                      .log_gates = static_cast<const float*>(args.log_gates.data),
                      .sequences = nullptr,
                      .sequence_count = static_cast<std::int32_t>(args.sequences.count()),
                      .recorded_runs = ctx.recorded_runs(),
                      .layout = page_layout("kv_append", layout)};
  const bool bf16 = layout.dtype == DType::kBF16;
  if (all_single(args.sequences)) {
    upload_together(ctx,
                    [&] { params.sequences = upload_sequences(ctx, args.sequences, args.caches); });
    launch_kv_append_single(params, bf16, stream_of(ctx));
    return check_launch("kv_append");
  }
  std::vector<AppendTile> tiles;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t length = args.caches[static_cast<std::size_t>(b)]->length();
    const std::int64_t rows = args.sequences.length(b);
    if (rows == 0) continue;
    for (std::int64_t p = (length - rows) / kKvPage; p <= (length - 1) / kKvPage; ++p) {
      tiles.push_back({static_cast<std::int32_t>(b), static_cast<std::int32_t>(p)});
    }
  }
  if (tiles.empty()) return;
  const AppendTile* on_device = nullptr;
  upload_together(ctx, [&] {
    params.sequences = upload_sequences(ctx, args.sequences, args.caches);
    on_device = upload(ctx, std::span(tiles));
  });
  launch_kv_append(params, on_device, static_cast<int>(tiles.size()), bf16, stream_of(ctx));
  check_launch("kv_append");
}

}  // namespace deltafox::cuda
