// StreamDecoder: the pieces add up to the whole, and none ends in the middle of anything.
#include <gtest/gtest.h>

#include <algorithm>

#include "deltafox/error.h"
#include "io/tokenizer_testing.h"

namespace deltafox {
namespace {

using Ids = std::vector<std::int32_t>;

std::vector<std::string> stream(const Tokenizer& tokenizer, const Ids& ids, bool skip = false) {
  StreamDecoder decoder(tokenizer, skip);
  std::vector<std::string> pieces;
  for (const std::int32_t id : ids) pieces.push_back(decoder.push(id));
  pieces.push_back(decoder.finish());
  return pieces;
}

std::string joined(const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

TEST(StreamDecoder, PiecesOfValidTextAddUpToIt) {
  std::mt19937 random(1);
  for (const Tokenizer& tokenizer : {gpt2_tokenizer(), json_gpt2_tokenizer()}) {
    for (int i = 0; i < 2000; ++i) {
      const std::string text = random_text(random, 60);
      const std::vector<std::string> pieces = stream(tokenizer, tokenizer.encode(text));
      ASSERT_EQ(joined(pieces), text);
      // A prefix of valid text that ends between characters is valid itself.
      for (const std::string& piece : pieces) ASSERT_TRUE(is_utf8(piece)) << text;
      ASSERT_EQ(pieces.back(), "") << "nothing of a complete text may wait for finish";
    }
  }
}

TEST(StreamDecoder, NeverSplitsACharacter) {
  // é, 中 and an emoji in bytes that the vocabulary has as single tokens.
  const Ids ids = {127, 102, 160, 116, 255};
  const std::vector<std::string> pieces = stream(gpt2_tokenizer(), ids);
  EXPECT_EQ(joined(pieces), gpt2_tokenizer().decode(ids));
  for (const std::string& piece : pieces) EXPECT_TRUE(is_utf8(piece));
}

TEST(StreamDecoder, NeverSplitsAnEscapeOrASurrogatePair) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  const std::vector<std::string> pieces = stream(tokenizer, tokenizer.encode("\n\U0001F600é"));
  std::vector<std::string> filled;
  for (const std::string& piece : pieces) {
    if (!piece.empty()) filled.push_back(piece);
  }
  EXPECT_EQ(filled, (std::vector<std::string>{"\n", "\U0001F600", "é"}));
}

TEST(StreamDecoder, TextIsOutAsSoonAsItIsCertain) {
  StreamDecoder decoder(json_gpt2_tokenizer());
  EXPECT_EQ(decoder.push(64), "a");
  EXPECT_EQ(decoder.push(59), "");  // a backslash
  EXPECT_EQ(decoder.push(77), "\n");
  EXPECT_EQ(decoder.finish(), "");
}

TEST(StreamDecoder, FinishDecodesWhatIsLeftAsAtTheEndOfAText) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  for (const Ids& ids : {Ids{64, 59}, Ids{64, 59, 84}, Ids{64, 59, 84, 405, 68}, Ids{64, 161}}) {
    EXPECT_EQ(joined(stream(tokenizer, ids)), tokenizer.decode(ids));
  }
}

TEST(StreamDecoder, StartsAfreshAfterFinish) {
  StreamDecoder decoder(json_gpt2_tokenizer());
  decoder.push(1);  // a raw quote: Python's rules from here on
  EXPECT_EQ(decoder.finish(), "");
  EXPECT_EQ(decoder.push(59) + decoder.push(14), "/") << "JSON's rules again";
}

TEST(StreamDecoder, SkipsSpecialTokensInsideAnEscape) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  const Ids ids = {64, 59, 50256, 77};
  EXPECT_EQ(joined(stream(tokenizer, ids, true)), "a\n");
  EXPECT_EQ(joined(stream(tokenizer, ids, true)), tokenizer.decode(ids, true));
  EXPECT_EQ(joined(stream(tokenizer, ids, false)), tokenizer.decode(ids, false));
}

TEST(StreamDecoder, RefusesIdsOutOfRange) {
  StreamDecoder decoder(gpt2_tokenizer());
  EXPECT_THROW(decoder.push(50257), Error);
  EXPECT_THROW(decoder.push(-1), Error);
}

// Ids that no text gives: broken UTF-8, broken escapes.
TEST(StreamDecoder, AnyIdsGiveWholeCharactersAndTheTextOfDecode) {
  const Tokenizer plain = gpt2_tokenizer();
  const Tokenizer escaping = json_gpt2_tokenizer();
  // Single bytes, escapes and parts of them, special tokens.
  const Ids awkward = {59, 84, 87,   52,  45,  90, 92,  463,  5999,
                       66, 67, 2507, 405, 487, 1,  198, 50256};
  std::mt19937 random(5);
  int equal = 0;
  for (int i = 0; i < 20000; ++i) {
    Ids ids(random() % 24);
    for (std::int32_t& id : ids) {
      const auto kind = random() % 4;
      id = kind == 0   ? static_cast<std::int32_t>(random() % 50257)
           : kind == 1 ? static_cast<std::int32_t>(random() % 256)
                       : awkward[random() % awkward.size()];
    }
    const bool skip = random() % 2 == 0;
    ASSERT_EQ(joined(stream(plain, ids, skip)), plain.decode(ids, skip));
    const std::vector<std::string> pieces = stream(escaping, ids, skip);
    for (const std::string& piece : pieces) ASSERT_TRUE(is_utf8(piece));
    // decode agrees wherever the rules that it chooses at the end read the same: no raw character
    // above ASCII and no \/ in the text.
    const std::string raw = plain.decode(ids, skip);
    const bool ascii = std::all_of(raw.begin(), raw.end(), [](char c) { return c >= 0; });
    if (!ascii || raw.find("\\/") != std::string::npos) continue;
    ASSERT_EQ(joined(pieces), escaping.decode(ids, skip)) << raw;
    ++equal;
  }
  EXPECT_GT(equal, 5000);
}

}  // namespace
}  // namespace deltafox
