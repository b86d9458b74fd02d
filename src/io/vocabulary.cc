#include "io/vocabulary.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "core/error.h"
#include "io/json_escape.h"
#include "io/utf8.h"

namespace deltafox {
namespace {

// GPT-2 writes each byte as one printable character: printable Latin-1 as itself, the others, in
// order, as U+0100 and up.
struct ByteAlphabet {
  static constexpr std::size_t kEnd = 0x144;
  std::array<char32_t, 256> character{};
  std::array<std::int16_t, kEnd> byte{};

  constexpr ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (std::int16_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
      const char32_t c = printable ? static_cast<char32_t>(b) : next++;
      character[static_cast<std::size_t>(b)] = c;
      byte[c] = b;
    }
  }
};
constexpr ByteAlphabet kAlphabet;

// Appends the bytes that a name in the alphabet stands for; false, appending nothing, if it is
// none.
bool append_bytes(std::string_view name, std::string& out) {
  const std::size_t before = out.size();
  for (std::size_t at = 0; at < name.size();) {
    const char32_t c = utf8::next(name, at);
    if (c >= ByteAlphabet::kEnd || kAlphabet.byte[c] < 0) {
      out.resize(before);
      return false;
    }
    out.push_back(static_cast<char>(kAlphabet.byte[c]));
  }
  return true;
}

}  // namespace

std::string quote_name(std::string_view name) {
  constexpr std::size_t kShown = 60;
  std::string_view shown = name.substr(0, kShown);
  shown.remove_suffix(utf8::incomplete_tail(shown));
  std::string escaped = escape_json(shown);
  if (shown.size() < name.size()) escaped += "...";
  return '"' + escaped + '"';
}

std::string alphabet_name(std::string_view bytes) {
  std::string name;
  for (const char c : bytes) utf8::append(kAlphabet.character[static_cast<unsigned char>(c)], name);
  return name;
}

std::size_t VocabularyBuilder::slot_of(std::string_view name) const {
  const std::size_t mask = slots_.size() - 1;
  std::size_t i = XXH3_64bits(name.data(), name.size()) & mask;
  while (slots_[i] != kNoEntry && name_of(entries_[slots_[i]]) != name) i = (i + 1) & mask;
  return i;
}

const VocabularyBuilder::Entry* VocabularyBuilder::find(std::string_view name) const {
  const std::uint32_t entry = slots_[slot_of(name)];
  return entry == kNoEntry ? nullptr : &entries_[entry];
}

std::optional<std::int32_t> VocabularyBuilder::id_of(std::string_view name) const {
  const Entry* const entry = find(name);
  return entry == nullptr ? std::nullopt : std::optional(entry->id);
}

void VocabularyBuilder::insert(std::string_view name, std::int64_t id, const std::string& file,
                               bool literal) {
  if (id < 0 || id >= std::numeric_limits<std::int32_t>::max()) {
    fail("{}: token {} has the impossible id {}", file, quote_name(name), id);
  }
  const std::size_t slot = slot_of(name);
  if (slots_[slot] != kNoEntry) fail("{}: token {} appears twice", file, quote_name(name));
  slots_[slot] = static_cast<std::uint32_t>(entries_.size());
  entries_.push_back({names_.size(), static_cast<std::uint32_t>(name.size()),
                      static_cast<std::int32_t>(id), literal, false, false});
  names_ += name;
  if (2 * entries_.size() < slots_.size()) return;
  slots_.assign(2 * slots_.size(), kNoEntry);
  for (std::uint32_t i = 0; i < entries_.size(); ++i) slots_[slot_of(name_of(entries_[i]))] = i;
}

void VocabularyBuilder::reserve(std::size_t tokens) {
  entries_.reserve(tokens);
  merges_.reserve(tokens);
  if (entries_.empty()) slots_.assign(std::bit_ceil(2 * tokens + 2), kNoEntry);
}

void VocabularyBuilder::add_token(std::string_view name, std::int64_t id) {
  insert(name, id, file_, false);
}

void VocabularyBuilder::add_merge(std::string_view left, std::string_view right,
                                  std::uint32_t number) {
  merges_.push_back({merge_names_.size(), static_cast<std::uint32_t>(left.size()),
                     static_cast<std::uint32_t>(right.size()), number});
  merge_names_ += left;
  merge_names_ += right;
}

void VocabularyBuilder::add_special(std::string_view name, std::int64_t id, bool special,
                                    const std::string& file) {
  if (name.empty()) fail("{}: added token {} is empty", file, id);
  if (name.size() > SpecialTokens::kMaxLength) {
    fail("{}: added token {} is longer than {} bytes", file, quote_name(name),
         SpecialTokens::kMaxLength);
  }
  if (find(name) == nullptr) insert(name, id, file, true);
  Entry& entry = entries_[slots_[slot_of(name)]];
  if (entry.id != id) {
    fail("{}: added token {} has id {}, but {} in {}", file, quote_name(name), id, entry.id, file_);
  }
  entry.literal = true;
  entry.split_first = true;
  entry.special = entry.special || special;
}

void VocabularyBuilder::fill_tokens(Vocabulary& vocabulary) const {
  std::int32_t highest = -1;
  for (const Entry& entry : entries_) highest = std::max(highest, entry.id);
  const auto count = static_cast<std::int64_t>(entries_.size());
  // A few ids may be unused, but a mistaken one must not cost gigabytes.
  if (highest >= 2 * count + 65536) {
    fail("{}: the highest id is {}, but there are only {} tokens", file_, highest, count);
  }
  std::vector<const Entry*> by_id(static_cast<std::size_t>(highest + 1));
  vocabulary.tokens.resize(by_id.size());
  vocabulary.bytes.reserve(names_.size());
  for (const Entry& entry : entries_) {
    const Entry*& owner = by_id[static_cast<std::size_t>(entry.id)];
    if (owner != nullptr) {
      fail("{}: tokens {} and {} have the same id {}", file_, quote_name(name_of(*owner)),
           quote_name(name_of(entry)), entry.id);
    }
    owner = &entry;
    const std::size_t begin = vocabulary.bytes.size();
    if (entry.literal || !append_bytes(name_of(entry), vocabulary.bytes)) {
      vocabulary.bytes += name_of(entry);
    }
    vocabulary.tokens[static_cast<std::size_t>(entry.id)] = {
        begin, static_cast<std::uint32_t>(vocabulary.bytes.size() - begin), true, entry.special};
    if (entry.split_first) vocabulary.split_first.add(name_of(entry), entry.id);
  }
}

std::vector<Bpe::Merge> VocabularyBuilder::resolve_merges(const std::string& merges_file,
                                                          std::string_view merge_word) const {
  std::vector<Bpe::Merge> merges;
  merges.reserve(merges_.size());
  for (const MergeNames& names : merges_) {
    const auto token = [&](std::size_t begin, std::size_t length) {
      const std::string_view name =
          std::string_view(merge_names_).substr(names.begin + begin, length);
      const Entry* const entry = find(name);
      if (entry == nullptr) {
        fail("{}: {} {}: {} is not in the vocabulary", merges_file, merge_word, names.number,
             quote_name(name));
      }
      return entry->id;
    };
    const std::size_t left = names.left_length;
    const std::size_t right = names.right_length;
    merges.push_back({token(0, left), token(left, right), token(0, left + right)});
  }
  return merges;
}

Vocabulary VocabularyBuilder::build(const std::string& merges_file,
                                    std::string_view merge_word) const {
  if (entries_.empty()) fail("{}: the vocabulary is empty", file_);
  Vocabulary vocabulary;
  fill_tokens(vocabulary);
  std::array<std::int32_t, 256> byte_tokens{};
  for (std::size_t b = 256; b-- > 0;) {
    const char byte = static_cast<char>(b);
    byte_tokens[b] = id_of(alphabet_name({&byte, 1})).value_or(Bpe::kNoToken);
    if (byte_tokens[b] == Bpe::kNoToken) vocabulary.missing_byte = static_cast<unsigned char>(b);
  }
  vocabulary.bpe = Bpe(byte_tokens, resolve_merges(merges_file, merge_word));
  for (const Entry& entry : entries_) {
    const Vocabulary::Token& token = vocabulary.tokens[static_cast<std::size_t>(entry.id)];
    vocabulary.bpe.add_word(vocabulary.bytes_of(token), entry.id);
  }
  return vocabulary;
}

}  // namespace deltafox
