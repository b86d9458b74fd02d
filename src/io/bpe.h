// Byte-level byte-pair encoding: the ids of a text under a ranked list of merges.
//
// The text is cut into pieces (pretokenizer.h); a piece begins as one token a byte, and the
// adjacent pair with the lowest rank, the leftmost among equals, merges until no pair has a rank.
// That costs O(n log n) for a piece of n bytes. What common pieces become is looked up instead.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace deltafox {

class Bpe {
 public:
  static constexpr std::int32_t kNoToken = -1;

  // Two tokens that become one; the rank is the position in the list (the last one, if repeated).
  struct Merge {
    std::int32_t left;
    std::int32_t right;
    std::int32_t result;
  };

  Bpe() = default;
  // byte_tokens: the token of each byte, or kNoToken.
  Bpe(const std::array<std::int32_t, 256>& byte_tokens, std::vector<Merge> merges);

  // Enters a token, so that a piece of just these bytes is found without merging. Ignored where
  // merging would not give this token, or where the bytes are too many.
  void add_word(std::string_view bytes, std::int32_t token);

  // Appends the ids of `text`, which is valid UTF-8. Bytes without a token yield kNoToken.
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const;

  std::int32_t byte_token(unsigned char byte) const { return byte_tokens_[byte]; }

 private:
  static constexpr std::uint32_t kNoMerge = 0xFFFFFFFF;

  // A word of 1 to 15 bytes, padded with zeros; the last byte holds the length. Empty: no word.
  struct Word {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
    bool operator==(const Word&) const = default;
  };
  // What a piece became earlier in the same call: ids[begin, begin + count).
  struct Seen {
    std::string_view piece;
    std::size_t begin = 0;
    std::size_t count = 0;
  };
  // Where a pair's merge stands. The tag, from the pair's hash, spares most looks at the merge
  // itself.
  struct PairSlot {
    std::uint32_t tag = 0;
    std::uint32_t rank = kNoMerge;  // kNoMerge: empty
  };

  // A token of a piece that is being merged.
  struct Part {
    std::int32_t token;
    std::uint32_t rank;  // with the next token
  };

  static Word word_of(std::string_view piece, const char* readable_end);
  static std::uint64_t hash(const Word& word);
  static std::uint64_t pair_hash(std::int32_t left, std::int32_t right);
  std::size_t pair_index(std::int32_t left, std::int32_t right) const;
  std::uint32_t rank_of(std::int32_t left, std::int32_t right) const;
  std::uint32_t rank_of_bytes(std::string_view piece, std::size_t at) const;
  std::size_t word_index(const Word& word) const;
  // The tokens of a piece to parts [piece.size()]; how many they are.
  std::size_t merge_parts(std::string_view piece, Part* parts) const;
  void merge_short(std::string_view piece, std::vector<std::int32_t>& ids) const;
  void merge_long(std::string_view piece, std::vector<std::int32_t>& ids) const;

  std::array<std::int32_t, 256> byte_tokens_{};
  std::vector<Merge> merges_;  // [rank]
  // Ranks of the pairs that pieces begin with, [256, 256]: half of all look-ups, in little memory.
  std::vector<std::uint32_t> byte_ranks_;
  // Open addressing with linear probing, at most half full, sizes a power of two.
  std::vector<PairSlot> pairs_;
  int pair_shift_ = 0;
  std::vector<Word> words_;
  std::vector<std::int32_t> word_tokens_;  // of words_, apart, so that a probe touches one line
};

}  // namespace deltafox
