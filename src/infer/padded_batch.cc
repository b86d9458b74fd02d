#include "infer/padded_batch.h"

#include <algorithm>
#include <cassert>

#include "core/error.h"

namespace deltafox::infer {

PaddedBatch::PaddedBatch(std::span<const std::int32_t> input_ids,
                         std::span<const std::uint8_t> attention_mask, std::int64_t rows,
                         std::int64_t first_row) {
  assert(rows > 0 && input_ids.size() % static_cast<std::size_t>(rows) == 0);
  assert(attention_mask.empty() || attention_mask.size() == input_ids.size());
  const auto columns = static_cast<std::int64_t>(input_ids.size()) / rows;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t begin = 0;
    std::int64_t end = columns;
    if (!attention_mask.empty()) {
      const auto mask = attention_mask.subspan(static_cast<std::size_t>(row * columns),
                                               static_cast<std::size_t>(columns));
      const auto other = std::find_if(mask.begin(), mask.end(), [](auto m) { return m > 1; });
      if (other != mask.end()) {
        fail("attention_mask: row {}: must be 0 or 1, got {} at position {}", first_row + row,
             *other, other - mask.begin());
      }
      const auto first = std::find(mask.begin(), mask.end(), 1);
      const auto last = std::find(first, mask.end(), 0);
      begin = first - mask.begin();
      end = last - mask.begin();
      if (const auto again = std::find(last, mask.end(), 1); again != mask.end()) {
        fail(
            "attention_mask: row {}: padding must be on the left or on the right, but position {} "
            "is 0 between ones",
            first_row + row, end);
      }
    }
    if (begin == end) fail("attention_mask: row {} has no token", first_row + row);
    for (std::int64_t t = begin; t < end; ++t) {
      places_.push_back(row * columns + t);
      ids_.push_back(input_ids[static_cast<std::size_t>(row * columns + t)]);
    }
    cu_seqlens_.push_back(static_cast<std::int64_t>(ids_.size()));
  }
}

}  // namespace deltafox::infer
