// data, train and export.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>

#include "apps/program.h"
#include "support/temporary.h"

namespace deltafox::test {
namespace {

const std::string kSource = DELTAFOX_SOURCE_DIR;

class TrainCommand : public testing::Test {
 protected:
  TrainCommand() {
    directory_.write("text.txt", read_file(kSource + "/LICENSE").substr(0, 900));
    expect_success(run_program({"data", directory_.path("text.txt"), "--train-tokenizer",
                                "--vocab-size", "300", "--output", directory_.path("data")}));
  }
  Arguments train(const Arguments& more) const {
    Arguments arguments{"train", kSource + "/configs/tiny/delta_net.yaml",
                        "data_dir=" + directory_.path("data"),
                        "output_dir=" + directory_.path("run"), "schedule.warmup_steps=256"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  TemporaryDirectory directory_;
};

TEST_F(TrainCommand, MakesAModelThatGenerates) {
  const Result result = run_program(train({"train.max_tokens=1024", "-q", "--json"}));
  expect_success(result);
  const std::string model = result.json().at("model").get<std::string>();
  EXPECT_EQ(result.json().at("tokens"), 1024);
  const Result text = run_program({"generate", "--model", model, "The", "-n", "3"});
  expect_success(text);
  EXPECT_THAT(text.out, testing::StartsWith("The"));
  expect_refusal(run_program({"data", directory_.path("text.txt"), "--tokenizer", model, "-o",
                              directory_.path("data")}),
                 {"train.tokens", "exists already"});

  const std::string narrow = directory_.path("narrow");
  expect_success(
      run_program({"export", directory_.path("run"), "-o", narrow, "--dtype", "bfloat16"}));
  EXPECT_LT(std::filesystem::file_size(narrow + "/model.safetensors"),
            std::filesystem::file_size(model + "/model.safetensors"));
  expect_success(run_program({"generate", "--model", narrow, "The", "-n", "3"}));
}

TEST_F(TrainCommand, StopsInGoodOrderAndGoesOn) {
  Program program(train({"train.max_tokens=25600000"}));
  // Its first step is done when the log is there.
  const std::string log = directory_.path("run/metrics/jsonlines/train.jsonl");
  while (!std::filesystem::exists(log)) usleep(1000);
  program.kill(SIGINT);
  const Result stopped = program.finish();
  EXPECT_EQ(stopped.exit_code, 130);
  EXPECT_THAT(stopped.err, testing::HasSubstr("ETA"));
  EXPECT_THAT(stopped.err, testing::HasSubstr("the same command goes on from there"));
  const Result more = run_program(train({"train.max_tokens=25600", "--json"}));
  EXPECT_EQ(more.exit_code, 0);
  EXPECT_THAT(more.err, testing::HasSubstr("going on from " + directory_.path("run/checkpoints")));
}

TEST_F(TrainCommand, RefusesWhatIsWrongInOneLine) {
  expect_refusal(run_program(train({"train.max_token=1024"})),
                 {"'train.max_token=1024': key 'train.max_token' is unknown"});
  expect_refusal(run_program({"train", "/no/such.yaml"}), {"/no/such.yaml"});
  expect_refusal(run_program({"export", directory_.path("data"), "-o", directory_.path("x")}),
                 {"holds no training checkpoints"});
  expect_refusal(run_program({"data", directory_.path("text.txt"), "-o", directory_.path("x")}),
                 {"--tokenizer", "--train-tokenizer"});
}

}  // namespace
}  // namespace deltafox::test
