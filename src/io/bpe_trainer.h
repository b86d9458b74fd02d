// Learning the merges of a byte-level byte-pair encoding from text.
//
// The text is cut into pieces as in encoding (pretokenizer.h), and each distinct piece counts as
// often as it occurs. Beginning with the 256 bytes, the most frequent adjacent pair becomes a
// token, again and again; of equally frequent pairs the one with the smaller left, then the smaller
// right id. So the same text gives the same tokens on any machine, whatever order it was counted
// in.
//
// Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace deltafox::io {

// How often each piece occurs.
class PieceCounts {
 public:
  // Throws Error if the text is not UTF-8.
  void add(std::string_view text);
  void merge(const PieceCounts& other);

  const std::unordered_map<std::string, std::int64_t>& counts() const { return counts_; }

 private:
  std::unordered_map<std::string, std::int64_t> counts_;
};

struct BpeVocabulary {
  // The first 256 are the bytes in GPT-2's order.
  std::vector<std::string> tokens;                            // as bytes, by id
  std::vector<std::pair<std::int32_t, std::int32_t>> merges;  // ids

  std::string vocab_json() const;  // with <|endoftext|> as the last id
  std::string merges_txt() const;
};

// `vocab_size` counts the bytes and <|endoftext|> as well; there are fewer tokens if no pair is
// left that occurs twice. on_progress(tokens so far) may be empty.
BpeVocabulary train_bpe(const PieceCounts& pieces, std::int32_t vocab_size,
                        const std::function<void(std::int64_t)>& on_progress = {});

}  // namespace deltafox::io
