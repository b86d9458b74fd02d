// Tokens and merges, collected from files of any format and checked while they are put together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/bpe.h"
#include "io/special_tokens.h"

namespace deltafox {

// Everything encode and decode look up.
struct Vocabulary {
  struct Token {
    std::size_t begin = 0;  // in `bytes`
    std::uint32_t length = 0;
    bool exists = false;
    bool special = false;
  };
  std::string bytes;          // of all tokens
  std::vector<Token> tokens;  // by id; ids without a token may lie between
  Bpe bpe;
  SpecialTokens split_first;
  // The first byte without a token, if any.
  std::optional<unsigned char> missing_byte;

  std::string_view bytes_of(const Token& token) const {
    return std::string_view(bytes).substr(token.begin, token.length);
  }
};

// A name from a file as it may stand in a one-line message: quoted, escaped and cut short.
std::string quote_name(std::string_view name);

// Bytes in GPT-2's alphabet, in which each is one printable character: how vocab.json and
// merges.txt name a token.
std::string alphabet_name(std::string_view bytes);

class VocabularyBuilder {
 public:
  // `file`: where add_token's tokens come from, for messages.
  explicit VocabularyBuilder(std::string file) : file_(std::move(file)) {}

  // Makes room for about so many tokens.
  void reserve(std::size_t tokens);

  // A token written in GPT-2's alphabet, in which each byte is one printable character. One that
  // uses any other character stands for its own UTF-8.
  void add_token(std::string_view name, std::int64_t id);

  // The next merge; `number` is its line or position, for messages.
  void add_merge(std::string_view left, std::string_view right, std::uint32_t number);

  // A token that stands for its own UTF-8 and is cut out of a text before all else; `file` says so.
  // It may be one that add_token has added. `special`: decode may skip it.
  void add_special(std::string_view name, std::int64_t id, bool special, const std::string& file);

  std::optional<std::int32_t> id_of(std::string_view name) const;

  // `merges_file`, `merge_word`: how a merge is named in messages, as in "merges.txt: line 7".
  Vocabulary build(const std::string& merges_file, std::string_view merge_word) const;

 private:
  struct Entry {
    std::size_t begin;  // in names_
    std::uint32_t length;
    std::int32_t id;
    bool literal;      // stands for its own UTF-8
    bool split_first;  // is cut out of a text
    bool special;
  };
  struct MergeNames {
    std::size_t begin;  // in merge_names_: left and right, one behind the other
    std::uint32_t left_length;
    std::uint32_t right_length;
    std::uint32_t number;
  };
  static constexpr std::uint32_t kNoEntry = 0xFFFFFFFF;

  std::string_view name_of(const Entry& entry) const {
    return std::string_view(names_).substr(entry.begin, entry.length);
  }
  std::size_t slot_of(std::string_view name) const;
  const Entry* find(std::string_view name) const;
  void insert(std::string_view name, std::int64_t id, const std::string& file, bool literal);
  void fill_tokens(Vocabulary& vocabulary) const;
  std::vector<Bpe::Merge> resolve_merges(const std::string& merges_file,
                                         std::string_view merge_word) const;

  std::string file_;
  std::string names_;
  std::vector<Entry> entries_;
  // Open addressing from a name to its entry, at most half full, a power of two.
  std::vector<std::uint32_t> slots_ = std::vector<std::uint32_t>(1024, kNoEntry);
  std::string merge_names_;
  std::vector<MergeNames> merges_;
};

}  // namespace deltafox
