// What a step reads: windows of token ids in a fixed order.
//
// The order of LongCrawl64 is the official loader's: with R rows in whole batches of B and windows
// of T columns, batch b holds rows [r·B, r·B + B), r = b mod (R/B), of window column b div (R/B).
// The windows of a token file, one behind the other, come in an order drawn anew for each pass.
//
// A window's labels are its ids; its inputs are the labels shifted by one, with BOS in front.
// Windows of nothing but zeros and ids that the vocabulary does not have are an Error that says
// where: no step is made of them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "core/thread_pool.h"
#include "io/token_file.h"
#include "io/zarr.h"

namespace deltafox::train {

struct BatchShape {
  std::int64_t size = 0;    // B windows
  std::int64_t length = 0;  // T ids each
  std::int64_t tokens() const { return size * length; }
};

class DataSet {
 public:
  // Of GPT-2, whose ids LongCrawl64 holds.
  static constexpr std::int32_t kGpt2Vocab = 50257;
  static constexpr std::int32_t kGpt2EndOfText = 50256;

  // The zarr array in `directory`; its first `total_tokens`, counted in whole rows, or all of it.
  // Throws Error if these do not fall into whole batches of whole rows.
  static DataSet long_crawl(const std::string& directory, const BatchShape& shape,
                            std::optional<std::int64_t> total_tokens = std::nullopt);
  // The token file at `path`. With a seed it repeats for ever, each time in another order; without
  // one it is read once, in order, at most `total_tokens` of it.
  static DataSet tokens(const std::string& path, const BatchShape& shape,
                        std::optional<std::uint64_t> seed,
                        std::optional<std::int64_t> total_tokens = std::nullopt);

  const BatchShape& shape() const { return shape_; }
  std::int32_t vocab_size() const;
  std::int32_t bos() const;
  // How many there are; for a token file that repeats, in one pass.
  std::int64_t batches() const { return batches_; }
  bool repeats() const { return seed_.has_value(); }

  // Batch `index` into input_ids and labels [B, T].
  void read(std::int64_t index, ThreadPool& threads, std::span<std::int32_t> input_ids,
            std::span<std::int32_t> labels);

 private:
  explicit DataSet(std::variant<io::ZarrArray, io::TokenFile> source, const BatchShape& shape)
      : source_(std::move(source)), shape_(shape) {}

  const std::string& path() const;
  // The place in the file of the n-th window of the endless sequence of passes.
  std::int64_t shuffled(std::int64_t n);
  void check_row(std::int64_t row, std::int64_t first, std::span<const std::int32_t> ids) const;

  std::variant<io::ZarrArray, io::TokenFile> source_;
  BatchShape shape_;
  std::int64_t batches_ = 0;
  std::optional<std::uint64_t> seed_;
  std::int64_t pass_ = -1;            // of `order_`
  std::vector<std::uint32_t> order_;  // [windows]
};

}  // namespace deltafox::train
