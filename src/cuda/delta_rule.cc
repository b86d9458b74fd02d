// Which kernel a sequence takes is a matter of its own length and of the bucket of all tokens, so
// what it gets does not depend on who shares its batch: the recurrence where it is short, three
// kernels over few chunks, walks in segments over many.
#include "ops/delta_rule.h"

#include <algorithm>
#include <bit>

#include "core/error.h"
#include "cuda/batches.h"
#include "cuda/delta_rule_kernels.h"
#include "cuda/stream.h"
#include "ops/rms_norm.h"

namespace deltafox::cuda {
namespace {

constexpr int kLargestKeyDim = 256;

// The norm of what kernels without one have left of the sequences that `chosen(length)` names,
// neighbours at once.
template <class Chosen>
void norm_outputs(Context& ctx, const DeltaRuleArgs& args, const Chosen& chosen) {
  if (args.norm.data == nullptr) return;
  const Sequences& sequences = args.sequences;
  const std::int64_t heads = args.o.shape[1];
  const std::int64_t values = args.o.shape[2];
  std::int64_t begin = 0;
  std::int64_t end = 0;
  const auto flush = [&] {
    if (begin == end) return;
    const std::size_t before = bytes_of(args.o.dtype, {begin, heads, values});
    const TensorView rows{static_cast<std::byte*>(args.o.data) + before, args.o.dtype,
                          Shape{(end - begin) * heads, values}};
    rms_norm(ctx, {.x = rows, .w = args.norm, .y = rows, .eps = args.norm_eps});
  };
  for (std::int64_t b = 0; b < sequences.count(); ++b) {
    if (!chosen(static_cast<int>(sequences.length(b)))) continue;
    if (sequences.begin(b) != end) {
      flush();
      begin = sequences.begin(b);
    }
    end = sequences.begin(b) + sequences.length(b);
  }
  flush();
}

}  // namespace

void delta_rule(Context& ctx, const DeltaRuleArgs& args) {
  if (args.q.shape[2] > kLargestKeyDim) {
    fail("delta_rule: CUDA keeps at most {} keys a head, not {}", kLargestKeyDim, args.q.shape[2]);
  }
  if (args.k.dtype != args.q.dtype || args.v.dtype != args.q.dtype ||
      args.o.dtype != args.q.dtype) {
    fail("delta_rule: CUDA needs q, k, v and o of one dtype");
  }
  // A block of the chunks' kernels sees so many values.
  const bool norm_fits = args.v.shape[2] <= kNormedValues;
  const DeltaRuleProblem problem{
      .q = args.q.data,
      .k = args.k.data,
      .v = args.v.data,
      .beta = args.beta.data,
      .o = args.o.data,
      .is_bf16 = args.q.dtype == DType::kBF16,
      .heads = static_cast<int>(args.q.shape[1]),
      .key_dim = static_cast<int>(args.q.shape[2]),
      .value_dim = static_cast<int>(args.v.shape[2]),
      .norm = norm_fits && args.norm.data != nullptr ? args.norm.f32() : nullptr,
      .norm_eps = args.norm_eps,
  };
  const bool chunks_fit = delta_rule_chunks_fit(problem);
  const int multiprocessors = ctx.stream().multiprocessors();
  const auto bucket =
      static_cast<int>(std::bit_ceil(static_cast<std::uint64_t>(args.sequences.tokens())));
  const auto chunked = [&](int length) { return chunks_fit && length >= kLeastChunkedRows; };
  const auto scanned = [&](int length) {
    return chunked(length) && delta_rule_scans(problem, length, bucket, multiprocessors);
  };
  // Where all is scanned, the scan's kernels may compute its inputs too.
  const DeltaInputsArgs* inputs = args.inputs;
  if (inputs != nullptr) {
    bool within = delta_rule_scan_takes(ctx, *inputs);
    for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
      within = within && scanned(static_cast<int>(args.sequences.length(b)));
    }
    if (!within) {
      delta_inputs(ctx, *inputs);
      inputs = nullptr;
    }
  }
  for_each_batch(
      args.sequences, args.states, [&](int length) { return scanned(length) ? 1 : 0; },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        const auto bytes = static_cast<std::int64_t>(delta_rule_scan_bytes(problem, batch));
        launch_delta_rule_scan(ctx, problem, batch, scratch.tensor({bytes}, DType::kU8).data,
                               inputs, args.next);
      });
  for_each_batch(
      args.sequences, args.states,
      [&](int length) {
        return chunked(length) && !scanned(length)
                   ? delta_rule_segments_of(problem, length, bucket, multiprocessors)
                   : 0;
      },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        const auto bytes = static_cast<std::int64_t>(delta_rule_maps_bytes(problem, batch.maps));
        float* maps = batch.maps == 0 ? nullptr : scratch.tensor({bytes / 4}).f32();
        launch_delta_rule_chunks(ctx, problem, batch, maps);
      });
  for (const bool single : {true, false}) {
    for_each_batch(
        args.sequences, args.states,
        [&](int length) { return !chunked(length) && (length == 1) == single ? 1 : 0; },
        [&](const SequenceBatch& batch) {
          launch_delta_rule_recurrent(problem, batch, single, stream_of(ctx));
        });
  }
  norm_outputs(ctx, args, [&](int length) { return !norm_fits || !chunked(length); });
}

void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args) {
  if (args.q.shape[2] > kLargestKeyDim) {
    fail("delta_rule_backward: CUDA keeps at most {} keys a head, not {}", kLargestKeyDim,
         args.q.shape[2]);
  }
  for (const DType dtype :
       {args.k.dtype, args.v.dtype, args.d_o.dtype, args.dq.dtype, args.dk.dtype, args.dv.dtype}) {
    if (dtype != args.q.dtype) {
      fail("delta_rule_backward: CUDA needs q, k, v, d_o and their gradients of one dtype");
    }
  }
  const bool has_beta = args.beta.data != nullptr;
  const DeltaRuleBackwardProblem problem{
      .q = args.q.data,
      .k = args.k.data,
      .v = args.v.data,
      .beta = has_beta ? args.beta.f32() : nullptr,
      .d_o = args.d_o.data,
      .dq = args.dq.data,
      .dk = args.dk.data,
      .dv = args.dv.data,
      .dbeta = has_beta ? args.dbeta.f32() : nullptr,
      .is_bf16 = args.q.dtype == DType::kBF16,
      .heads = static_cast<int>(args.q.shape[1]),
      .key_dim = static_cast<int>(args.q.shape[2]),
      .value_dim = static_cast<int>(args.v.shape[2]),
  };
  const bool chunks_fit = delta_rule_backward_chunks_fit(problem);
  const auto chunked = [&](int length) { return chunks_fit && length >= kLeastChunkedRows; };
  const int multiprocessors = ctx.stream().multiprocessors();
  for_each_batch(
      args.sequences, {},
      [&](int length) {
        return chunked(length) ? delta_rule_backward_segments(problem, length, multiprocessors) : 0;
      },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        const auto bytes =
            static_cast<std::int64_t>(delta_rule_backward_chunks_bytes(problem, batch));
        launch_delta_rule_backward_chunks(ctx, problem, batch, scratch.tensor({bytes / 4}).data);
      });
  for_each_batch(
      args.sequences, {}, [&](int length) { return chunked(length) ? 0 : chunks_of(length); },
      [&](const SequenceBatch& batch) {
        ScratchScope scratch(ctx);
        const Shape states{batch.blocks, problem.heads, problem.key_dim, problem.value_dim};
        const DeltaRuleBackwardWorkspace workspace{
            .errors = scratch.tensor(args.v.shape).f32(),
            .d_errors = scratch.tensor(args.v.shape).f32(),
            .states = scratch.tensor(states).f32(),
            .d_states = scratch.tensor(states).f32(),
        };
        launch_delta_rule_backward_plain(problem, workspace, batch, stream_of(ctx));
      });
}

}  // namespace deltafox::cuda
