// The command line itself: help, version, and what it refuses.
#include <gtest/gtest.h>

#include "apps/checkpoints.h"
#include "apps/program.h"

namespace deltafox::test {
namespace {

const std::string kTiny = golden_directory("delta_net-tiny");

TEST(Usage, EveryCommandHasHelpWithAnExample) {
  expect_success(run_program({"--help"}));
  for (const Arguments& command : {Arguments{"generate"},
                                   {"logits"},
                                   {"loss"},
                                   {"tokenize"},
                                   {"detokenize"},
                                   {"info"},
                                   {"init"},
                                   {"pull"},
                                   {"state"},
                                   {"state", "info"},
                                   {"state", "save"},
                                   {"bench"},
                                   {"bench", "machine"},
                                   {"bench", "model"}}) {
    Arguments arguments = command;
    arguments.emplace_back("--help");
    const Result result = run_program(arguments);
    expect_success(result);
    EXPECT_THAT(result.out, testing::HasSubstr("Usage: deltafox " + command[0]));
    EXPECT_THAT(result.out, testing::ContainsRegex("Examples?:\n  deltafox " + command[0]));
  }
}

TEST(Usage, VersionIsOneLine) {
  const Result result = run_program({"--version"});
  expect_success(result);
  EXPECT_THAT(result.out, testing::MatchesRegex("deltafox [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(Usage, NamesWhatItDoesNotKnow) {
  expect_refusal(run_program({}), {"command"});
  expect_refusal(run_program({"frobnicate"}), {"frobnicate"});
  expect_refusal(run_program({"--frobnicate"}), {"--frobnicate"});
  expect_refusal(run_program({"info", "--frobnicate"}), {"deltafox info --help", "--frobnicate"});
  expect_refusal(run_program({"info", "--model", kTiny, "extra"}),
                 {"deltafox info --help", "extra"});
  expect_refusal(run_program({"generate", "--model", kTiny, "a", "--top-kk", "3"}), {"--top-kk"});
  expect_refusal(run_program({"state"}), {"state", "command"});
  expect_refusal(run_program({"state", "frobnicate"}), {"frobnicate"});
}

TEST(Usage, NamesTheOptionAtFault) {
  expect_refusal(run_program({"info"}), {"--model"});
  expect_refusal(run_program({"info", "--model"}), {"--model"});
  expect_refusal(run_program({"info", "--model", kTiny, "--dtype", "int3"}), {"--dtype", "int3"});
  expect_refusal(run_program({"info", "--model", kTiny, "--threads", "two"}), {"--threads", "two"});
  expect_refusal(run_program({"info", "--model", kTiny, "--threads", "-1"}), {"threads", "-1"});
  const auto generate = [&](const std::string& option, const std::string& value) {
    return run_program(
        {"generate", "--model", kTiny, "--input-ids", "1", "--output-ids", option, value});
  };
  expect_refusal(generate("--max-new-tokens", "0"), {"max_new_tokens", "0"});
  expect_refusal(generate("--max-new-tokens", "many"), {"--max-new-tokens", "many"});
  expect_refusal(generate("--temperature", "0"), {"temperature"});
  expect_refusal(generate("--top-p", "1.5"), {"top_p", "1.5"});
  expect_refusal(generate("--num-beams", "0"), {"num_beams"});
  expect_refusal(generate("--early-stopping", "perhaps"), {"--early-stopping", "perhaps"});
  expect_refusal(generate("--eos-token-id", "256"), {"eos_token_id", "256"});
  expect_refusal(generate("--seed", "-1"), {"--seed", "-1"});
}

TEST(Usage, UnderscoresAndEqualSignsMeanTheSame) {
  const Arguments command{"generate", "--model", kTiny, "--output-ids"};
  const auto run = [&](const Arguments& more) {
    Arguments arguments = command;
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result result = run_program(arguments);
    expect_success(result);
    return result.out;
  };
  const std::string expected = run({"--input-ids", "5,6", "--max-new-tokens", "3"});
  EXPECT_EQ(run({"--input_ids", "5,6", "--max_new_tokens", "3"}), expected);
  EXPECT_EQ(run({"--input-ids=5 6", "--max_new_tokens=3"}), expected);
}

TEST(Usage, ValuesKeepTheirUnderscores) {
  const CheckpointCopy checkpoint;
  checkpoint.add_byte_tokenizer();
  const Result result =
      run_program({"tokenize", "--model", checkpoint.path(), "--json", "--", "--a_b"});
  expect_success(result);
  EXPECT_EQ(result.json().at("ids"), nlohmann::json({'-', '-', 'a', '_', 'b'}));
}

TEST(Usage, AModelThatIsNotThere) {
  const TemporaryDirectory cache;
  const Surroundings surroundings{.environment = {{"HF_HOME", cache.path()}}};
  expect_refusal(run_program({"info", "--model", "no/such"}, surroundings),
                 {"no/such", "deltafox pull no/such"});
  expect_refusal(run_program({"info", "--model", "not an id"}, surroundings), {"not an id"});
  expect_refusal(run_program({"info", "--model", cache.path()}, surroundings), {cache.path()});
  expect_refusal(run_program({"info", "--model", kTiny + "/config.json"}, surroundings),
                 {"config.json", "directory"});
}

TEST(Usage, PullOfWhatTheCacheLacksWhileOffline) {
  const TemporaryDirectory cache;
  const Surroundings surroundings{
      .environment = {{"HF_HOME", cache.path()}, {"HF_HUB_OFFLINE", "1"}}};
  expect_refusal(run_program({"pull", "no/such"}, surroundings), {"no/such", "HF_HUB_OFFLINE"});
  expect_refusal(run_program({"pull", "../x"}, surroundings), {"../x"});
}

TEST(Usage, FullStdoutIsAnError) {
  const Result result = run_program({"--help"}, {.output = "/dev/full"});
  expect_refusal(result, {"stdout", "No space left"});
  expect_refusal(run_program({"info", "--model", kTiny}, {.output = "/dev/full"}), {"stdout"});
}

}  // namespace
}  // namespace deltafox::test
