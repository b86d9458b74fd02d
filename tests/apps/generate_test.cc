// deltafox generate: ids, texts, states, batches, and what it refuses.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <csignal>
#include <sstream>

#include "apps/checkpoints.h"
#include "apps/program.h"
#include "support/golden.h"

namespace deltafox::test {
namespace {

std::string joined(std::span<const std::int32_t> ids) {
  return fmt::format("{}", fmt::join(ids, ","));
}

// With a tokenizer of bytes, and no end but the length.
class GenerateText : public testing::Test {
 protected:
  GenerateText() { checkpoint_.add_byte_tokenizer(); }

  Result run(const Arguments& more, const Surroundings& surroundings = {}) const {
    Arguments arguments{"generate", "--model", checkpoint_.path(), "--ignore-eos"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments, surroundings);
  }
  nlohmann::json run_json(Arguments arguments, const Surroundings& surroundings = {}) const {
    arguments.emplace_back("--json");
    const Result result = run(arguments, surroundings);
    expect_success(result);
    return result.json();
  }

  CheckpointCopy checkpoint_;
};

TEST(GenerateIds, EqualsTheGoldenGreedyContinuation) {
  for (const std::string& name : Golden::cases()) {
    SCOPED_TRACE(name);
    const Golden golden(name);
    const std::vector<std::int32_t> prompt = golden.ids("greedy.prompt");
    const std::vector<std::int32_t> expected = golden.ids("greedy.ids");
    const std::string count = std::to_string(expected.size() - prompt.size());
    const Result result =
        run_program({"generate", "--model", golden.directory(), "--input-ids", joined(prompt),
                     "--output-ids", "--max-new-tokens", count, "--ignore-eos"});
    expect_success(result);
    EXPECT_EQ(result.out, joined(expected) + "\n");
    const Result continuation =
        run_program({"generate", "--model", golden.directory(), "--input-ids", joined(prompt),
                     "--output-ids", "--max-new-tokens", count, "--ignore-eos", "--no-echo"});
    EXPECT_EQ(continuation.out, joined(std::span(expected).subspan(prompt.size())) + "\n");
  }
}

TEST_F(GenerateText, PrintsThePromptAndWhatContinuesIt) {
  const nlohmann::json json = run_json({"The fox", "-n", "8"}).at("sequences").at(0);
  EXPECT_EQ(json.at("num_prompt_ids"), 7);
  EXPECT_EQ(json.at("ids").size(), 15U);
  EXPECT_EQ(json.at("prompt_text"), "The fox");
  EXPECT_EQ(json.at("finish_reason"), "length");
  const auto text = json.at("text").get<std::string>();
  for (const char* option : {"--stream", "--no-stream"}) {
    const Result result = run({"The fox", "-n", "8", option});
    expect_success(result);
    EXPECT_EQ(result.out, fmt::format("The fox{}\n", text));
    EXPECT_EQ(run({"The fox", "-n", "8", "--no-echo", option}).out, text + "\n");
  }
}

TEST_F(GenerateText, ThePromptMayComeFromAnywhere) {
  const std::string expected = run({"The fox"}).out;
  checkpoint_.write("prompt.txt", "The fox\n");
  EXPECT_EQ(run({"--prompt-file", checkpoint_.path("prompt.txt")}).out, expected);
  EXPECT_EQ(run({"--prompt-file", "-"}, {.input = "The fox"}).out, expected);
  EXPECT_EQ(run({"--prompt", "The fox"}).out, expected);
  EXPECT_EQ(run({"--input-ids", "84,104,101 32 102,111,120"}).out, expected);
  EXPECT_TRUE(run({"--", "--The_fox"}).out.starts_with("--The_fox"));
  EXPECT_TRUE(run({"[a,b]"}).out.starts_with("[a,b]"));
  EXPECT_TRUE(run({"--prompt=-5"}).out.starts_with("-5"));
}

TEST_F(GenerateText, FillsRowsOfIdsUpWhereAsked) {
  const Arguments prompts{"--prompt",       "a", "--prompt", "bcd", "-n", "1", "--output-ids",
                          "--pad-token-id", "7"};
  const std::string plain = run(prompts).out;
  Arguments padded = prompts;
  padded.emplace_back("--pad");
  const std::size_t line = plain.find('\n');
  EXPECT_EQ(run(padded).out, plain.substr(0, line) + ",7,7" + plain.substr(line));
  expect_refusal(run({"a", "--pad"}), {"--pad"});
}

TEST_F(GenerateText, SamplesByTheSeed) {
  const auto text = [&](const char* seed) {
    return run({"The fox", "--do-sample", "--seed", seed}).out;
  };
  EXPECT_EQ(text("7"), text("7"));
  EXPECT_NE(text("7"), text("8"));
  EXPECT_EQ(run({"The fox", "--do-sample", "--seed", "7", "--threads", "3"}).out, text("7"));
}

TEST_F(GenerateText, EndsAtAStopString) {
  const auto text = run_json({"The fox", "-n", "12"})["sequences"][0]["text"].get<std::string>();
  std::size_t at = 4;  // a character of its own, not a piece of one that was not UTF-8
  while (at < text.size() && static_cast<unsigned char>(text[at]) >= 0x80) ++at;
  ASSERT_LT(at, text.size());
  const std::string stop = text.substr(at, 1);
  const std::size_t first = text.find(stop);
  const nlohmann::json kept = run_json({"The fox", "-n", "12", "--stop", stop})["sequences"][0];
  EXPECT_EQ(kept.at("finish_reason"), "stop_string");
  EXPECT_EQ(kept.at("stop_string"), stop);
  EXPECT_EQ(kept.at("text"), text.substr(0, first + 1));
  EXPECT_EQ(run({"The fox", "-n", "12", "--stop", "never seen", "--stop", stop, "--no-echo",
                 "--no-keep-stop-string"})
                .out,
            text.substr(0, first) + "\n");
}

TEST_F(GenerateText, ReturnsSeveralSequencesOfSeveralPrompts) {
  const nlohmann::json json =
      run_json({"--prompt", "a", "--prompt", "bcd", "--num-beams", "3", "--num_return_sequences",
                "2", "--length-penalty", "-1", "--early-stopping", "true", "--logprobs"});
  ASSERT_EQ(json.at("sequences").size(), 4U);
  EXPECT_EQ(json["sequences"][3].at("prompt"), 1);
  EXPECT_TRUE(json["sequences"][0].at("score").is_number());
  EXPECT_EQ(json["sequences"][0].at("logprobs").size(), 20U);
  EXPECT_EQ(json.at("prompt_tokens"), 4);
  EXPECT_EQ(json.at("new_tokens"), 80);
  const Result text = run({"--prompt", "a", "--prompt", "bcd", "-n", "3"});
  expect_success(text);
  EXPECT_THAT(text.out, testing::HasSubstr("prompt 1"));
}

TEST_F(GenerateText, ContinuesJsonLines) {
  const Result result = run({"--prompt-file", "-", "--jsonl", "-n", "4"},
                            {.input = "\"one\"\n\n{\"prompt\": \"two\"}\n{\"input_ids\": [97]}\n"});
  expect_success(result);
  std::istringstream lines(result.out);
  std::vector<nlohmann::json> values;
  for (std::string line; std::getline(lines, line);) values.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(values.size(), 3U);
  EXPECT_EQ(values[0].at("text"), run_json({"one", "-n", "4"})["sequences"][0]["text"]);
  EXPECT_EQ(values[1].at("text"), run_json({"two", "-n", "4"})["sequences"][0]["text"]);
  EXPECT_EQ(values[2].at("text"), run_json({"a", "-n", "4"})["sequences"][0]["text"]);
  expect_refusal(run({"--prompt-file", "-", "--jsonl"}, {.input = "\"one\"\n{\"x\": 1}\n"}),
                 {"line 2"});
  expect_refusal(run({"--prompt-file", "-", "--jsonl"}, {.input = "\"one\nb\"\n"}), {"line 1"});
}

TEST_F(GenerateText, SavedStateContinuesAsIfUnbroken) {
  const std::string first = checkpoint_.path("first.state");
  const std::string second = checkpoint_.path("second.state");
  const auto ids = [](const nlohmann::json& json) {
    return json.at("sequences").at(0).at("ids").get<std::vector<std::int32_t>>();
  };
  const std::vector<std::int32_t> begun =
      ids(run_json({"The quick brown", "-n", "6", "--save-state", first}));
  const std::string rest = "32,102,111,120";
  const std::vector<std::int32_t> unbroken =
      ids(run_json({"--input-ids", joined(begun) + "," + rest, "-n", "9"}));
  const std::vector<std::int32_t> resumed = ids(
      run_json({"--input-ids", rest, "-n", "9", "--load-state", first, "--save-state", second}));
  EXPECT_EQ(std::vector(unbroken.begin() + std::ssize(begun), unbroken.end()), resumed);

  const std::string whole = checkpoint_.path("whole.state");
  expect_success(run_program({"state", "save", "--model", checkpoint_.path(), "--input-ids",
                              joined(unbroken), "--output", whole}));
  const auto info = [](const std::string& path) {
    const Result result = run_program({"state", "info", path, "--json"});
    expect_success(result);
    return result.json();
  };
  EXPECT_EQ(info(whole), info(second));
  EXPECT_EQ(info(whole).at("position"), unbroken.size());
}

TEST_F(GenerateText, RefusesStatesThatDoNotFit) {
  const std::string path = checkpoint_.path("a.state");
  expect_refusal(run({"x", "--load-state", path}), {path});
  expect_success(run({"x", "--no-echo", "-n", "1", "--save-state", path}));
  expect_refusal(run({"--prompt", "x", "--prompt", "y", "--load-state", path}), {"--load-state"});
  expect_refusal(run({"x", "--num-beams", "2", "--save-state", path}), {"--save-state"});
  expect_refusal(run_program({"generate", "--model", golden_directory("delta_net-d128"),
                              "--input-ids", "1", "--output-ids", "--load-state", path}),
                 {path, "another model"});
  expect_refusal(run({"x", "--load-state", checkpoint_.path("model.safetensors")}),
                 {"model.safetensors", "state"});
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  expect_refusal(run({"x", "--load-state", path}), {path});
  expect_refusal(run_program({"state", "info", path}), {path});
}

TEST_F(GenerateText, RefusesBadPrompts) {
  expect_refusal(run({""}), {"empty"});
  expect_refusal(run({"--prompt="}), {"empty"});
  expect_refusal(run({"--prompt-file", "-"}), {"stdin", "empty"});
  expect_refusal(run({"--input-ids", ""}), {"--input-ids", "empty"});
  expect_refusal(run({"--input-ids", "1,two"}), {"--input-ids", "two"});
  expect_refusal(run({"--input-ids", "1,256"}), {"256"});
  expect_refusal(run({"--input-ids", "-1"}), {"-1"});
  expect_refusal(run({"--input-ids", "99999999999"}), {"99999999999"});
  expect_refusal(run({"abc\xff"}), {"prompt", "UTF-8"});
  expect_refusal(run({"--prompt-file", "-"}, {.input = "ab\xc3"}), {"stdin", "UTF-8"});
  expect_refusal(run({"--prompt-file", "/no/such/file"}), {"/no/such/file"});
  expect_refusal(run({}), {"PROMPT"});
  expect_refusal(run({"a", "--prompt", "b", "--input-ids", "1"}), {"--input-ids"});
  expect_refusal(run({"a", "--logprobs"}), {"--logprobs"});
}

TEST_F(GenerateText, LeavesNothingOfAStateThatCannotBeWritten) {
  expect_refusal(run({"--prompt", "x", "--json", "--save-state", "/no/such/dir/x.state"}),
                 {"/no/such/dir/x.state"});
  const TemporaryDirectory directory;
  const std::string path = directory.path("x.state");
  expect_refusal(run({"x", "--json", "--save-state", path}, {.max_file_bytes = 500}), {path});
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST_F(GenerateText, EndsQuietlyWhenTheReaderGoes) {
  Program program(
      {"generate", "--model", checkpoint_.path(), "a", "--ignore-eos", "-n", "100000000"});
  EXPECT_FALSE(program.read_some().empty());
  program.close_output();
  const Result result = program.finish();
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.err, "");
}

TEST_F(GenerateText, EndsAtASignal) {
  for (const int signal : {SIGINT, SIGTERM}) {
    Program program(
        {"generate", "--model", checkpoint_.path(), "a", "--ignore-eos", "-n", "100000000"});
    EXPECT_FALSE(program.read_some().empty());
    program.kill(signal);
    const Result result = program.finish();
    EXPECT_EQ(result.exit_code, 130);
    EXPECT_EQ(result.err, "");
  }
}

}  // namespace
}  // namespace deltafox::test
