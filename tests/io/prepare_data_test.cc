// Texts to token files: cuts, documents, learning a vocabulary, going on after an interruption.
#include "io/prepare_data.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "deltafox/tokenizer.h"
#include "io/text_corpus.h"
#include "io/token_file.h"
#include "support/errors.h"
#include "support/random.h"
#include "support/temporary.h"

namespace deltafox::test {
namespace {

namespace fs = std::filesystem;
using io::PreparedData;
using io::PrepareOptions;

const std::string kGpt2 = std::string(DELTAFOX_TEST_DATA) + "/gpt2";

std::vector<std::int32_t> ids_of(const std::string& path) {
  const io::TokenFile file = io::TokenFile::open(path);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(file.size()));
  file.read(0, ids);
  return ids;
}

// Words, numbers, spaces of all kinds and some non-ASCII, longer than a few chunks.
std::string long_text() {
  Random random(1);
  const std::vector<std::string> parts{"word", "It's", "12,345", "naïve", "—",    "\n\n",
                                       "  ",   "\t",   ".",      "…",     "we'll"};
  std::string text;
  while (text.size() < 900'000) {
    text += parts[static_cast<std::size_t>(random.integer(0, std::ssize(parts) - 1))];
    if (random.integer(0, 3) > 0) text += ' ';
  }
  return text;
}

class Prepare : public testing::Test {
 protected:
  PrepareOptions options(const std::string& output, const std::vector<std::string>& inputs) const {
    PrepareOptions options;
    options.inputs = inputs;
    options.output = directory_.path(output);
    options.tokenizer = kGpt2;
    options.threads = 2;
    return options;
  }

  TemporaryDirectory directory_;
};

TEST_F(Prepare, CutsChangeNoId) {
  const std::string text = long_text();
  const std::string path = directory_.write("long.txt", text);
  EXPECT_GT(io::TextCorpus({path}, "text").chunks().size(), 3U);
  for (const bool escapes : {false, true}) {
    const std::string tokenizer_directory = directory_.path(escapes ? "json" : "plain");
    fs::copy(kGpt2, tokenizer_directory);
    if (escapes) {
      std::ofstream(tokenizer_directory + "/tokenizer_config.json")
          << R"({"tokenizer_class": "JSONGPT2Tokenizer"})";
    }
    PrepareOptions made = options(escapes ? "a" : "b", {path});
    made.tokenizer = tokenizer_directory;
    io::prepare_data(made);
    const Tokenizer tokenizer = Tokenizer::load(tokenizer_directory);
    std::vector<std::int32_t> expected = tokenizer.encode(text, false);
    expected.push_back(*tokenizer.eos_token_id());
    EXPECT_EQ(ids_of(made.output + "/train.tokens"), expected);
  }
}

TEST_F(Prepare, EachLineOfJsonIsADocument) {
  const std::string path =
      directory_.write("d.jsonl", "{\"text\": \"Hello world\"}\n\n{\"text\": \"Hello\", \"a\": 1}");
  const PreparedData data = io::prepare_data(options("out", {path}));
  EXPECT_EQ(data.documents, 2);
  EXPECT_EQ(ids_of(directory_.path("out/train.tokens")),
            (std::vector<std::int32_t>{15496, 995, 50256, 15496, 50256}));
  EXPECT_EQ(data.vocab_size, 50257);
  EXPECT_TRUE(fs::exists(directory_.path("out/merges.txt")));
  EXPECT_FALSE(fs::exists(directory_.path("out/parts")));
}

TEST_F(Prepare, HeldOutDocumentsAreNotTrainedOn) {
  std::string lines;
  for (int i = 0; i < 400; ++i) lines += "{\"text\": \"" + std::to_string(i) + "\"}\n";
  PrepareOptions half = options("out", {directory_.write("d.jsonl", lines)});
  half.heldout_share = 0.25;
  const PreparedData data = io::prepare_data(half);
  const std::vector<std::int32_t> train = ids_of(directory_.path("out/train.tokens"));
  const std::vector<std::int32_t> heldout = ids_of(directory_.path("out/heldout.tokens"));
  EXPECT_EQ(std::count(train.begin(), train.end(), 50256) +
                std::count(heldout.begin(), heldout.end(), 50256),
            400);
  // 400 draws of one in four: 100, give or take 8.7.
  EXPECT_NEAR(std::count(heldout.begin(), heldout.end(), 50256), 100, 40);
  EXPECT_EQ(data.train_tokens, std::ssize(train));
}

TEST_F(Prepare, LearnsAVocabulary) {
  PrepareOptions learned = options("out", {directory_.write("a.txt", long_text())});
  learned.tokenizer = "";
  learned.vocab_size = 300;
  EXPECT_EQ(io::prepare_data(learned).vocab_size, 300);
  const Tokenizer tokenizer = Tokenizer::load(directory_.path("out"));
  EXPECT_EQ(tokenizer.decode(ids_of(directory_.path("out/train.tokens")), true), long_text());
}

TEST_F(Prepare, GoesOnAfterAnInterruption) {
  // Two parts, of which the second cannot be read at first.
  const std::string good = directory_.write("a.jsonl", "{\"text\": \"Hello world\"}\n");
  const std::string bad = directory_.write("b.jsonl", "{\"text\": \"b\"}\n{\"text\": 77}\n");
  const auto run = [&](const std::string& output) {
    PrepareOptions in_parts = options(output, {good, bad});
    in_parts.part_bytes = 1;
    return io::prepare_data(in_parts);
  };
  EXPECT_THAT(error_of([&] { run("out"); }),
              testing::HasSubstr(bad + ": line 2: has no text under 'text'"));
  const auto when = fs::last_write_time(bad);
  directory_.write("b.jsonl", "{\"text\": \"b\"}\n{\"text\": \"\"}\n");
  fs::last_write_time(bad, when);
  // The same inputs by size and time: the first part is not done again.
  EXPECT_EQ(run("out").resumed_bytes, static_cast<std::int64_t>(fs::file_size(good)));
  EXPECT_EQ(run("anew").resumed_bytes, 0);
  EXPECT_EQ(read_file(directory_.path("out/train.tokens")),
            read_file(directory_.path("anew/train.tokens")));
}

TEST_F(Prepare, NamesWhatIsNoTextAndWhatIsThere) {
  const std::string path = directory_.write("latin1.txt", "caf\xe9");
  EXPECT_THAT(error_of([&] { io::prepare_data(options("out", {path})); }),
              testing::HasSubstr("latin1.txt: from byte 0: the text is not UTF-8 at byte 3"));
  directory_.write("done/train.tokens", "");
  directory_.write("a.txt", "a");
  EXPECT_THAT(error_of([&] { io::prepare_data(options("done", {directory_.path("a.txt")})); }),
              testing::HasSubstr("done/train.tokens: exists already"));
  EXPECT_THAT(error_of([&] { io::prepare_data(options("out", {directory_.path("done")})); }),
              testing::HasSubstr("holds no .txt or .jsonl files"));
}

}  // namespace
}  // namespace deltafox::test
