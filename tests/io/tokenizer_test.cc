// Tokenizer::encode and decode beyond the golden records.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <thread>

#include "io/bpe.h"
#include "io/json_escape.h"
#include "io/pretokenizer.h"
#include "io/tokenizer_testing.h"
#include "support/errors.h"

namespace deltafox {
namespace {

using test::error_of;
using Ids = std::vector<std::int32_t>;

std::vector<std::string> pieces(std::string_view text) {
  std::vector<std::string> result;
  for (std::size_t at = 0; at < text.size(); at += result.back().size()) {
    result.emplace_back(Pretokenizer::instance().piece(text, at));
  }
  return result;
}

using Pieces = std::vector<std::string>;

TEST(Pretokenizer, CutsContractionsOnlyInLowerCase) {
  EXPECT_EQ(pieces("we'll we'LL 'tis '"),
            (Pieces{"we", "'ll", " we", "'", "LL", " '", "tis", " '"}));
  EXPECT_EQ(pieces("'s't're've'm'll'd'x'r"),
            (Pieces{"'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "x", "'", "r"}));
}

TEST(Pretokenizer, ASpaceGoesWithWhatFollows) {
  EXPECT_EQ(pieces(" a 1 ! é ٣ 中"), (Pieces{" a", " 1", " !", " é", " ٣", " 中"}));
}

TEST(Pretokenizer, ARunOfSpacesLeavesOneBehind) {
  EXPECT_EQ(pieces("a   b"), (Pieces{"a", "  ", " b"}));
  EXPECT_EQ(pieces("a\n\nb"), (Pieces{"a", "\n", "\n", "b"}));
  EXPECT_EQ(pieces("a\tb"), (Pieces{"a", "\t", "b"}));
  EXPECT_EQ(pieces("a \t "), (Pieces{"a", " \t "}));
}

TEST(Pretokenizer, WhiteSpaceIsTheUnicodeProperty) {
  for (const std::uint32_t c : {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, 0x1680, 0x2000,
                                0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}) {
    EXPECT_EQ(Pretokenizer::instance().class_of(c), CharClass::kSpace) << std::hex << c;
  }
  for (const std::uint32_t c :
       {0x00, 0x08, 0x0E, 0x1C, 0x1D, 0x1E, 0x1F, 0x84, 0x180E, 0x200B, 0x2060, 0xFEFF}) {
    EXPECT_EQ(Pretokenizer::instance().class_of(c), CharClass::kOther) << std::hex << c;
  }
}

TEST(Pretokenizer, KnowsCategoriesAboveTheBasicPlane) {
  EXPECT_EQ(Pretokenizer::instance().class_of(0x1D400), CharClass::kLetter);  // bold A
  EXPECT_EQ(Pretokenizer::instance().class_of(0x1D7CE), CharClass::kNumber);  // bold 0
  EXPECT_EQ(Pretokenizer::instance().class_of(0x1F600), CharClass::kOther);   // emoji
  EXPECT_EQ(Pretokenizer::instance().class_of(0x10FFFF), CharClass::kOther);
  EXPECT_EQ(pieces("\U0001D400b\U0001D7CE1\U0001F600!"),
            (Pieces{"\U0001D400b", "\U0001D7CE1", "\U0001F600!"}));
}

// GPT-2's algorithm, word by word, for comparison: the lowest pair, the leftmost among equals.
Ids merge_slowly(Ids tokens, const std::vector<Bpe::Merge>& merges) {
  std::map<std::pair<std::int32_t, std::int32_t>, std::size_t> ranks;
  for (std::size_t i = 0; i < merges.size(); ++i) ranks[{merges[i].left, merges[i].right}] = i;
  for (;;) {
    std::size_t best_rank = merges.size();
    std::size_t best = 0;
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto found = ranks.find({tokens[i], tokens[i + 1]});
      if (found != ranks.end() && found->second < best_rank) {
        best_rank = found->second;
        best = i;
      }
    }
    if (best_rank == merges.size()) return tokens;
    tokens[best] = merges[best_rank].result;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(Bpe, MergesWordsOfAnyLengthAsTheSlowDefinition) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    std::array<std::int32_t, 256> byte_tokens{};
    for (std::size_t b = 0; b < 256; ++b) byte_tokens[b] = static_cast<std::int32_t>(b);
    // Merges between any tokens so far, in an order that no training would give, some repeated.
    std::vector<Bpe::Merge> merges;
    std::vector<std::int32_t> known = {'a', 'b', 'c'};
    std::vector<std::string> bytes(256);
    for (const char c : {'a', 'b', 'c'}) bytes[static_cast<std::size_t>(c)] = c;
    for (int i = 0; i < 20; ++i) {
      const std::int32_t left = known[random() % known.size()];
      const std::int32_t right = known[random() % known.size()];
      const auto result = static_cast<std::int32_t>(256 + i);
      merges.push_back({left, right, result});
      known.push_back(result);
      bytes.push_back(bytes[static_cast<std::size_t>(left)] +
                      bytes[static_cast<std::size_t>(right)]);
    }
    std::shuffle(merges.begin(), merges.end(), random);
    Bpe bpe(byte_tokens, merges);
    for (const std::int32_t token : known)
      bpe.add_word(bytes[static_cast<std::size_t>(token)], token);
    for (const std::size_t length : {1, 2, 5, 15, 16, 17, 95, 96, 97, 300}) {
      std::string word(length, 'a');
      for (char& c : word) c = static_cast<char>('a' + random() % 3);
      Ids ids;
      bpe.encode(word + " " + word, ids);
      Ids expected = merge_slowly(Ids(word.begin(), word.end()), merges);
      const Ids once = expected;
      expected.push_back(' ');
      expected.insert(expected.end(), once.begin(), once.end());
      ASSERT_EQ(ids, expected) << word;
    }
  }
}

TEST(Tokenizer, RoundTripsAnyText) {
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = random_text(random, 80);
    for (const Tokenizer& tokenizer : {gpt2_tokenizer(), json_gpt2_tokenizer()}) {
      ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
    }
  }
}

TEST(Tokenizer, EncodingAPrefixUpToASpecialTokenDoesNotDependOnTheRest) {
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    const std::string a = random_text(random, 40);
    const std::string b = random_text(random, 40);
    Ids expected = gpt2_tokenizer().encode(a);
    expected.push_back(50256);
    const Ids rest = gpt2_tokenizer().encode(b);
    expected.insert(expected.end(), rest.begin(), rest.end());
    EXPECT_EQ(gpt2_tokenizer().encode(a + "<|endoftext|>" + b), expected);
  }
}

TEST(Tokenizer, BosIsPrependedOnlyIfAskedFor) {
  Tokenizer tokenizer = json_gpt2_tokenizer();
  EXPECT_FALSE(tokenizer.add_bos_token());
  EXPECT_EQ(tokenizer.encode("a"), (Ids{64}));
  tokenizer.set_add_bos_token(true);
  EXPECT_TRUE(tokenizer.add_bos_token());
  EXPECT_EQ(tokenizer.encode("a"), (Ids{50256, 64}));
  EXPECT_EQ(tokenizer.encode(""), (Ids{50256}));
  EXPECT_EQ(tokenizer.encode("a", false), (Ids{64}));
  EXPECT_FALSE(json_gpt2_tokenizer().add_bos_token()) << "copies must not share the setting";
}

TEST(Tokenizer, KnowsItsSpecialTokens) {
  const Tokenizer tokenizer = gpt2_tokenizer();
  EXPECT_EQ(tokenizer.vocab_size(), 50257);
  EXPECT_EQ(tokenizer.bos_token_id(), 50256);
  EXPECT_EQ(tokenizer.eos_token_id(), 50256);
  EXPECT_TRUE(tokenizer.is_special(50256));
  EXPECT_FALSE(tokenizer.is_special(50255));
  EXPECT_FALSE(tokenizer.is_special(-1));
  EXPECT_FALSE(tokenizer.is_special(50257));
  EXPECT_FALSE(tokenizer.escapes_json());
  EXPECT_TRUE(json_gpt2_tokenizer().escapes_json());
  EXPECT_EQ(tokenizer.decode(Ids{64, 50256, 65}, false), "a<|endoftext|>b");
  EXPECT_EQ(tokenizer.decode(Ids{64, 50256, 65}, true), "ab");
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  EXPECT_EQ(error_of([&] { tokenizer.encode("abc\xFF"); }), "the text is not UTF-8 at byte 3");
  EXPECT_EQ(error_of([&] { tokenizer.encode("0123456789\xE2\x82"); }),
            "the text is not UTF-8 at byte 10");
  EXPECT_EQ(error_of([&] { tokenizer.encode("é\xED\xA0\x80"); }),
            "the text is not UTF-8 at byte 2");
  EXPECT_EQ(error_of([&] { tokenizer.encode("\xC0\x80"); }), "the text is not UTF-8 at byte 0");
  EXPECT_EQ(error_of([&] { tokenizer.encode("\xF4\x90\x80\x80"); }),
            "the text is not UTF-8 at byte 0");
}

TEST(Tokenizer, RefusesIdsOutOfRange) {
  const Tokenizer tokenizer = gpt2_tokenizer();
  EXPECT_EQ(error_of([&] {
              tokenizer.decode(Ids{1, 50257});
            }),
            "token id 50257 is out of range, the vocabulary has 50257 ids");
  EXPECT_EQ(error_of([&] { tokenizer.decode(Ids{-1}); }),
            "token id -1 is out of range, the vocabulary has 50257 ids");
}

TEST(Tokenizer, AMegabyteWithoutASpaceIsNotQuadratic) {
  for (const char* unit : {"a", "中", "!?", "é"}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto begin = std::chrono::steady_clock::now();
    const Ids ids = gpt2_tokenizer().encode(text);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_EQ(gpt2_tokenizer().decode(ids), text);
    // Quadratic merging takes minutes; this takes a fraction of a second.
    EXPECT_LT(seconds.count(), 20) << unit;
  }
}

TEST(Tokenizer, ThreadsShareOne) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  std::mt19937 random(3);
  for (int i = 0; i < 50; ++i) {
    texts.push_back(random_text(random, 200));
    expected.push_back(tokenizer.encode(texts.back()));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < texts.size(); ++i) {
        const std::size_t at = (i + static_cast<std::size_t>(t) * 7) % texts.size();
        const Ids ids = tokenizer.encode(texts[at]);
        if (ids != expected[at] || tokenizer.decode(ids) != texts[at]) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(JsonEscape, WritesWhatJsonDumpsWrites) {
  EXPECT_EQ(escape_json("a\"\\/\b\f\n\r\t\x01\x1f\x7f~"), R"(a\"\\/\b\f\n\r\t\u0001\u001f\u007f~)");
  EXPECT_EQ(escape_json("é中\U0001F600"), R"(\u00e9\u4e2d\ud83d\ude00)");
}

TEST(JsonEscape, ReadsJsonWhereJsonAccepts) {
  EXPECT_EQ(unescape_all(R"(\"\\\/\b\f\n\r\t\u00E9é)"), "\"\\/\b\f\n\r\téé");
  EXPECT_EQ(unescape_all(R"(\ud83d\ude00)"), "\U0001F600");
  EXPECT_EQ(unescape_all(R"(\ud83dx\ude00)"), "\uFFFDx\uFFFD");
  EXPECT_EQ(unescape_all(R"(\ude00\ud83d)"), "\uFFFD\uFFFD");
  EXPECT_EQ(unescape_all(R"(\ud83d\ud83d\ude00)"), "\uFFFD\U0001F600");
}

// Python: bytes.decode("unicode_escape", "ignore"); \q is no JSON escape, so it forces the
// fallback.
TEST(JsonEscape, ReadsPythonEscapesWhereJsonRefuses) {
  EXPECT_EQ(unescape_all(R"(é\q)"), "Ã©\\q");
  EXPECT_EQ(unescape_all("\""), "\"");
  EXPECT_EQ(unescape_all("a\nb\\t"), "a\nb\t");
  EXPECT_EQ(unescape_all(R"(\/\a\v\'\q)"), "\\/\a\v'\\q");
  EXPECT_EQ(unescape_all("\\q\\\nx"), "\\qx");
  EXPECT_EQ(unescape_all(R"(\101\7\18\777\x41\x4)"),
            "A\a\x01"
            "8\u01FFA");
  EXPECT_EQ(unescape_all(R"(\x4g\u12z\U0001F600\U00110000!)"), "gz\U0001F600!");
  EXPECT_EQ(unescape_all(R"(a\)"), "a");
  EXPECT_EQ(unescape_all(R"(\u00e9\u00e)"), "é");
  EXPECT_EQ(unescape_all(R"(\ud83d\ude00\)"), "\U0001F600");
  EXPECT_EQ(unescape_all(R"(\N{no such name}a\N{}b\Nc\N{d)"), "a}bc");
}

}  // namespace
}  // namespace deltafox
