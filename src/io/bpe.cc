#include "io/bpe.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <queue>

#include "core/error.h"
#include "io/pretokenizer.h"

namespace deltafox {
namespace {

static_assert(std::endian::native == std::endian::little, "Word is read from text as it lies");

constexpr std::size_t kMaxWord = 15;
// Up to here, scanning an array for the lowest rank beats a heap.
constexpr std::size_t kMaxShortPiece = 96;

std::uint64_t mix(std::uint64_t key) {
  key *= 0x9E3779B97F4A7C15U;
  return key ^ key >> 32;
}

// A mask of the n lowest bytes of a word, n in 0..8.
std::uint64_t low_bytes(std::size_t n) {
  return n == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * n)) - 1;
}

}  // namespace

// The high bits say where to look for a pair, the low ones are its tag.
inline std::uint64_t Bpe::pair_hash(std::int32_t left, std::int32_t right) {
  const std::uint64_t pair =
      std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
  return mix(pair) * 0xD6E8FEB86659FD93U;
}

// The slot of a pair, or the empty one where it would stand.
inline std::size_t Bpe::pair_index(std::int32_t left, std::int32_t right) const {
  const std::uint64_t hash = pair_hash(left, right);
  const std::size_t mask = pairs_.size() - 1;
  for (std::size_t i = hash >> pair_shift_;; i = (i + 1) & mask) {
    const PairSlot& slot = pairs_[i];
    if (slot.rank == kNoMerge) return i;
    if (slot.tag != static_cast<std::uint32_t>(hash)) continue;
    if (merges_[slot.rank].left == left && merges_[slot.rank].right == right) return i;
  }
}

Bpe::Bpe(const std::array<std::int32_t, 256>& byte_tokens, std::vector<Merge> merges)
    : byte_tokens_(byte_tokens), merges_(std::move(merges)) {
  const std::size_t size = std::bit_ceil(std::max<std::size_t>(2 * merges_.size(), 16));
  pairs_.resize(size);
  pair_shift_ = 64 - std::countr_zero(size);
  for (std::uint32_t rank = 0; rank < merges_.size(); ++rank) {
    const Merge& merge = merges_[rank];
    pairs_[pair_index(merge.left, merge.right)] = {
        static_cast<std::uint32_t>(pair_hash(merge.left, merge.right)), rank};
  }
  // Words are bytes and results of merges: there cannot be more.
  words_.resize(std::bit_ceil(2 * (merges_.size() + 256)));
  word_tokens_.resize(words_.size());
  byte_ranks_.resize(256 * 256);
  for (std::size_t i = 0; i < byte_ranks_.size(); ++i) {
    byte_ranks_[i] = rank_of(byte_tokens_[i >> 8], byte_tokens_[i & 0xFF]);
  }
}

inline std::uint32_t Bpe::rank_of(std::int32_t left, std::int32_t right) const {
  return pairs_[pair_index(left, right)].rank;
}

inline std::uint32_t Bpe::rank_of_bytes(std::string_view piece, std::size_t at) const {
  return byte_ranks_[static_cast<std::size_t>(static_cast<unsigned char>(piece[at])) << 8 |
                     static_cast<unsigned char>(piece[at + 1])];
}

inline Bpe::Word Bpe::word_of(std::string_view piece, const char* readable_end) {
  const std::size_t n = piece.size();
  Word word;
  if (readable_end - piece.data() >= static_cast<std::ptrdiff_t>(sizeof(word))) {
    std::memcpy(&word, piece.data(), sizeof(word));
    word.low &= low_bytes(std::min<std::size_t>(n, 8));
    word.high &= low_bytes(n > 8 ? n - 8 : 0);
  } else {
    std::memcpy(&word, piece.data(), n);
  }
  word.high |= std::uint64_t{n} << 56;
  return word;
}

inline std::uint64_t Bpe::hash(const Word& word) {
  const std::uint64_t h = mix(word.low) + word.high * 0xC2B2AE3D27D4EB4FU;
  return mix(h ^ h >> 29);
}

// The slot of a word, or the empty one where it would stand.
inline std::size_t Bpe::word_index(const Word& word) const {
  const std::size_t mask = words_.size() - 1;
  std::size_t i = hash(word) & mask;
  while (words_[i] != word && words_[i] != Word{}) i = (i + 1) & mask;
  return i;
}

void Bpe::add_word(std::string_view bytes, std::int32_t token) {
  if (bytes.empty() || bytes.size() > kMaxWord) return;
  const Word word = word_of(bytes, bytes.data() + bytes.size());
  __builtin_prefetch(&words_[hash(word) & (words_.size() - 1)], 1);  // comes while the bytes merge
  std::array<Part, kMaxWord> parts;
  if (merge_parts(bytes, parts.data()) != 1 || parts[0].token != token) return;
  const std::size_t i = word_index(word);
  words_[i] = word;
  word_tokens_[i] = token;
}

void Bpe::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  const Pretokenizer& pretokenizer = Pretokenizer::instance();
  const char* const end = text.data() + text.size();
  // Sized to the text, so that a short one does not pay for clearing a large table.
  std::vector<Seen> seen(std::clamp<std::size_t>(std::bit_ceil(text.size() / 16), 16, 8192));
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view piece = pretokenizer.piece(text, at);
    at += piece.size();
    std::uint64_t piece_hash = 0;
    if (piece.size() <= kMaxWord) {
      const Word word = word_of(piece, end);
      const std::size_t i = word_index(word);
      if (words_[i] == word) {
        ids.push_back(word_tokens_[i]);
        continue;
      }
      piece_hash = hash(word) >> 20;
    } else if (piece.size() <= kMaxShortPiece) {
      piece_hash = XXH3_64bits(piece.data(), piece.size());
    } else {
      merge_long(piece, ids);
      continue;
    }
    Seen& known = seen[piece_hash & (seen.size() - 1)];
    if (known.piece == piece) {
      for (std::size_t i = 0; i < known.count; ++i) {
        const std::int32_t id = ids[known.begin + i];
        ids.push_back(id);
      }
      continue;
    }
    const std::size_t begin = ids.size();
    merge_short(piece, ids);
    known = {piece, begin, ids.size() - begin};
  }
}

std::size_t Bpe::merge_parts(std::string_view piece, Part* parts) const {
  std::size_t n = piece.size();
  for (std::size_t i = 0; i < n; ++i) {
    parts[i] = {byte_tokens_[static_cast<unsigned char>(piece[i])],
                i + 1 < n ? rank_of_bytes(piece, i) : kNoMerge};
  }
  for (;;) {
    // The lowest rank and its leftmost position in one number: no branch to mispredict.
    std::uint64_t lowest = ~std::uint64_t{0};
    for (std::size_t i = 0; i < n; ++i) {
      lowest = std::min(lowest, std::uint64_t{parts[i].rank} << 32 | i);
    }
    const auto rank = static_cast<std::uint32_t>(lowest >> 32);
    if (rank == kNoMerge) break;
    const auto best = static_cast<std::uint32_t>(lowest);
    --n;
    std::copy(parts + best + 2, parts + n + 1, parts + best + 1);
    const std::int32_t token = merges_[rank].result;
    parts[best] = {token, best + 1 < n ? rank_of(token, parts[best + 1].token) : kNoMerge};
    if (best > 0) parts[best - 1].rank = rank_of(parts[best - 1].token, token);
  }
  return n;
}

void Bpe::merge_short(std::string_view piece, std::vector<std::int32_t>& ids) const {
  std::array<Part, kMaxShortPiece> parts;
  const std::size_t n = merge_parts(piece, parts.data());
  for (std::size_t i = 0; i < n; ++i) ids.push_back(parts[i].token);
}

void Bpe::merge_long(std::string_view piece, std::vector<std::int32_t>& ids) const {
  constexpr auto kEnd = std::numeric_limits<std::uint32_t>::max();
  if (piece.size() >= kEnd) fail("a word of {} bytes is too long to encode", piece.size());
  struct Node {
    std::int32_t token;
    std::uint32_t previous;
    std::uint32_t next;
  };
  const auto n = static_cast<std::uint32_t>(piece.size());
  std::vector<Node> nodes(n);
  for (std::uint32_t i = 0; i < n; ++i) {
    nodes[i] = {byte_tokens_[static_cast<unsigned char>(piece[i])], i - 1, i + 1};
  }
  nodes[0].previous = kEnd;
  nodes[n - 1].next = kEnd;

  // Candidates as rank << 32 | position, lowest first. One whose tokens have changed since is known
  // by its rank, which is that of one pair only.
  std::vector<std::uint64_t> storage;
  storage.reserve(n);
  for (std::uint32_t i = 0; i + 1 < n; ++i) {
    const std::uint32_t rank = rank_of_bytes(piece, i);
    if (rank != kNoMerge) storage.push_back(std::uint64_t{rank} << 32 | i);
  }
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> candidates(
      std::greater<>(), std::move(storage));
  const auto consider = [&](std::uint32_t i) {
    if (i == kEnd || nodes[i].next == kEnd) return;
    const std::uint32_t rank = rank_of(nodes[i].token, nodes[nodes[i].next].token);
    if (rank != kNoMerge) candidates.push(std::uint64_t{rank} << 32 | i);
  };
  while (!candidates.empty()) {
    const std::uint64_t candidate = candidates.top();
    candidates.pop();
    const auto at = static_cast<std::uint32_t>(candidate);
    const auto rank = static_cast<std::uint32_t>(candidate >> 32);
    Node& node = nodes[at];
    if (node.token == kNoToken || node.next == kEnd) continue;
    Node& right = nodes[node.next];
    if (rank_of(node.token, right.token) != rank) continue;
    node.token = merges_[rank].result;
    node.next = right.next;
    right.token = kNoToken;
    right.next = kEnd;
    if (node.next != kEnd) nodes[node.next].previous = at;
    consider(node.previous);
    consider(at);
  }
  for (std::uint32_t i = 0; i != kEnd; i = nodes[i].next) ids.push_back(nodes[i].token);
}

}  // namespace deltafox
