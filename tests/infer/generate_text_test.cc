// Generation of text: GPT-2's first 256 tokens are single bytes, so its tokenizer fits the tiny
// models, and every stop string of more than one byte spans tokens.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <functional>

#include "deltafox/generate.h"
#include "infer/generation.h"

namespace deltafox {

namespace {

using test::Ids;
using test::Prompts;
using test::tiny_model;

std::string joined(const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

// The first `size` characters in a row that `fits` and that come nowhere before; after byte 4, so
// that something precedes them.
std::string pick(const std::string& text, std::size_t size,
                 const std::function<bool(const std::string&)>& fits) {
  for (std::size_t i = 4; i + size <= text.size(); ++i) {
    std::string candidate = text.substr(i, size);
    if (fits(candidate) && text.find(candidate) == i) return candidate;
  }
  throw std::runtime_error("the model's text holds nothing of the kind");
}

bool printable(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > ' ' && c < 127; });
}

// A character of two bytes.
bool two_bytes(const std::string& text) {
  const auto first = static_cast<unsigned char>(text[0]);
  return text.size() == 2 && first >= 0xC2 && first <= 0xDF;
}

class GenerateText : public testing::Test {
 protected:
  GenerateText() {
    config_.max_new_tokens = 80;
    config_.eos_token_id.emplace();
    config_.do_sample = true;
    config_.top_k = 5;
    options_.tokenizer = &tokenizer_;
  }

  GeneratedSequence run() const { return generate(model_, Prompts{prompt_}, config_, options_)[0]; }

  // The texts of a run's events, one for each token.
  std::vector<std::string> stream() const {
    std::vector<std::string> pieces;
    GenerateOptions options = options_;
    options.on_token = [&](const TokenEvent& event) {
      pieces.emplace_back(event.text);
      return true;
    };
    generate(model_, Prompts{prompt_}, config_, options);
    return pieces;
  }

  Model model_ = tiny_model();
  Tokenizer tokenizer_ = Tokenizer::load(DELTAFOX_TEST_DATA "/gpt2");
  Ids prompt_ = {33, 40, 51};
  GenerationConfig config_;
  GenerateOptions options_;
};

}  // namespace

TEST_F(GenerateText, IsWhatTheNewTokensDecodeTo) {
  for (config_.seed = 0; config_.seed < 20; ++config_.seed) {
    const GeneratedSequence result = run();
    EXPECT_EQ(result.text, tokenizer_.decode(result.new_ids()));
    EXPECT_EQ(result.stop_string, "");
    const auto pieces = stream();
    EXPECT_EQ(pieces.size(), result.new_ids().size());
    EXPECT_EQ(joined(pieces), result.text);
  }
}

TEST_F(GenerateText, IsEmptyWithoutATokenizer) {
  options_.tokenizer = nullptr;
  EXPECT_EQ(run().text, "");
}

TEST_F(GenerateText, StopStringsEndASequenceAcrossTokenBorders) {
  const GeneratedSequence whole = run();
  const std::vector<std::string> stops = {pick(whole.text, 2, printable),
                                          pick(whole.text, 2, two_bytes)};
  for (const std::string& stop : stops) {
    SCOPED_TRACE(stop);
    const std::size_t at = whole.text.find(stop);
    config_.stop_strings = {"never to be seen", stop};

    options_.keep_stop_string = true;
    const GeneratedSequence kept = run();
    EXPECT_EQ(kept.finish_reason, FinishReason::kStopString);
    EXPECT_EQ(kept.stop_string, stop);
    EXPECT_EQ(kept.text, whole.text.substr(0, at + stop.size()));
    EXPECT_LT(kept.ids.size(), whole.ids.size());
    EXPECT_TRUE(std::equal(kept.ids.begin(), kept.ids.end(), whole.ids.begin()));
    auto pieces = stream();
    EXPECT_EQ(joined(pieces), kept.text);
    EXPECT_EQ(pieces.back(), stop);  // it comes whole

    options_.keep_stop_string = false;
    const GeneratedSequence cut = run();
    EXPECT_EQ(cut.ids, kept.ids);
    EXPECT_EQ(cut.text, whole.text.substr(0, at));
    EXPECT_EQ(joined(stream()), cut.text);
  }
}

TEST_F(GenerateText, AStopStringMayBeginInThePrompt) {
  const GeneratedSequence whole = run();
  ASSERT_EQ(tokenizer_.decode(prompt_), "BIT");
  const std::string first = tokenizer_.decode(whole.new_ids().first(2));
  config_.stop_strings = {"T" + first};
  const GeneratedSequence result = run();
  EXPECT_EQ(result.finish_reason, FinishReason::kStopString);
  EXPECT_EQ(result.text, first);
  config_.stop_strings = {"BIT"};  // but not end there
  EXPECT_EQ(run().ids, whole.ids);
}

TEST_F(GenerateText, TheEndOfSequenceGoesBeforeAStopString) {
  const GeneratedSequence whole = run();
  config_.stop_strings = {pick(whole.text, 2, printable)};
  const std::int32_t last = run().ids.back();
  ASSERT_EQ(std::count(whole.ids.begin(), whole.ids.end(), last), 1);
  config_.eos_token_id = {last};
  EXPECT_EQ(run().finish_reason, FinishReason::kEos);
}

TEST_F(GenerateText, BeamsEndAtStopStrings) {
  config_.do_sample = false;
  config_.num_beams = 4;
  config_.num_return_sequences = 4;
  config_.max_new_tokens = 20;
  config_.length_penalty = 0;  // so that sequences cut short are among the best
  const auto whole = generate(model_, Prompts{prompt_}, config_, options_);
  const std::string stop = pick(whole[0].text, 1, printable);
  config_.stop_strings = {stop};
  std::size_t stopped = 0;
  for (const GeneratedSequence& result : generate(model_, Prompts{prompt_}, config_, options_)) {
    const std::size_t at = result.text.find(stop);
    EXPECT_EQ(result.finish_reason == FinishReason::kStopString, at != std::string::npos);
    if (result.finish_reason != FinishReason::kStopString) continue;
    EXPECT_EQ(at, result.text.size() - 1);
    EXPECT_EQ(result.stop_string, stop);
    ++stopped;
  }
  EXPECT_GT(stopped, 0U);
}

TEST_F(GenerateText, ACancelledSequenceKeepsWhatWasHeldBack) {
  const GeneratedSequence whole = run();
  const std::string stop = pick(whole.text, 2, printable);
  config_.stop_strings = {stop + "never"};
  std::string shown;
  options_.on_token = [&](const TokenEvent& event) {
    shown += event.text;
    // Up to the token after which all of `stop` waits for what comes next.
    return shown.size() < whole.text.find(stop) || !event.text.empty();
  };
  const GeneratedSequence result = run();
  EXPECT_EQ(result.finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(shown, whole.text.substr(0, whole.text.find(stop)));
  EXPECT_EQ(result.text, shown + stop.substr(0, 1));
}

}  // namespace deltafox
