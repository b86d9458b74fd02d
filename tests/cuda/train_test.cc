// Training on the GPU: gradients and steps of the official code, with recomputation and without,
// interrupted and not.
#include <gmock/gmock.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "cuda/gpu.h"
#include "io/json.h"
#include "model/registry.h"
#include "ops/adamw.h"
#include "support/golden.h"
#include "support/training.h"
#include "train/parameters.h"

namespace deltafox {
namespace {

using test::error_of;
using test::Golden;
using train::Parameters;

// A batch in the GPU's memory.
class DeviceBatch {
 public:
  DeviceBatch(const std::vector<std::vector<std::int32_t>>& rows,
              const std::vector<std::int32_t>& labels)
      : packed_(rows), ids_(upload(packed_.batch().input_ids)), labels_(upload(labels)) {
    loss_ = Tensor(DType::kF32, ids_.view().shape, Device::kCuda);
  }

  // Adds the gradients of the mean loss, and returns the losses.
  std::vector<float> add_gradients(Context& ctx, Parameters& parameters, bool recompute = false) {
    std::vector<float> loss(static_cast<std::size_t>(loss_.view().shape.size()));
    parameters.model().forward_backward(ctx, span_of(ids_), Sequences(packed_.batch().cu_seqlens),
                                        span_of(labels_), 1 / static_cast<float>(loss.size()),
                                        {loss_.f32(), loss.size()}, parameters.gradients(),
                                        {.recompute = recompute});
    ctx.copy(loss.data(), loss_.view().data, loss_.bytes());
    ctx.synchronize();
    return loss;
  }

  void add_gradients_on_cpu(Context& ctx, Parameters& parameters) const {
    const Batch batch = packed_.batch();
    std::vector<float> loss(batch.input_ids.size());
    std::vector<std::int32_t> labels(loss.size());
    labels_.write_to(labels.data());
    parameters.model().forward_backward(ctx, batch.input_ids, Sequences(batch.cu_seqlens), labels,
                                        1 / static_cast<float>(loss.size()), loss,
                                        parameters.gradients(), {});
  }

 private:
  static Tensor upload(std::span<const std::int32_t> ids) {
    Tensor tensor(DType::kI32, {std::ssize(ids)}, Device::kCuda);
    tensor.read_from(ids.data());
    return tensor;
  }
  static std::span<const std::int32_t> span_of(Tensor& tensor) {
    return {static_cast<const std::int32_t*>(tensor.view().data),
            static_cast<std::size_t>(tensor.view().shape.size())};
  }

  test::Packed packed_;
  Tensor ids_, labels_, loss_;
};

std::vector<float> on_host(Context& ctx, const TensorView& tensor) {
  std::vector<float> host(static_cast<std::size_t>(tensor.shape.size()));
  ctx.copy(host.data(), tensor.data, host.size() * sizeof(float));
  ctx.synchronize();
  return host;
}

// ‖got − expected‖ / ‖expected‖, 0 where they are equal.
double relative_error(std::span<const float> got, std::span<const float> expected) {
  double squares = 0;
  double errors = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = static_cast<double>(got[i]) - expected[i];
    squares += static_cast<double>(expected[i]) * expected[i];
    errors += error * error;
  }
  return errors == 0 ? 0 : std::sqrt(errors / squares);
}

class CudaGradients : public testing::TestWithParam<std::string> {
 protected:
  Golden golden_{GetParam()};
  std::string config_ = test::read_file(golden_.directory() + "/config.json");
  DeviceBatch batch_{golden_.rows("input_ids"), golden_.ids("labels")};
};

TEST_P(CudaGradients, EqualTheOfficialOnes) {
  test::Gpu gpu(DType::kF32);
  Parameters parameters(gpu.ctx(), config_, {});
  parameters.load(golden_.directory());
  const std::vector<float> loss = batch_.add_gradients(gpu.ctx(), parameters);
  EXPECT_LE(relative_error(loss, golden_.floats("loss")), 1e-5);
  for (const Gradients::Entry& entry : parameters.gradients().entries()) {
    EXPECT_LE(relative_error(on_host(gpu.ctx(), entry.value), golden_.floats("grad." + entry.name)),
              1e-4)
        << entry.name;
  }
}

// Matrices off by errors of the size of bfloat16's roundings: uniform, up to half the distance of
// neighbouring numbers.
void disturb(Parameters& parameters, test::Random& random) {
  for (Parameters::Entry& entry : parameters.entries()) {
    if (!entry.param->is_matrix) continue;
    for (std::int64_t i = 0; i < entry.param->shape.size(); ++i) {
      float& w = entry.weight.f32()[i];
      if (w != 0) w += std::ldexp(random.uniform(-1, 1), std::ilogb(w) - 8);
    }
  }
}

// How far the norm of n independent normal errors goes beyond its root mean square once in a
// thousand: the root of a thousandth's quantile of chi squared over n, by Wilson and Hilferty.
double most_of_norm(std::size_t n) {
  const double variance = 2 / (9 * static_cast<double>(n));
  return std::pow(1 - variance + 3.09 * std::sqrt(variance), 1.5);
}

// What bfloat16 costs is measured by what errors of the matrices alone do to a float32 gradient:
// some eight activations for each matrix are rounded as well, with errors of the same size, and
// independent errors add up to the root of their number, three times those of the matrices. A
// gradient of two elements is 1% off by one draw of errors and 4% by the next: the unit is the root
// of the mean square of eight, and the bound what so many elements exceed once in a thousand.
TEST_P(CudaGradients, InBFloat16AreOffByAFewRoundings) {
  test::Gpu gpu(DType::kBF16);
  Parameters parameters(gpu.ctx(), config_, {});
  parameters.load(golden_.directory());
  const std::vector<float> loss = batch_.add_gradients(gpu.ctx(), parameters);
  EXPECT_LE(relative_error(loss, golden_.floats("loss")), 2e-2);
  const std::vector<Gradients::Entry>& entries = parameters.gradients().entries();
  std::vector<double> squares(entries.size());
  constexpr int kDraws = 8;
  test::Random random(1);
  for (int draw = 0; draw < kDraws; ++draw) {
    Parameters disturbed(gpu.cpu(), config_, {});
    disturbed.load(golden_.directory());
    disturb(disturbed, random);
    batch_.add_gradients_on_cpu(gpu.cpu(), disturbed);
    for (std::size_t i = 0; i < entries.size(); ++i) {
      const TensorView gradient = disturbed.gradients().entries()[i].value;
      const double error =
          relative_error(on_host(gpu.cpu(), gradient), golden_.floats("grad." + entries[i].name));
      squares[i] += error * error / kDraws;
    }
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const double unit = std::sqrt(squares[i]);
    const auto numbers = static_cast<std::size_t>(entries[i].value.shape.size());
    EXPECT_LE(relative_error(on_host(gpu.ctx(), entries[i].value),
                             golden_.floats("grad." + entries[i].name)),
              std::max(2e-2, 3 * unit * most_of_norm(numbers)))
        << entries[i].name << ", by errors of the matrices alone: " << unit;
  }
}

TEST_P(CudaGradients, AreTheSameBitsWithRecomputationAndWhenComputedAgain) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    test::Gpu gpu(dtype);
    Parameters parameters(gpu.ctx(), config_, {});
    parameters.load(golden_.directory());
    const std::vector<float> loss = batch_.add_gradients(gpu.ctx(), parameters);
    std::vector<std::vector<float>> expected;
    for (const Gradients::Entry& entry : parameters.gradients().entries()) {
      expected.push_back(on_host(gpu.ctx(), entry.value));
    }
    for (const bool recompute : {true, false}) {
      parameters.gradients().zero(gpu.ctx());
      EXPECT_EQ(batch_.add_gradients(gpu.ctx(), parameters, recompute), loss);
      std::size_t i = 0;
      for (const Gradients::Entry& entry : parameters.gradients().entries()) {
        EXPECT_EQ(on_host(gpu.ctx(), entry.value), expected[i++])
            << entry.name << " " << name_of(dtype);
      }
    }
  }
}

TEST_P(CudaGradients, OfALoadedModelAreThose) {
  const Model model = Model::load(golden_.directory(),
                                  {.dtype = DType::kF32, .threads = 1, .device = Device::kCuda});
  const test::Packed packed(golden_.rows("input_ids"));
  const std::vector<std::int32_t> labels = golden_.ids("labels");
  std::vector<float> loss(labels.size());
  int count = 0;
  model.loss_and_gradients(
      packed.batch(), labels, loss,
      [&](const std::string& name, std::span<const std::int64_t>, std::span<const float> got) {
        EXPECT_LE(relative_error(got, golden_.floats("grad." + name)), 1e-4) << name;
        ++count;
      });
  EXPECT_GT(count, 0);
  EXPECT_LE(relative_error(loss, golden_.floats("loss")), 1e-4);
}

TEST_P(CudaGradients, FiveStepsGiveTheOfficialLossesAndNorms) {
  test::Gpu gpu(DType::kF32);
  Parameters parameters(gpu.ctx(), config_, {});
  parameters.load(golden_.directory());
  const train::OptimizerConfig optimizer{.betas = {0.9, 0.95}, .eps = 1e-8, .weight_decay = 0.1};
  for (int s = 0; s < 5; ++s) {
    parameters.gradients().zero(gpu.ctx());
    const std::vector<float> loss = batch_.add_gradients(gpu.ctx(), parameters);
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
    if (!entry.trained) continue;
    norms[entry.name] = std::sqrt(ops::sum_of_squares(gpu.ctx(), entry.weight.view()));
  }
  const std::span<const float> expected = golden_.floats("train.param_norms");
  ASSERT_EQ(norms.size(), expected.size());
  std::size_t i = 0;
  for (const auto& [name, norm] : norms) {
    EXPECT_NEAR(norm, expected[i], 1e-4 * expected[i]) << name;
    ++i;
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, CudaGradients, testing::ValuesIn(Golden::cases()),
                         Golden::test_name);

// Options of DeltaNet that no golden case has, against the CPU.
class CudaDeltaNetOptions : public testing::TestWithParam<std::string> {
 protected:
  // The gradients of random weights and ids, one tensor after the other.
  std::vector<std::vector<float>> gradients(Context& ctx) const {
    auto config = nlohmann::ordered_json::parse(preset_config("delta_net-125m"));
    config.update({{"vocab_size", 61}, {"hidden_size", 48}, {"num_hidden_layers", 2}});
    config.update({{"num_heads", 3}, {"intermediate_size", 40}});
    config.update(nlohmann::ordered_json::parse(GetParam()));
    Parameters parameters(ctx, config.dump(), {});
    parameters.initialise(1);
    const std::vector<std::int64_t> cu_seqlens{0, 1, 90, 157};
    Tensor ids(DType::kI32, {157}, ctx.device());
    Tensor loss(DType::kF32, {157}, ctx.device());
    std::vector<std::int32_t> values(157);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<std::int32_t>(i * i % 61);
    }
    ids.read_from(values.data());
    const std::span<const std::int32_t> span(static_cast<std::int32_t*>(ids.view().data), 157);
    parameters.model().forward_backward(ctx, span, Sequences(cu_seqlens), span, 1.0F / 157,
                                        {loss.f32(), 157}, parameters.gradients(), {});
    ctx.synchronize();
    std::vector<std::vector<float>> result;
    for (const Gradients::Entry& entry : parameters.gradients().entries()) {
      result.push_back(on_host(ctx, entry.value));
    }
    return result;
  }
};

TEST_P(CudaDeltaNetOptions, GiveTheGradientsOfTheCpu) {
  test::Gpu gpu(DType::kF32);
  const auto got = gradients(gpu.ctx());
  const auto expected = gradients(gpu.cpu());
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_LE(relative_error(got[i], expected[i]), 1e-4) << "parameter " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Options, CudaDeltaNetOptions,
                         testing::Values(R"({"norm_first": true, "tie_word_embeddings": true})",
                                         R"({"use_short_conv": false, "use_beta": false})",
                                         R"({"use_gate": true, "qk_activation": "relu"})"));

// The training loop, float32 and bf16-mixed.
class CudaTraining : public test::Training, public testing::WithParamInterface<const char*> {
 protected:
  CudaTraining() : Training(Device::kCuda) {}
  train::Config config(const std::string& run, std::vector<std::string> overrides = {}) const {
    overrides.push_back(std::string("fabric.precision=") + GetParam());
    return Training::config(run, overrides);
  }
};

TEST_P(CudaTraining, LearnsAShortTextByHeart) {
  const std::vector<double> losses = train(config("run"), 2);
  EXPECT_GT(losses.front(), 5);
  EXPECT_LT(losses.back(), 0.1);
}

TEST_P(CudaTraining, InterruptedAndResumedIsAsUninterrupted) {
  const std::vector<std::string> short_run{"train.max_tokens=3072", "train.grad_acc_tokens=64"};
  const std::vector<double> whole = train(config("whole", short_run), 2);
  std::vector<double> parts = train(config("parts", short_run), 1, 3 * 256);
  auto recomputing = short_run;
  recomputing.emplace_back("train.gradient_checkpointing=true");
  const std::vector<double> more = train(config("parts", recomputing), 2);
  parts.insert(parts.end(), more.begin(), more.end());
  EXPECT_EQ(parts, whole);
  EXPECT_EQ(test::read_file(directory_.path("parts/model/model.safetensors")),
            test::read_file(directory_.path("whole/model/model.safetensors")));
  EXPECT_EQ(log("parts", "train_eval"), log("whole", "train_eval"));
}

TEST_P(CudaTraining, StopsWithTheStepAndTheLastGoodCheckpoint) {
  train(config("run", {"train.max_tokens=2560"}), 2, 512);
  const std::string error = error_of([&] {
    train(config("run", {"train.max_tokens=2560", "schedule.peak_value=1e6",
                         "schedule.init_value=1e6", "optimizer.weight_decay=1e6"}),
          2);
  });
  EXPECT_THAT(error, testing::MatchesRegex("step .* \\(after .* tokens\\): the .* is .*nan.*"));
  EXPECT_THAT(error, testing::HasSubstr("step-000000000000512.safetensors"));
}

INSTANTIATE_TEST_SUITE_P(Precisions, CudaTraining, testing::Values("32-true", "bf16-mixed"),
                         [](const auto& p) {
                           return std::string(p.param) == "32-true" ? "Float32" : "BF16Mixed";
                         });

class CudaAndCpuTraining : public test::Training {
 protected:
  CudaAndCpuTraining() : Training(Device::kCuda) {}
};

// As sums have other orders, runs part slowly: rounding of 2^-24 grows some thousandfold.
TEST_F(CudaAndCpuTraining, GoTheSameWayAndValidateAlike) {
  const std::vector<std::string> overrides{"train.max_tokens=1280", "skip_eval=false",
                                           "eval_interval=1280", "eval.min_val_length=8"};
  const std::vector<double> on_gpu = train(config("gpu", overrides), 2);
  device_ = Device::kCpu;
  const std::vector<double> on_cpu = train(config("cpu", overrides), 2);
  ASSERT_EQ(on_gpu.size(), on_cpu.size());
  for (std::size_t i = 0; i < on_gpu.size(); ++i) EXPECT_NEAR(on_gpu[i], on_cpu[i], 1e-3);
  const auto loss = [&](const char* run) {
    return log(run, "val").at(0).at("val/loss").get<double>();
  };
  EXPECT_NEAR(loss("gpu"), loss("cpu"), 1e-3);
}

}  // namespace
}  // namespace deltafox
