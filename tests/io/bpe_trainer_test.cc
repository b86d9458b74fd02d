// Learning a vocabulary: against plain recounting, and through the files to an encoder.
#include "io/bpe_trainer.h"

#include <gtest/gtest.h>

#include <map>

#include "core/error.h"
#include "deltafox/tokenizer.h"
#include "support/random.h"

namespace deltafox::test {
namespace {

using Words = std::vector<std::pair<std::vector<std::string>, std::int64_t>>;

// As in the definition: recount all pairs, merge the best one, again and again. Ties are broken by
// ids, which here are places in `tokens`.
std::vector<std::string> recounted(Words words, const std::vector<std::string>& bytes,
                                   std::size_t size) {
  std::vector<std::string> tokens = bytes;
  const auto id_of = [&](const std::string& token) {
    return std::find(tokens.begin(), tokens.end(), token) - tokens.begin();
  };
  while (tokens.size() + 1 < size) {
    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> counts;
    for (const auto& [parts, count] : words) {
      for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
        counts[{id_of(parts[i]), id_of(parts[i + 1])}] += count;
      }
    }
    std::pair<std::int64_t, std::int64_t> best;
    std::int64_t most = 1;
    for (const auto& [pair, count] : counts) {
      if (count > most) std::tie(most, best) = std::tie(count, pair);
    }
    if (most == 1) break;
    const std::string left = tokens[static_cast<std::size_t>(best.first)];
    const std::string right = tokens[static_cast<std::size_t>(best.second)];
    if (id_of(left + right) == std::ssize(tokens)) tokens.push_back(left + right);
    for (auto& [parts, count] : words) {
      std::vector<std::string> merged;
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const bool here = i + 1 < parts.size() && parts[i] == left && parts[i + 1] == right;
        merged.push_back(here ? left + right : parts[i]);
        if (here) ++i;
      }
      parts = merged;
    }
  }
  return tokens;
}

// Words of few letters, so that pairs repeat, overlap and tie.
std::string random_text(Random& random, std::int64_t words) {
  std::string text;
  for (std::int64_t w = 0; w < words; ++w) {
    if (w > 0) text += ' ';
    const std::int64_t length = random.integer(1, 7);
    for (std::int64_t i = 0; i < length; ++i) {
      text += static_cast<char>('a' + random.integer(0, 2));
    }
  }
  return text;
}

TEST(BpeTrainer, EqualsRecountingEveryTime) {
  Random random(1);
  for (int repeat = 0; repeat < 10; ++repeat) {
    io::PieceCounts pieces;
    pieces.add(random_text(random, 60));
    Words words;
    for (const auto& [piece, count] : pieces.counts()) {
      std::vector<std::string> parts;
      for (const char c : piece) parts.emplace_back(1, c);
      words.emplace_back(parts, count);
    }
    const io::BpeVocabulary got = io::train_bpe(pieces, 256 + 60);
    const std::vector<std::string> bytes(got.tokens.begin(), got.tokens.begin() + 256);
    EXPECT_EQ(got.tokens, recounted(words, bytes, 256 + 60));
  }
}

TEST(BpeTrainer, DoesNotDependOnTheOrderOfTexts) {
  Random random(2);
  const std::string a = random_text(random, 200) + "\n";
  const std::string b = random_text(random, 200) + "\n";
  io::PieceCounts forward;
  forward.add(a);
  forward.add(b);
  io::PieceCounts first;
  io::PieceCounts backward;
  first.add(a);
  backward.add(b);
  backward.merge(first);
  EXPECT_EQ(io::train_bpe(forward, 400).merges, io::train_bpe(backward, 400).merges);
}

TEST(BpeTrainer, WritesFilesThatEncodeWithTheLearnedTokens) {
  io::PieceCounts pieces;
  for (int i = 0; i < 3; ++i) pieces.add("the theme of the thesis: thé, 12 times\n\n");
  const io::BpeVocabulary vocabulary = io::train_bpe(pieces, 300);
  const Tokenizer tokenizer = Tokenizer::from_files({.tokenizer_config = {},
                                                     .special_tokens_map = {},
                                                     .vocab = vocabulary.vocab_json(),
                                                     .merges = vocabulary.merges_txt(),
                                                     .tokenizer = {}});
  EXPECT_EQ(tokenizer.vocab_size(), std::ssize(vocabulary.tokens) + 1);
  EXPECT_EQ(tokenizer.eos_token_id(), tokenizer.vocab_size() - 1);
  const std::string text = "the theme\n\n";
  const std::vector<std::int32_t> ids = tokenizer.encode(text);
  EXPECT_EQ(tokenizer.decode(ids), text);
  EXPECT_EQ(ids.size(), 3U);  // "the", " theme" and "\n\n" have become tokens
}

TEST(BpeTrainer, RefusesWhatIsNoTextOrNoSize) {
  io::PieceCounts pieces;
  EXPECT_THROW(pieces.add("a\xff"), Error);
  pieces.add("a");
  EXPECT_THROW(io::train_bpe(pieces, 256), Error);
}

}  // namespace
}  // namespace deltafox::test
