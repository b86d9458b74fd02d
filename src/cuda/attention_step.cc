// attention_step (ops/attention_step.h) in two launches: what comes before the attention, and the
// kernel of attention_decode.cu, which normalises and gates a head where it is finished.
#include "ops/attention_step.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cuda/attention_kernels.cuh"
#include "cuda/attention_step_kernels.h"
#include "cuda/kv_batch.h"
#include "cuda/rope_kernels.h"
#include "ops/step.h"

namespace deltafox::cuda {
namespace {

const float* data_of(const ConstTensorView& view) {
  return static_cast<const float*>(view.data);
}

}  // namespace

void attention_step(Context& ctx, const AttentionStepArgs& args) {
  run_step_program(ctx);  // what comes before
  const KvLayout& layout = args.caches[0]->layout();
  const std::int64_t batch = args.q.shape[0];
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t dim = args.q.shape[2];
  ScratchScope scratch(ctx);
  const TensorView q = scratch.tensor(args.q.shape, DType::kBF16);  // [B, H, D]
  const auto stride = [&](const ConstTensorView& norm) {
    return norm.data != nullptr && norm.shape.size() > dim ? static_cast<int>(dim) : 0;
  };
  StepInputs input{.q = args.q.f32(),
                   .k = args.k.f32(),
                   .v = args.v.f32(),
                   .k_alpha = data_of(args.k_alpha),
                   .v_alpha = data_of(args.v_alpha),
                   .k_states = nullptr,
                   .v_states = nullptr,
                   .q_norm = data_of(args.q_norm),
                   .k_norm = data_of(args.k_norm),
                   .q_norm_stride = stride(args.q_norm),
                   .k_norm_stride = stride(args.k_norm),
                   .eps = args.qk_norm_eps,
                   .frequencies = nullptr,
                   .gates = data_of(args.gates),
                   .gate_bias = data_of(args.gate_bias),
                   .sequences = nullptr,
                   .recorded_runs = ctx.recorded_runs(),
                   .layout = page_layout("attention_step", layout),
                   .heads = static_cast<int>(heads),
                   .q_out = static_cast<__nv_bfloat16*>(q.data)};
  std::vector<float> frequencies;
  if (args.rope_base) frequencies = rope_frequencies(dim, *args.rope_base);
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(batch) + 1);
  std::vector<std::int32_t> single(static_cast<std::size_t>(batch));
  std::iota(offsets.begin(), offsets.end(), 0);
  std::iota(single.begin(), single.end(), 0);
  const float* bounds = nullptr;
  const std::int32_t* single_on_device = nullptr;
  upload_together(ctx, [&] {
    if (args.k_alpha.data != nullptr) input.k_states = upload(ctx, args.k_shift_states);
    if (args.v_alpha.data != nullptr) input.v_states = upload(ctx, args.v_shift_states);
    if (args.rope_base) input.frequencies = upload(ctx, std::span<const float>(frequencies));
    input.sequences = upload_sequences(ctx, Sequences(offsets), args.caches);
    if (!args.score_bounds.empty()) bounds = upload(ctx, args.score_bounds);
    single_on_device = upload(ctx, std::span<const std::int32_t>(single));
  });
  launch_step_inputs(ctx, input, batch);
  attend_to_last(ctx,
                 {.q = q.data,
                  .o = args.o.data,
                  .sequences = input.sequences,
                  .layout = input.layout,
                  .heads = static_cast<std::int32_t>(heads),
                  .window = static_cast<std::int32_t>(layout.window.value_or(0)),
                  .scale = 1 / std::sqrt(static_cast<float>(dim)),
                  .log_tolerance =
                      args.log_pruning_tolerance.value_or(-std::numeric_limits<float>::infinity()),
                  .score_bounds = bounds,
                  .single = single_on_device,
                  .single_count = static_cast<std::int32_t>(batch),
                  .max_splits = static_cast<std::int32_t>(most_splits(args.caches)),
                  .output_norm = data_of(args.output_norm),
                  .output_norm_eps = args.output_norm_eps,
                  .output_gate = data_of(args.output_gate),
                  .output_gate_activation = args.output_gate_activation,
                  .dependent = true},
                 true);
}

}  // namespace deltafox::cuda
