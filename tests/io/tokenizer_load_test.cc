// Loading: every format, custom vocabularies, and one clear line for every mistake.
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "deltafox/error.h"
#include "io/tokenizer_testing.h"

namespace deltafox {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

std::string load_error(const TokenizerFiles& files) {
  try {
    Tokenizer::from_files(files, "dir");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TokenizerFiles small_files() {
  TokenizerFiles files;
  files.vocab = R"({"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4, "<|endoftext|>": 5})";
  files.merges = "#version: 0.2\na b\n\u0120 ab\n";
  return files;
}

// The same tokenizer in the format of the tokenizers library.
json small_tokenizer_json() {
  return json::parse(R"({
    "version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [{"id": 5, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": true, "special": true}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
    "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
              "end_of_word_suffix": "", "fuse_unk": false,
              "vocab": {"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4, "<|endoftext|>": 5},
              "merges": ["a b", "\u0120 ab"]}})");
}

TokenizerFiles with_tokenizer_json(const json& content) {
  TokenizerFiles files;
  files.tokenizer = content.dump();
  return files;
}

TEST(TokenizerLoad, ASmallVocabularyWorks) {
  const Tokenizer tokenizer = Tokenizer::from_files(small_files());
  EXPECT_EQ(tokenizer.vocab_size(), 6);
  EXPECT_EQ(tokenizer.encode("ab abba<|endoftext|>"), (Ids{3, 4, 1, 0, 5}));
  EXPECT_EQ(tokenizer.decode(Ids{3, 4, 1, 0, 5}), "ab abba<|endoftext|>");
  EXPECT_EQ(tokenizer.eos_token_id(), 5);
}

TEST(TokenizerLoad, AVocabularyNeedsNoSpecialTokens) {
  TokenizerFiles files = small_files();
  files.vocab = R"({"a": 0, "b": 1, "\u0120": 2, "ab": 3, "\u0120ab": 4})";
  Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_EQ(tokenizer.bos_token_id(), std::nullopt);
  EXPECT_EQ(tokenizer.eos_token_id(), std::nullopt);
  EXPECT_THROW(tokenizer.set_add_bos_token(true), Error);
  files.merges = "";
  EXPECT_EQ(Tokenizer::from_files(files).encode("ab"), (Ids{0, 1}));
}

TEST(TokenizerLoad, AMissingByteIsNamedOrBecomesUnk) {
  TokenizerFiles files = small_files();
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  try {
    tokenizer.encode("abc");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "the vocabulary has no token for byte 0x63, and there is no unk_token");
  }
  files.tokenizer_config = R"({"unk_token": "<|endoftext|>"})";
  EXPECT_EQ(Tokenizer::from_files(files).encode("abcab"), (Ids{3, 5, 3}));
}

TEST(TokenizerLoad, TokenizerJsonGivesTheSameTokenizer) {
  json content = small_tokenizer_json();
  const Ids expected = Tokenizer::from_files(small_files()).encode("ab ab ba<|endoftext|>a");
  EXPECT_EQ(Tokenizer::from_files(with_tokenizer_json(content)).encode("ab ab ba<|endoftext|>a"),
            expected);
  content["model"]["merges"] = json::parse(R"([["a", "b"], ["\u0120", "ab"]])");
  EXPECT_EQ(Tokenizer::from_files(with_tokenizer_json(content)).encode("ab ab ba<|endoftext|>a"),
            expected);
}

TEST(TokenizerLoad, Gpt2AsTokenizerJsonEncodesTheSame) {
  const TokenizerFiles files = gpt2_files();
  json content = small_tokenizer_json();
  content["added_tokens"][0]["id"] = 50256;
  content["model"]["vocab"] = json::parse(*files.vocab);
  json merges = json::array();
  std::istringstream lines(*files.merges);
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line)) merges.push_back(line);
  content["model"]["merges"] = merges;
  const Tokenizer tokenizer = Tokenizer::from_files(with_tokenizer_json(content));
  EXPECT_EQ(tokenizer.vocab_size(), 50257);
  std::mt19937 random(4);
  for (int i = 0; i < 300; ++i) {
    const std::string text = random_text(random, 100);
    ASSERT_EQ(tokenizer.encode(text), gpt2_tokenizer().encode(text));
  }
}

TEST(TokenizerLoad, ReadsADirectory) {
  const std::filesystem::path directory =
      std::filesystem::path(testing::TempDir()) / "deltafox_tokenizer_load_test";
  std::filesystem::create_directories(directory);
  const auto write = [&](const char* name, const std::string& text) {
    std::ofstream(directory / name, std::ios::binary) << text;
  };
  const auto error = [&] {
    try {
      Tokenizer::load(directory.string());
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(error(), directory.string() +
                         ": there is neither vocab.json with merges.txt nor tokenizer.json");
  write("vocab.json", *small_files().vocab);
  EXPECT_NE(error(), "no error");
  write("tokenizer.json", small_tokenizer_json().dump());
  EXPECT_EQ(Tokenizer::load(directory.string()).encode("ab"), (Ids{3}));
  write("merges.txt", "a  b\n");
  EXPECT_EQ(error(), (directory / "merges.txt").string() +
                         ": line 1: expected two tokens with a space between them");
  write("merges.txt", *small_files().merges);
  write("tokenizer_config.json", R"({"tokenizer_class": "JSONGPT2Tokenizer"})");
  EXPECT_TRUE(Tokenizer::load(directory.string()).escapes_json());
  std::filesystem::remove(directory / "vocab.json");
  std::filesystem::create_directory(directory / "vocab.json");
  EXPECT_EQ(error(), (directory / "vocab.json").string() + ": not a regular file");
  std::filesystem::remove_all(directory);
  EXPECT_EQ(error(), directory.string() + ": no such directory");
}

TEST(TokenizerLoad, ConfigNamesTheVariantAndTheRoles) {
  TokenizerFiles files = small_files();
  files.tokenizer_config = R"({"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": true,
      "bos_token": {"content": "ab", "lstrip": false}, "eos_token": null, "pad_token": "b"})";
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_FALSE(tokenizer.escapes_json());
  EXPECT_EQ(tokenizer.bos_token_id(), 3);
  EXPECT_EQ(tokenizer.eos_token_id(), std::nullopt);
  EXPECT_TRUE(tokenizer.is_special(1));
  EXPECT_FALSE(tokenizer.is_special(0));
  EXPECT_EQ(tokenizer.encode("a"), (Ids{3, 0}));
  EXPECT_EQ(tokenizer.encode("a", false), (Ids{0}));
}

TEST(TokenizerLoad, SpecialTokensMapFillsWhatTheConfigLeavesOpen) {
  TokenizerFiles files = small_files();
  files.tokenizer_config = R"({"bos_token": "ab"})";
  files.special_tokens_map = R"({"bos_token": "a", "eos_token": {"content": "b"}})";
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_EQ(tokenizer.bos_token_id(), 3);
  EXPECT_EQ(tokenizer.eos_token_id(), 1);
}

TEST(TokenizerLoad, AddedTokensAreSplitOffAndTheLongestWins) {
  TokenizerFiles files = small_files();
  files.tokenizer_config = R"({"added_tokens_decoder": {
      "6": {"content": "<x>", "special": true}, "7": {"content": "<x>中", "special": false}}})";
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_EQ(tokenizer.vocab_size(), 8);
  EXPECT_EQ(tokenizer.encode("a<x>b<x>中<x>"), (Ids{0, 6, 1, 7, 6}));
  EXPECT_EQ(tokenizer.decode(Ids{0, 6, 1, 7, 6}, true), "ab<x>中");
}

TEST(TokenizerLoad, AddPrefixSpaceActsAsInTheOfficialClasses) {
  TokenizerFiles files = small_files();
  files.tokenizer_config = R"({"add_prefix_space": true})";
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_EQ(tokenizer.encode("ab"), (Ids{4}));
  EXPECT_EQ(tokenizer.encode(" ab"), (Ids{4}));
  EXPECT_EQ(tokenizer.encode("ab<|endoftext|>ab"), (Ids{4, 5, 4}));
  EXPECT_EQ(tokenizer.encode(""), (Ids{}));
  files.tokenizer_config = R"({"add_prefix_space": true, "tokenizer_class": "JSONGPT2Tokenizer"})";
  EXPECT_EQ(Tokenizer::from_files(files).encode("ab<|endoftext|>ab"), (Ids{4, 5, 3}));
  EXPECT_EQ(Tokenizer::from_files(files).encode(" ab"), (Ids{2, 4}));
}

TEST(TokenizerLoad, ATemplateMayPrependBos) {
  json content = small_tokenizer_json();
  content["post_processor"] = json::parse(R"({"type": "Sequence", "processors": [
      {"type": "ByteLevel"},
      {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>"}},
                                                {"Sequence": {"id": "A"}}]}]})");
  TokenizerFiles files = with_tokenizer_json(content);
  EXPECT_EQ(Tokenizer::from_files(files).encode("a"), (Ids{5, 0}));
  files.tokenizer_config = R"({"add_bos_token": false})";
  EXPECT_EQ(Tokenizer::from_files(files).encode("a"), (Ids{0}));
}

TEST(TokenizerLoad, IdsMayHaveGapsButNotAbyssesAndGapsDoNotDecode) {
  TokenizerFiles files = small_files();
  files.merges = "";
  files.vocab = R"({"a": 0, "b": 9})";
  const Tokenizer tokenizer = Tokenizer::from_files(files);
  EXPECT_EQ(tokenizer.vocab_size(), 10);
  EXPECT_THROW(tokenizer.decode(Ids{5}), Error);
  files.vocab = R"({"a": 0, "b": 2000000000})";
  EXPECT_EQ(load_error(files),
            "dir/vocab.json: the highest id is 2000000000, but there are only 2 tokens");
}

struct BadFile {
  const char* text;
  const char* message;
};

TEST(TokenizerLoad, BadVocabIsNamed) {
  for (const BadFile& bad : std::initializer_list<BadFile>{
           {"", "dir/vocab.json: line 1, byte 1: expected '{'"},
           {"{}", "dir/vocab.json: the vocabulary is empty"},
           {"[1]", "dir/vocab.json: line 1, byte 1: expected '{'"},
           {"{\"a\": 0,\n \"b\": \"1\"}", "dir/vocab.json: line 2, byte 7: expected an integer"},
           {R"({"a": 1.5})", "dir/vocab.json: line 1, byte 7: expected an integer"},
           {R"({"a": 1 "b": 2})", "dir/vocab.json: line 1, byte 9: expected ','"},
           {R"({"a": 1,})", "dir/vocab.json: line 1, byte 9: expected a string"},
           {R"({"a: 1})", "dir/vocab.json: line 1, byte 8: the string does not end"},
           {R"({"a": 1)", "dir/vocab.json: line 1, byte 8: expected ','"},
           {R"({"a": 1} x)", "dir/vocab.json: line 1, byte 10: something follows the end"},
           {R"({"\ud800": 1})", "dir/vocab.json: line 1, byte 9: half a surrogate pair"},
           {R"({"\u12": 1})", "dir/vocab.json: line 1, byte 5: a malformed \\u escape"},
           {R"({"\q": 1})", "dir/vocab.json: line 1, byte 4: an unknown escape in a string"},
           {"{\"a\nb\": 1}", "dir/vocab.json: line 1, byte 4: a control character in a string"},
           {"{\"a\xFF\": 1}", "dir/vocab.json: line 1, byte 4: not UTF-8"},
           {R"({"a": 0, "a": 1})", "dir/vocab.json: token \"a\" appears twice"},
           {R"({"a": 0, "\n": 0})", "dir/vocab.json: tokens \"a\" and \"\\n\" have the same id 0"},
           {R"({"a": -1})", "dir/vocab.json: token \"a\" has the impossible id -1"},
           {R"({"a": 4294967296})", "dir/vocab.json: token \"a\" has the impossible id 4294967296"},
           {R"({"a": 99999999999999999999})",
            "dir/vocab.json: line 1, byte 7: expected an integer"},
       }) {
    TokenizerFiles files = small_files();
    files.vocab = bad.text;
    files.merges = "";
    EXPECT_EQ(load_error(files), bad.message) << bad.text;
  }
}

TEST(TokenizerLoad, BadMergesAreNamed) {
  for (const BadFile& bad : std::initializer_list<BadFile>{
           {"a", "dir/merges.txt: line 1: expected two tokens with a space between them"},
           {"#version: 0.2\na b\n a\n",
            "dir/merges.txt: line 3: expected two tokens with a space between them"},
           {"a b c", "dir/merges.txt: line 1: expected two tokens with a space between them"},
           {"a ", "dir/merges.txt: line 1: expected two tokens with a space between them"},
           {"a b\r\n\nb a", "dir/merges.txt: line 3: \"ba\" is not in the vocabulary"},
           {"x a", "dir/merges.txt: line 1: \"x\" is not in the vocabulary"},
           {"a \xFF", "dir/merges.txt: line 1: not UTF-8"},
       }) {
    TokenizerFiles files = small_files();
    files.merges = bad.text;
    EXPECT_EQ(load_error(files), bad.message) << bad.text;
  }
}

TEST(TokenizerLoad, BadConfigIsNamed) {
  for (const BadFile& bad : std::initializer_list<BadFile>{
           {"[]", "dir/tokenizer_config.json: not a JSON object"},
           {R"({"tokenizer_class": "LlamaTokenizer"})",
            "dir/tokenizer_config.json: tokenizer_class is \"LlamaTokenizer\", supported are "
            "GPT2Tokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast and JSONGPT2Tokenizer"},
           {R"({"add_bos_token": 1})",
            "dir/tokenizer_config.json: add_bos_token must be true or false"},
           {R"({"add_bos_token": true, "bos_token": null})",
            "dir/tokenizer_config.json: add_bos_token is true, but there is no bos_token"},
           {R"({"bos_token": "<s>"})",
            "dir/tokenizer_config.json: bos_token \"<s>\" is not in the vocabulary"},
           {R"({"eos_token": 5})",
            "dir/tokenizer_config.json: eos_token must be a string, null or an object with "
            "\"content\""},
           {R"({"additional_special_tokens": "a"})",
            "dir/tokenizer_config.json: additional_special_tokens must be a list of tokens"},
           {R"({"added_tokens_decoder": []})",
            "dir/tokenizer_config.json: added_tokens_decoder must be an object"},
           {R"({"added_tokens_decoder": {"x": {"content": "a"}}})",
            "dir/tokenizer_config.json: added_tokens_decoder: \"x\" is not a token id"},
           {R"({"added_tokens_decoder": {"7": {}}})",
            "dir/tokenizer_config.json: added token 7 has no \"content\""},
           {R"({"added_tokens_decoder": {"7": {"content": "a"}}})",
            "dir/tokenizer_config.json: added token \"a\" has id 7, but 0 in dir/vocab.json"},
           {R"({"added_tokens_decoder": {"7": {"content": ""}}})",
            "dir/tokenizer_config.json: added token 7 is empty"},
           {R"({"added_tokens_decoder": {"7": {"content": "<x>", "lstrip": true}}})",
            "dir/tokenizer_config.json: added token \"<x>\": lstrip is not supported"},
       }) {
    TokenizerFiles files = small_files();
    files.tokenizer_config = bad.text;
    EXPECT_EQ(load_error(files), bad.message) << bad.text;
  }
  TokenizerFiles files = small_files();
  files.tokenizer_config = "{\"a\": }";
  EXPECT_EQ(load_error(files).rfind("dir/tokenizer_config.json: ", 0), 0U);
  EXPECT_NE(load_error(files).find("line 1, column 7"), std::string::npos);
  files.tokenizer_config = "{\"a\": \"" + std::string(100'000, 'x') + "\xFF";
  EXPECT_LT(load_error(files).size(), 300U);
  files.tokenizer_config = "{\xC3\xA9}";
  EXPECT_TRUE(is_utf8(load_error(files)));
  files.tokenizer_config = std::nullopt;
  files.special_tokens_map = "1";
  EXPECT_EQ(load_error(files), "dir/special_tokens_map.json: not a JSON object");
}

TEST(TokenizerLoad, OtherKindsOfTokenizerJsonAreRefusedByName) {
  struct Change {
    const char* path;
    const char* value;  // JSON
    const char* message;
  };
  const std::string only = "; only byte-level BPE as in GPT-2 is supported";
  for (const Change& change : std::initializer_list<Change>{
           {"/model/type", "\"Unigram\"", "model.type is Unigram"},
           {"/model/vocab", "[[\"a\", 0.5]]", "model.vocab must be an object (type BPE)"},
           {"/model/byte_fallback", "true", "model.byte_fallback is not supported"},
           {"/model/dropout", "0.1", "model.dropout is not supported"},
           {"/model/ignore_merges", "true", "model.ignore_merges is not supported"},
           {"/model/merges", "[\"a b\", \"a\"]", "merge 2: expected two tokens"},
           {"/model/merges", "[[\"a\"]]", "merge 1: expected two tokens"},
           {"/model/merges", "[[\"a\", \"b\", \"b\"]]", "merge 1: expected two tokens"},
           {"/model/merges", "[\"b a\"]", "merge 1: \"ba\" is not in the vocabulary"},
           {"/normalizer", "{\"type\": \"NFC\"}", "normalizer is NFC"},
           {"/pre_tokenizer", "null", "pre_tokenizer is null"},
           {"/pre_tokenizer", "{\"type\": \"Metaspace\"}", "pre_tokenizer is Metaspace"},
           {"/pre_tokenizer/use_regex", "false", "pre_tokenizer is ByteLevel without use_regex"},
           {"/decoder", "{\"type\": \"WordPiece\"}", "decoder is WordPiece"},
           {"/post_processor", "{\"type\": \"BertProcessing\"}",
            "post_processor is BertProcessing"},
           {"/post_processor", R"({"type": "TemplateProcessing", "single": [{"Sequence": {}},
               {"SpecialToken": {"id": "a"}}]})",
            "post_processor is a template that does more than prepend a token"},
           {"/post_processor", R"({"type": "TemplateProcessing", "single": [
               {"SpecialToken": {"id": "a"}}, {"Sequence": {}}]})",
            "post_processor prepends \"a\", which is not bos_token"},
           {"/added_tokens", "[1]", "added_tokens: an entry has no integer \"id\""},
           {"/added_tokens/0/single_word", "true", "single_word is not supported"},
       }) {
    json content = small_tokenizer_json();
    content[json::json_pointer(change.path)] = json::parse(change.value);
    const std::string message = load_error(with_tokenizer_json(content));
    EXPECT_EQ(message.rfind("dir/tokenizer.json: ", 0), 0U) << message;
    EXPECT_NE(message.find(change.message), std::string::npos) << message;
  }
  json content = small_tokenizer_json();
  content.erase("model");
  EXPECT_EQ(load_error(with_tokenizer_json(content)), "dir/tokenizer.json: there is no model");
  content["model"] = json::object();
  EXPECT_EQ(load_error(with_tokenizer_json(content)), "dir/tokenizer.json: model has no vocab");
}

TEST(TokenizerLoad, TruncatedFilesAreRefused) {
  const std::string whole = small_tokenizer_json().dump();
  for (std::size_t length = 0; length < whole.size(); ++length) {
    TokenizerFiles files;
    files.tokenizer = whole.substr(0, length);
    EXPECT_EQ(load_error(files).rfind("dir/tokenizer.json: ", 0), 0U) << length;
  }
}

TEST(TokenizerLoad, DeepNestingIsRefusedWithoutRecursion) {
  TokenizerFiles files = small_files();
  files.tokenizer_config = std::string(1'000'000, '[');
  EXPECT_EQ(load_error(files).rfind("dir/tokenizer_config.json: ", 0), 0U);
  files = {};
  files.tokenizer = "{\"normalizer\": " + std::string(1'000'000, '[');
  EXPECT_EQ(load_error(files).rfind("dir/tokenizer.json: ", 0), 0U);
}

}  // namespace
}  // namespace deltafox
