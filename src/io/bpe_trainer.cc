#include "io/bpe_trainer.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <queue>

#include "core/error.h"
#include "io/pretokenizer.h"
#include "io/utf8.h"
#include "io/vocabulary.h"

namespace deltafox::io {
namespace {

constexpr const char* kEndOfText = "<|endoftext|>";
// Pairs that occur less often than this teach nothing.
constexpr std::int64_t kMinCount = 2;

using Pair = std::uint64_t;  // left id in the high half

Pair pair_of(std::int32_t left, std::int32_t right) {
  return (static_cast<Pair>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}
std::int32_t left_of(Pair pair) {
  return static_cast<std::int32_t>(pair >> 32);
}
std::int32_t right_of(Pair pair) {
  return static_cast<std::int32_t>(pair);
}

struct PairHash {
  std::size_t operator()(Pair pair) const {
    return static_cast<std::size_t>((pair ^ (pair >> 29)) * 0x9E3779B97F4A7C15ULL);
  }
};

// A distinct piece, as the tokens that it consists of so far.
struct Word {
  std::vector<std::int32_t> tokens;
  std::int64_t count = 0;
};

// What is known of a pair: how often it occurs, and the words that it was seen in (perhaps no
// longer is).
struct PairEntry {
  std::int64_t count = 0;
  std::vector<std::uint32_t> words;
};

struct Candidate {
  std::int64_t count;
  Pair pair;
  // The queue's top is the largest.
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

class Trainer {
 public:
  explicit Trainer(std::vector<Word> words) : words_(std::move(words)) {
    for (std::uint32_t w = 0; w < words_.size(); ++w) {
      const Word& word = words_[w];
      for (std::size_t i = 0; i + 1 < word.tokens.size(); ++i) {
        change(pair_of(word.tokens[i], word.tokens[i + 1]), word.count, w);
      }
    }
    for (const auto& [pair, entry] : pairs_) queue_.push({entry.count, pair});
  }

  // The most frequent pair; its count is 0 if there is none.
  Candidate best() {
    while (!queue_.empty()) {
      const Candidate top = queue_.top();
      const auto entry = pairs_.find(top.pair);
      if (entry != pairs_.end() && entry->second.count == top.count) return top;
      // It lost occurrences since it was queued; what it gained was queued anew.
      queue_.pop();
      if (entry != pairs_.end() && entry->second.count > 0 && entry->second.count < top.count) {
        queue_.push({entry->second.count, top.pair});
      }
    }
    return {0, 0};
  }

  // Makes `pair` the token `id` wherever it occurs.
  void merge(Pair pair, std::int32_t id) {
    PairEntry entry = std::move(pairs_[pair]);
    std::sort(entry.words.begin(), entry.words.end());
    entry.words.erase(std::unique(entry.words.begin(), entry.words.end()), entry.words.end());
    grown_.clear();
    for (const std::uint32_t w : entry.words) merge_in_word(pair, id, w);
    pairs_.erase(pair);
    std::sort(grown_.begin(), grown_.end());
    grown_.erase(std::unique(grown_.begin(), grown_.end()), grown_.end());
    for (const Pair other : grown_) {
      const auto found = pairs_.find(other);
      if (found != pairs_.end()) queue_.push({found->second.count, other});
    }
  }

 private:
  void change(Pair pair, std::int64_t by, std::uint32_t word) {
    PairEntry& entry = pairs_[pair];
    entry.count += by;
    if (by > 0 && (entry.words.empty() || entry.words.back() != word)) entry.words.push_back(word);
  }

  void merge_in_word(Pair pair, std::int32_t id, std::uint32_t w) {
    Word& word = words_[w];
    std::vector<std::int32_t>& tokens = word.tokens;
    std::size_t to = 0;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const bool here = i + 1 < tokens.size() && pair_of(tokens[i], tokens[i + 1]) == pair;
      if (!here) {
        tokens[to++] = tokens[i];
        continue;
      }
      if (to > 0) {
        change(pair_of(tokens[to - 1], tokens[i]), -word.count, w);
        change(pair_of(tokens[to - 1], id), word.count, w);
        grown_.push_back(pair_of(tokens[to - 1], id));
      }
      if (i + 2 < tokens.size()) {
        change(pair_of(tokens[i + 1], tokens[i + 2]), -word.count, w);
        change(pair_of(id, tokens[i + 2]), word.count, w);
        grown_.push_back(pair_of(id, tokens[i + 2]));
      }
      tokens[to++] = id;
      ++i;
    }
    tokens.resize(to);
  }

  std::vector<Word> words_;
  std::unordered_map<Pair, PairEntry, PairHash> pairs_;
  std::priority_queue<Candidate> queue_;
  std::vector<Pair> grown_;
};

// In the order of GPT-2's ids: by their characters in its alphabet.
std::vector<std::string> bytes_in_order() {
  std::vector<std::string> bytes;
  bytes.reserve(256);
  for (int byte = 0; byte < 256; ++byte) bytes.emplace_back(1, static_cast<char>(byte));
  std::sort(bytes.begin(), bytes.end(), [](const std::string& a, const std::string& b) {
    return alphabet_name(a) < alphabet_name(b);
  });
  return bytes;
}

std::vector<Word> words_of(const PieceCounts& pieces) {
  std::array<std::int32_t, 256> id_of{};
  std::int32_t next = 0;
  for (const std::string& byte : bytes_in_order()) {
    id_of[static_cast<unsigned char>(byte[0])] = next++;
  }
  std::vector<std::pair<std::string_view, std::int64_t>> sorted(pieces.counts().begin(),
                                                                pieces.counts().end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<Word> words;
  words.reserve(sorted.size());
  for (const auto& [piece, count] : sorted) {
    Word word{.tokens = {}, .count = count};
    for (const char c : piece) word.tokens.push_back(id_of[static_cast<unsigned char>(c)]);
    words.push_back(std::move(word));
  }
  return words;
}

}  // namespace

void PieceCounts::add(std::string_view text) {
  const std::size_t bad = utf8::first_invalid(text);
  if (bad != std::string_view::npos) fail("the text is not UTF-8 at byte {}", bad);
  const Pretokenizer& pretokenizer = Pretokenizer::instance();
  std::string key;
  for (std::size_t at = 0; at < text.size();) {
    const std::string_view piece = pretokenizer.piece(text, at);
    key.assign(piece);
    ++counts_[key];
    at += piece.size();
  }
}

void PieceCounts::merge(const PieceCounts& other) {
  for (const auto& [piece, count] : other.counts_) counts_[piece] += count;
}

BpeVocabulary train_bpe(const PieceCounts& pieces, std::int32_t vocab_size,
                        const std::function<void(std::int64_t)>& on_progress) {
  constexpr std::int32_t kBytes = 256;
  constexpr std::int32_t kMax = 1 << 24;
  if (vocab_size <= kBytes || vocab_size > kMax) {
    fail("vocab_size: must be from {} to {}, got {}", kBytes + 1, kMax, vocab_size);
  }
  BpeVocabulary vocabulary{.tokens = bytes_in_order(), .merges = {}};
  std::unordered_map<std::string, std::int32_t> ids;
  for (const std::string& token : vocabulary.tokens) {
    ids.emplace(token, static_cast<std::int32_t>(ids.size()));
  }
  Trainer trainer(words_of(pieces));
  while (std::ssize(vocabulary.tokens) + 1 < vocab_size) {
    const Candidate best = trainer.best();
    if (best.count < kMinCount) break;
    const std::pair merge{left_of(best.pair), right_of(best.pair)};
    const std::string token = vocabulary.tokens[static_cast<std::size_t>(merge.first)] +
                              vocabulary.tokens[static_cast<std::size_t>(merge.second)];
    // Other halves may have made the same token before.
    const auto [entry, is_new] =
        ids.emplace(token, static_cast<std::int32_t>(vocabulary.tokens.size()));
    if (is_new) vocabulary.tokens.push_back(token);
    trainer.merge(best.pair, entry->second);
    vocabulary.merges.push_back(merge);
    if (on_progress) on_progress(std::ssize(vocabulary.tokens));
  }
  return vocabulary;
}

std::string BpeVocabulary::vocab_json() const {
  std::string text = "{";
  const auto add = [&](const std::string& name, std::size_t id) {
    text += fmt::format("{}{}: {}", id == 0 ? "" : ", ", nlohmann::json(name).dump(), id);
  };
  for (std::size_t id = 0; id < tokens.size(); ++id) add(alphabet_name(tokens[id]), id);
  add(kEndOfText, tokens.size());
  return text + "}\n";
}

std::string BpeVocabulary::merges_txt() const {
  std::string text = "#version: 0.2\n";
  for (const auto& [left, right] : merges) {
    text += alphabet_name(tokens[static_cast<std::size_t>(left)]) + " " +
            alphabet_name(tokens[static_cast<std::size_t>(right)]) + "\n";
  }
  return text;
}

}  // namespace deltafox::io
