// Every golden record of the official tokenizers, plain and JSON-escaping.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "io/tokenizer_testing.h"

namespace deltafox {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

template <typename Check>
int for_each_record(const std::string& file, Check&& check) {
  std::ifstream in(std::string(DELTAFOX_TEST_DATA) + "/golden/" + file);
  int count = 0;
  for (std::string line; std::getline(in, line); ++count) {
    SCOPED_TRACE(file + ": line " + std::to_string(count + 1));
    check(json::parse(line));
  }
  return count;
}

TEST(TokenizerGolden, EncodesAsGpt2) {
  const Tokenizer tokenizer = gpt2_tokenizer();
  const int count = for_each_record("tokenizer.jsonl", [&](const json& record) {
    EXPECT_EQ(tokenizer.encode(record["text"].get<std::string>()), record["gpt2_ids"].get<Ids>());
  });
  EXPECT_EQ(count, 430);
}

TEST(TokenizerGolden, EncodesAsJsonGpt2) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  const int count = for_each_record("tokenizer.jsonl", [&](const json& record) {
    EXPECT_EQ(tokenizer.encode(record["text"].get<std::string>()),
              record["json_gpt2_ids"].get<Ids>());
  });
  EXPECT_EQ(count, 430);
}

TEST(TokenizerGolden, DecodesTheEncodedTexts) {
  const Tokenizer tokenizer = json_gpt2_tokenizer();
  for_each_record("tokenizer.jsonl", [&](const json& record) {
    EXPECT_EQ(tokenizer.decode(record["json_gpt2_ids"].get<Ids>(), true),
              record["json_gpt2_decoded"].get<std::string>());
  });
}

TEST(TokenizerGolden, DecodesAnyIds) {
  const Tokenizer plain = gpt2_tokenizer();
  const Tokenizer escaping = json_gpt2_tokenizer();
  int unpaired = 0;
  const int count = for_each_record("detokenizer.jsonl", [&](const json& record) {
    const Ids ids = record["ids"].get<Ids>();
    EXPECT_EQ(plain.decode(ids), record["gpt2_raw"].get<std::string>());
    if (record.contains("skip_special_tokens_error")) {
      // The official text has a surrogate that UTF-8 cannot hold; ours stays valid.
      ++unpaired;
      EXPECT_TRUE(is_utf8(escaping.decode(ids)));
      return;
    }
    EXPECT_EQ(escaping.decode(ids, true), record["skip_special_tokens"].get<std::string>());
    EXPECT_EQ(escaping.decode(ids, false), record["keep_special_tokens"].get<std::string>());
  });
  EXPECT_EQ(count, 600);
  EXPECT_EQ(unpaired, 57);
}

}  // namespace
}  // namespace deltafox
