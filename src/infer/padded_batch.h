// A padded batch [B, T], as Hugging Face models take it, as the ragged one that Model reads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deltafox/model.h"

namespace deltafox::infer {

class PaddedBatch {
 public:
  // input_ids and attention_mask [rows, T]. The mask is 1 at a row's tokens, which are next to one
  // another, and 0 at the padding on their left, right or both; an empty mask means no padding.
  // `first_row` is the number of the first row in Errors, which name a row whose mask is otherwise.
  PaddedBatch(std::span<const std::int32_t> input_ids, std::span<const std::uint8_t> attention_mask,
              std::int64_t rows, std::int64_t first_row = 0);

  Batch batch() const { return {ids_, cu_seqlens_}; }
  // Where token t of the packed batch stands among the rows · T places. Neighbours of one row are
  // neighbours there.
  std::span<const std::int64_t> places() const { return places_; }

  // The tokens' entries of a padded array [rows, T], packed.
  template <typename T>
  std::vector<T> pack(std::span<const T> padded) const {
    std::vector<T> packed;
    packed.reserve(places_.size());
    for (const std::int64_t place : places_)
      packed.push_back(padded[static_cast<std::size_t>(place)]);
    return packed;
  }

 private:
  std::vector<std::int32_t> ids_;
  std::vector<std::int64_t> cu_seqlens_{0};
  std::vector<std::int64_t> places_;
};

}  // namespace deltafox::infer
