// deltafox logits and loss against the golden cases, and what they refuse.
#include <gtest/gtest.h>

#include <cmath>

#include "apps/checkpoints.h"
#include "apps/program.h"
#include "support/golden.h"

namespace deltafox::test {
namespace {

constexpr float kLogitTolerance = 2e-5F;
constexpr float kLossTolerance = 1e-5F;

void expect_near(std::span<const float> got, std::span<const float> expected, float tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], expected[i], tolerance) << "element " << i;
  }
}

class Score : public testing::TestWithParam<std::string> {
 protected:
  std::int64_t rows(const std::string& name = "input_ids") const {
    return std::ssize(golden_.rows(name));
  }
  std::string input() const { return directory_.path("input.safetensors"); }
  std::string output() const { return directory_.path("output.safetensors"); }
  Result run(const std::string& command, const Arguments& more = {}) const {
    Arguments arguments{command,    "--model", golden_.directory(), "--input", input(),
                        "--output", output()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }

  Golden golden_{GetParam()};
  TemporaryDirectory directory_;
};

TEST_P(Score, LogitsOfABatch) {
  for (const DType dtype : {DType::kI32, DType::kI64}) {
    write_integers(input(), {{"input_ids", dtype, rows(), golden_.ids("input_ids")}});
    expect_success(run("logits"));
    expect_near(read_floats(output(), "logits"), golden_.floats("logits"), kLogitTolerance);
  }
}

TEST_P(Score, LossOfABatch) {
  write_integers(input(), {{"input_ids", DType::kI64, rows(), golden_.ids("input_ids")},
                           {"labels", DType::kI64, rows(), golden_.ids("labels")}});
  const Result result = run("loss", {"--json"});
  expect_success(result);
  const std::span<const float> expected = golden_.floats("loss");
  expect_near(read_floats(output(), "loss"), expected, kLossTolerance);
  double sum = 0;
  for (const float loss : expected) sum += static_cast<double>(loss);
  EXPECT_NEAR(result.json().at("loss").get<double>(), sum / static_cast<double>(expected.size()),
              1e-5);
  EXPECT_EQ(result.json().at("tokens"), expected.size());
}

TEST_P(Score, GradientsOfTheMeanLoss) {
  write_integers(input(), {{"input_ids", DType::kI64, rows(), golden_.ids("input_ids")},
                           {"labels", DType::kI64, rows(), golden_.ids("labels")}});
  const std::string gradients = directory_.path("gradients.safetensors");
  const Result result = run("loss", {"--json", "--gradients", gradients, "--recompute"});
  expect_success(result);
  EXPECT_EQ(result.json().at("gradients"), gradients);
  expect_near(read_floats(output(), "loss"), golden_.floats("loss"), kLossTolerance);
  const io::SafetensorsFile file = io::SafetensorsFile::open(gradients);
  ASSERT_FALSE(file.tensors().empty());
  for (const io::TensorEntry& entry : file.tensors()) {
    const std::span<const float> expected = golden_.floats(entry.name);
    const std::vector<float> got = read_floats(gradients, entry.name);
    ASSERT_EQ(got.size(), expected.size()) << entry.name;
    double squares = 0;
    double errors = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      squares += static_cast<double>(expected[i]) * expected[i];
      errors += std::pow(static_cast<double>(got[i]) - expected[i], 2);
    }
    EXPECT_LE(std::sqrt(errors), 1e-4 * std::sqrt(squares)) << entry.name;
  }
}

TEST_P(Score, PaddingOnTheLeft) {
  if (!golden_.contains("padded.input_ids")) GTEST_SKIP() << "the case has no padded batch";
  const std::vector<std::int32_t> mask = golden_.ids("padded.attention_mask");
  const std::int64_t count = rows("padded.input_ids");
  write_integers(input(), {{"input_ids", DType::kI64, count, golden_.ids("padded.input_ids")},
                           {"attention_mask", DType::kI64, count, mask}});
  expect_success(run("logits"));
  const std::vector<float> got = read_floats(output(), "logits");
  const std::span<const float> expected = golden_.floats("padded.logits");
  ASSERT_EQ(got.size(), expected.size());
  const std::size_t width = got.size() / mask.size();
  for (std::size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], mask[i / width] != 0 ? expected[i] : 0, kLogitTolerance) << i;
  }
}

TEST_P(Score, PaddingOnTheRightGivesTheSame) {
  const auto ids = golden_.rows("input_ids");
  const std::size_t columns = ids[0].size() + 5;
  std::vector<std::int32_t> padded;
  std::vector<std::int32_t> mask;
  for (const auto& row : ids) {
    padded.insert(padded.end(), row.begin(), row.end());
    padded.insert(padded.end(), 5, -100);  // what stands there does not matter
    mask.insert(mask.end(), row.size(), 1);
    mask.insert(mask.end(), 5, 0);
  }
  write_integers(input(), {{"input_ids", DType::kI64, rows(), padded},
                           {"attention_mask", DType::kI32, rows(), mask},
                           {"labels", DType::kI64, rows(), padded}});
  expect_success(run("logits"));
  const std::vector<float> got = read_floats(output(), "logits");
  const std::span<const float> expected = golden_.floats("logits");
  const std::size_t width = got.size() / mask.size();
  for (std::size_t b = 0; b < ids.size(); ++b) {
    const auto row = std::span(got).subspan(b * columns * width, columns * width);
    const std::size_t size = ids[b].size() * width;
    expect_near(row.first(size), expected.subspan(b * size, size), kLogitTolerance);
    EXPECT_TRUE(std::all_of(row.begin() + static_cast<std::ptrdiff_t>(size), row.end(),
                            [](float logit) { return logit == 0; }));
  }
  const Result loss = run("loss", {"--json"});
  expect_success(loss);
  EXPECT_EQ(loss.json().at("tokens"), golden_.ids("input_ids").size());
}

TEST_P(Score, HiddenStatesOfEveryLayer) {
  write_integers(input(), {{"input_ids", DType::kI64, rows(), golden_.ids("input_ids")}});
  expect_success(run("logits", {"--hidden-states"}));
  const auto file = io::SafetensorsFile::open(output());
  const ConstTensorView hidden = file.view("hidden_states");  // [layers + 2, B, T, C]
  const std::span<const float> expected = golden_.floats("last_hidden_states");
  const std::int64_t layers = hidden.shape[0];
  const std::int64_t batch = hidden.shape[1];
  const std::int64_t width = hidden.shape[3];
  ASSERT_EQ(std::ssize(expected), (layers - 1) * batch * width);
  // The expected ones hold what comes before (or follows) each layer, and the final norm.
  const std::int64_t shift = golden_.hidden_states_follow_layers() ? 1 : 0;
  for (std::int64_t l = 0; l < layers - 1; ++l) {
    const std::int64_t layer = l + (l < layers - 2 ? shift : 1);
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int64_t at = ((layer * batch + b + 1) * hidden.shape[2] - 1) * width;
      expect_near({hidden.f32() + at, static_cast<std::size_t>(width)},
                  expected.subspan(static_cast<std::size_t>((l * batch + b) * width),
                                   static_cast<std::size_t>(width)),
                  kLogitTolerance);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, Score, testing::ValuesIn(Golden::cases()), Golden::test_name);

class ScoreRefusal : public testing::Test {
 protected:
  void expect_refused(const std::vector<IntegerTensor>& tensors,
                      const std::vector<std::string>& culprits,
                      const std::string& command = "logits") const {
    write_integers(input_, tensors);
    expect_refusal(run_program({command, "--model", golden_directory("delta_net-tiny"), "--input",
                                input_, "--output", output_}),
                   culprits);
    EXPECT_FALSE(std::filesystem::exists(output_));
  }

  TemporaryDirectory directory_;
  std::string input_ = directory_.path("input.safetensors");
  std::string output_ = directory_.path("output.safetensors");
};

TEST_F(ScoreRefusal, WrongTensors) {
  expect_refused({{"ids", DType::kI32, 1, {1, 2}}}, {"input.safetensors", "input_ids"});
  expect_refused(
      {{"input_ids", DType::kI32, 1, {1, 2}}, {"attention_mask", DType::kI32, 2, {1, 1}}},
      {"attention_mask"});
  expect_refused(
      {{"input_ids", DType::kI32, 1, {1, 2}}, {"attention_mask", DType::kI32, 1, {1, 2}}},
      {"attention_mask", "2"});
  expect_refused(
      {{"input_ids", DType::kI32, 1, {1, 2, 3}}, {"attention_mask", DType::kI32, 1, {1, 0, 1}}},
      {"attention_mask", "row 0"});
  expect_refused(
      {{"input_ids", DType::kI32, 2, {1, 2}}, {"attention_mask", DType::kI32, 2, {1, 0}}},
      {"attention_mask", "row 1"});
  expect_refused({{"input_ids", DType::kI32, 1, {1, 2}}}, {"input.safetensors", "labels"}, "loss");
  expect_refused({{"input_ids", DType::kF32, 1, {1, 2}}},
                 {"input.safetensors", "input_ids", "F32"});
}

TEST_F(ScoreRefusal, IdsOutOfRange) {
  expect_refused({{"input_ids", DType::kI64, 2, {1, 2, 3, 256}}},
                 {"input.safetensors", "input_ids", "256", "[1, 1]"});
  expect_refused({{"input_ids", DType::kI32, 1, {-1}}}, {"input_ids", "-1"});
  expect_refused({{"input_ids", DType::kI64, 1, {1}}, {"labels", DType::kI64, 1, {256}}},
                 {"labels", "256"}, "loss");
}

TEST_F(ScoreRefusal, UnwritableOutput) {
  const auto logits = [&](const std::string& output, const Surroundings& surroundings = {}) {
    return run_program({"logits", "--model", golden_directory("delta_net-tiny"), "--input-ids",
                        "1,2,3", "--output", output},
                       surroundings);
  };
  expect_refusal(logits(directory_.path("no/such/place")), {"no/such/place"});
  expect_refusal(logits(directory_.path()), {directory_.path(), "directory"});
  expect_refusal(logits("/dev/full"), {"/dev/full"});
  expect_refusal(logits(output_, {.max_file_bytes = 1000}), {output_});
  EXPECT_TRUE(std::filesystem::is_empty(directory_.path()));
}

TEST_F(ScoreRefusal, GradientsOfRoundedWeights) {
  expect_refusal(run_program({"loss", "--model", golden_directory("delta_net-tiny"), "--input-ids",
                              "1,2,3", "--gradients", output_, "--dtype", "bfloat16"}),
                 {"--gradients", "float32"});
  EXPECT_FALSE(std::filesystem::exists(output_));
}

TEST_F(ScoreRefusal, NoInputOrTwo) {
  const std::string model = golden_directory("delta_net-tiny");
  expect_refusal(run_program({"logits", "--model", model, "--output", output_}), {"--input"});
  expect_refusal(run_program({"loss", "--model", model, "--input", input_, "--input-ids", "1"}),
                 {"--input"});
  expect_refusal(run_program({"loss", "--model", model, "--input", input_}), {input_});
  expect_refusal(run_program({"loss", "--model", model, "--input-ids", ""}), {"--input-ids"});
  expect_refusal(run_program({"loss", "--model", model, "--input-ids", "1,x"}), {"x"});
}

TEST(LossOfAText, IsThatOfItsIdsBehindBos) {
  const CheckpointCopy checkpoint;
  checkpoint.add_byte_tokenizer();
  const TemporaryDirectory directory;
  const std::string input = directory.path("input.safetensors");
  write_integers(input, {{"input_ids", DType::kI64, 1, {255, 'f', 'o'}},
                         {"labels", DType::kI64, 1, {'f', 'o', 'x'}}});
  const auto loss = [&](const std::string& option, const std::string& value) {
    const Result result =
        run_program({"loss", "--model", checkpoint.path(), option, value, "--json"});
    expect_success(result);
    return result.json();
  };
  const nlohmann::json expected = loss("--input", input);
  EXPECT_EQ(loss("--text", "fox"), expected);
  EXPECT_EQ(loss("--input-ids", "102,111,120"), expected);
  EXPECT_EQ(expected.at("tokens"), 3);
  EXPECT_EQ(expected.at("sequences").at(0).at("losses").size(), 3U);
}

}  // namespace
}  // namespace deltafox::test
