// Gradients of whole models: against the official code's in float64, with and without
// recomputation, and on any number of threads.
#include <gtest/gtest.h>

#include <cmath>

#include "io/json.h"
#include "model/gradients.h"
#include "model/loader.h"
#include "model/registry.h"
#include "support/golden.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using test::Golden;

class GoldenGradients : public testing::TestWithParam<std::string> {
 protected:
  struct Result {
    std::vector<float> loss;
    Gradients gradients;
  };

  // Of the mean loss of the golden batch.
  Result run(bool recompute, int num_threads = 2) {
    ThreadPool threads(num_threads);
    Context ctx(threads);
    const std::vector<std::int32_t> ids = golden_.ids("input_ids");
    Result result{.loss = std::vector<float>(ids.size()), .gradients = Gradients(model_)};
    const test::Packed packed(golden_.rows("input_ids"));
    model_.forward_backward(ctx, ids, Sequences(packed.batch().cu_seqlens), golden_.ids("labels"),
                            1 / static_cast<float>(ids.size()), result.loss, result.gradients,
                            {.recompute = recompute});
    return result;
  }

  Golden golden_{GetParam()};
  CausalLM model_ = build_model(io::JsonObject::parse(
      test::read_file(golden_.directory() + "/config.json"), golden_.directory()));
  io::Checkpoint checkpoint_ = io::Checkpoint::open(golden_.directory());
  ThreadPool threads_{1};
  std::vector<Tensor> buffers_ = bind_params(model_, checkpoint_, DType::kF32, threads_);
};

TEST_P(GoldenGradients, EqualTheOfficialOnes) {
  const Result result = run(false);
  const std::span<const float> loss = golden_.floats("loss");
  for (std::size_t t = 0; t < loss.size(); ++t) ASSERT_NEAR(result.loss[t], loss[t], 1e-5F) << t;
  for (const Gradients::Entry& entry : result.gradients.entries()) {
    const std::span<const float> expected = golden_.floats("grad." + entry.name);
    ASSERT_EQ(static_cast<std::int64_t>(expected.size()), entry.param->shape.size());
    double squares = 0;
    double errors = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double error = static_cast<double>(entry.value.f32()[i]) - expected[i];
      squares += static_cast<double>(expected[i]) * expected[i];
      errors += error * error;
    }
    EXPECT_LE(std::sqrt(errors), 1e-4 * std::sqrt(squares)) << entry.name;
  }
}

TEST_P(GoldenGradients, AreTheSameBitsWithRecomputationAndOnAnyNumberOfThreads) {
  const Result kept = run(false, 1);
  const Result recomputed = run(true, 3);
  EXPECT_EQ(kept.loss, recomputed.loss);
  for (std::size_t p = 0; p < kept.gradients.entries().size(); ++p) {
    const Gradients::Entry& expected = kept.gradients.entries()[p];
    const Gradients::Entry& got = recomputed.gradients.entries()[p];
    for (std::int64_t i = 0; i < expected.param->shape.size(); ++i) {
      ASSERT_EQ(got.value.f32()[i], expected.value.f32()[i]) << expected.name << " element " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenGradients, testing::ValuesIn(Golden::cases()),
                         Golden::test_name);

}  // namespace
}  // namespace deltafox
