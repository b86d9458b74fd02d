// AdamW on whole models: decay groups and steps of the official code.
#include "train/parameters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "core/float_convert.h"
#include "ops/adamw.h"
#include "support/golden.h"
#include "support/temporary.h"

namespace deltafox::test {
namespace {

using train::Parameters;

class Golden5Steps : public testing::TestWithParam<std::string> {
 protected:
  Golden golden_{GetParam()};
  std::string config_ = read_file(golden_.directory() + "/config.json");
};

TEST_P(Golden5Steps, DecayTheGroupsOfTheOfficialScript) {
  const auto groups = nlohmann::json::parse(read_file(golden_.directory() + "/param_groups.json"));
  ThreadPool threads(1);
  Context ctx(threads);
  const Parameters parameters(ctx, config_, {});
  std::vector<std::string> decayed;
  std::vector<std::string> others;
  for (const Parameters::Entry& entry : parameters.entries()) {
    if (entry.trained) (entry.decayed ? decayed : others).push_back(entry.name);
  }
  EXPECT_THAT(decayed, testing::UnorderedElementsAreArray(
                           groups.at("decay").get<std::vector<std::string>>()));
  EXPECT_THAT(others, testing::UnorderedElementsAreArray(
                          groups.at("no_weight_decay").get<std::vector<std::string>>()));
}

// The bounds are those that the golden values ask for: loss 1e-5, norms 1e-4 of themselves.
TEST_P(Golden5Steps, GiveTheOfficialLossesAndNorms) {
  ThreadPool threads(2);
  Context ctx(threads);
  Parameters parameters(ctx, config_, {});
  parameters.load(golden_.directory());
  const auto ids = golden_.rows("input_ids");
  const std::vector<std::int32_t> labels = golden_.ids("labels");
  const Packed packed(ids);
  const Batch batch = packed.batch();
  const train::OptimizerConfig optimizer{.betas = {0.9, 0.95}, .eps = 1e-8, .weight_decay = 0.1};
  std::vector<float> loss(labels.size());
  for (int s = 0; s < 5; ++s) {
    parameters.gradients().zero(ctx);
    parameters.model().forward_backward(ctx, batch.input_ids, Sequences(batch.cu_seqlens), labels,
                                        1.0F / static_cast<float>(labels.size()), loss,
                                        parameters.gradients(), {});
    const double mean =
        std::accumulate(loss.begin(), loss.end(), 0.0) / static_cast<double>(loss.size());
    const auto at = static_cast<std::size_t>(s);
    EXPECT_NEAR(mean, golden_.floats("train.loss")[at], 1e-5) << "step " << s;
    const double norm = parameters.step(optimizer, 1e-3 * (s + 1) / 5, 1.0, s + 1);
    const float expected = golden_.floats("train.grad_norm")[at];
    EXPECT_NEAR(norm, expected, 1e-4 * expected) << "step " << s;
  }
  std::map<std::string, double> norms;  // by name
  for (const Parameters::Entry& entry : parameters.entries()) {
    if (entry.trained) {
      norms[entry.name] = std::sqrt(ops::sum_of_squares(ctx, entry.weight.view()));
    }
  }
  const std::span<const float> expected = golden_.floats("train.param_norms");
  ASSERT_EQ(norms.size(), expected.size());
  std::size_t i = 0;
  for (const auto& [name, norm] : norms) {
    EXPECT_NEAR(norm, expected[i], 1e-4 * expected[i]) << name;
    ++i;
  }
}

TEST_P(Golden5Steps, LeaveMatricesOfBFloat16Rounded) {
  ThreadPool threads(2);
  Context ctx(threads);
  Parameters parameters(ctx, config_, {}, DType::kBF16);
  const auto expect_rounded = [&] {
    for (const Parameters::Entry& entry : parameters.entries()) {
      const ConstTensorView value = entry.param->value;
      ASSERT_EQ(value.dtype, entry.param->is_matrix ? DType::kBF16 : DType::kF32) << entry.name;
      Tensor rounded(value.dtype, value.shape);
      convert(entry.weight.view(), rounded.view());
      EXPECT_EQ(std::memcmp(value.data, rounded.view().data, rounded.bytes()), 0) << entry.name;
    }
  };
  parameters.load(golden_.directory());
  expect_rounded();
  const Packed packed(golden_.rows("input_ids"));
  const Batch batch = packed.batch();
  const std::vector<std::int32_t> labels = golden_.ids("labels");
  std::vector<float> loss(labels.size());
  parameters.gradients().zero(ctx);
  parameters.model().forward_backward(ctx, batch.input_ids, Sequences(batch.cu_seqlens), labels,
                                      1.0F / static_cast<float>(labels.size()), loss,
                                      parameters.gradients(), {});
  const double mean =
      std::accumulate(loss.begin(), loss.end(), 0.0) / static_cast<double>(loss.size());
  // A rounding of bfloat16 is 2^-9 at most; losses are logarithms of a few hundred classes.
  EXPECT_NEAR(mean, golden_.floats("train.loss")[0], 0x1p-9 * mean);
  parameters.step({.betas = {0.9, 0.95}, .eps = 1e-8, .weight_decay = 0.1}, 1e-3, 1.0, 1);
  expect_rounded();
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden5Steps, testing::ValuesIn(Golden::cases()),
                         Golden::test_name);

}  // namespace
}  // namespace deltafox::test
