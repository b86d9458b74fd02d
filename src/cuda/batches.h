// Launches an op's kernels over its sequences, SequenceBatch::kLimit of them at a time.
#pragma once

#include <span>

#include "core/sequences.h"
#include "cuda/sequence_batch.h"

namespace deltafox::cuda {

// Shorter sequences take a mixer's recurrence instead of its chunks.
constexpr int kLeastChunkedRows = 24;

// launch(batch) for the sequences that are not empty and that `choose(length)` gives one or more
// segments; `choose` must depend on nothing but the length, or results would depend on the batch.
// Without states, those of the entries are null.
template <class Choose, class Launch>
void for_each_batch(const Sequences& sequences, std::span<float* const> states,
                    const Choose& choose, const Launch& launch) {
  SequenceBatch batch;
  for (std::int64_t b = 0; b < sequences.count(); ++b) {
    const int length = static_cast<int>(sequences.length(b));
    const int segments = length > 0 ? choose(length) : 0;
    if (segments == 0) continue;
    float* state = states.empty() ? nullptr : states[static_cast<std::size_t>(b)];
    batch.add(state, static_cast<int>(sequences.begin(b)), length, segments);
    if (batch.count == SequenceBatch::kLimit) {
      launch(batch);
      batch = {};
    }
  }
  if (batch.count > 0) launch(batch);
}

}  // namespace deltafox::cuda
