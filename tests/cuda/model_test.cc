// Whole models on the GPU: golden cases in float32, bfloat16 against the CPU with the same weights,
// and what is said to be equal to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "core/float_convert.h"
#include "deltafox/error.h"
#include "deltafox/model.h"
#include "io/safetensors.h"
#include "model/quantize.h"
#include "ops/quantize.h"
#include "support/golden.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using test::Golden;
using test::Packed;

constexpr DType kForms[] = {DType::kF32, DType::kBF16, DType::kQ8, DType::kQ4};

double relative_error(std::span<const float> got, std::span<const float> expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - expected[i], 2);
    norm += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(error / norm);
}

std::vector<float> logits_of(const Model& model,
                             const std::vector<std::vector<std::int32_t>>& rows) {
  std::vector<State> states(rows.size(), model.new_state());
  std::vector<float> all;
  const Packed packed(rows);
  model.logits(packed.batch(), test::pointers(states),
               [&](std::int64_t, std::int64_t count, const float* logits) {
                 all.insert(all.end(), logits, logits + count * model.info().vocab_size);
               });
  return all;
}

class CudaModel : public testing::TestWithParam<std::string> {
 protected:
  Model load(Device device, DType dtype) const {
    return Model::load(golden_.directory(), {.dtype = dtype, .threads = 1, .device = device});
  }
  Golden golden_{GetParam()};
  std::vector<std::vector<std::int32_t>> rows_ = golden_.rows("input_ids");
};

TEST_P(CudaModel, Float32MatchesTheOfficialCode) {
  const std::vector<float> got = logits_of(load(Device::kCuda, DType::kF32), rows_);
  EXPECT_LE(relative_error(got, golden_.floats("logits")), 1e-4);
}

// Each of some eight activations a layer is rounded once, each rounding ε of its size; at worst
// they add up along the depth.
TEST_P(CudaModel, BFloat16IsOffByTheRoundingOfActivations) {
  const Model gpu = load(Device::kCuda, DType::kBF16);
  const std::vector<float> got = logits_of(gpu, rows_);
  const std::vector<float> expected = logits_of(load(Device::kCpu, DType::kBF16), rows_);
  EXPECT_LE(relative_error(got, expected),
            8 * static_cast<double>(gpu.info().num_hidden_layers + 1) * 0x1p-8);
}

// The float32 checkpoint of the weights that a packed one stands for.
void write_unpacked(const std::string& original, const std::string& packed, const std::string& to) {
  const auto from = io::Checkpoint::open(packed);
  const auto shapes = io::Checkpoint::open(original);
  std::vector<io::TensorDeclaration> declarations;
  for (const std::string& name : shapes.names()) {
    declarations.push_back({name, DType::kF32, shapes.view(name).shape});
  }
  std::filesystem::create_directories(to);
  io::SafetensorsWriter writer(to + "/model.safetensors", declarations, {{"format", "pt"}});
  for (const io::TensorDeclaration& tensor : declarations) {
    Tensor values(DType::kF32, tensor.shape);
    if (from.contains(tensor.name)) {
      convert(from.view(tensor.name), values.view());
    } else {
      const bool eight = from.contains(packed_name(tensor.name, DType::kQ8));
      const DType form = eight ? DType::kQ8 : DType::kQ4;
      const ConstTensorView matrix{from.view(packed_name(tensor.name, form)).data, form,
                                   tensor.shape};
      for (std::int64_t n = 0; n < tensor.shape[0]; ++n) {
        cpu::dequantize_row(matrix, n, values.f32() + n * tensor.shape[1]);
      }
    }
    writer.write(tensor.name, {static_cast<const std::byte*>(values.view().data), values.bytes()});
  }
  writer.finish();
  std::filesystem::copy_file(original + "/config.json", to + "/config.json");
}

// Against the CPU in float32 with the values of the packed weights: some eight activations and
// seven matrices a layer are rounded to bfloat16. Against the CPU with packed weights: that rounds
// activations to 8 bits, a step being 1/127 of the largest of a block, of which a step/√12 is usual
// and the largest four times as large as most.
TEST_P(CudaModel, PackedWeightsAreOffByTheRoundingOfActivations) {
  for (const DType dtype : {DType::kQ8, DType::kQ4}) {
    SCOPED_TRACE(name_of(dtype));
    const test::TemporaryDirectory directory;
    const std::string packed = directory.path("packed");
    write_quantized(golden_.directory(), packed, {.dtype = dtype, .threads = 1, .on_progress = {}});
    write_unpacked(golden_.directory(), packed, directory.path("unpacked"));
    const auto load_from = [](const std::string& from, Device device) {
      return Model::load(from, {.threads = 1, .device = device});
    };
    const std::vector<float> got = logits_of(load_from(packed, Device::kCuda), rows_);
    EXPECT_EQ(logits_of(load(Device::kCuda, dtype), rows_), got) << "packed while loading";
    const Model exact = load_from(directory.path("unpacked"), Device::kCpu);
    const double layers = static_cast<double>(exact.info().num_hidden_layers + 1);
    EXPECT_LE(relative_error(got, logits_of(exact, rows_)), (8 + 7) * layers * 0x1p-8);
    EXPECT_LE(relative_error(got, logits_of(load_from(packed, Device::kCpu), rows_)),
              ((8 + 7) * 0x1p-8 + 8 * 4 / (127 * std::sqrt(12.0))) * layers);
  }
}

TEST_P(CudaModel, PackedWeightsGiveNoGradients) {
  const Model model = load(Device::kCuda, DType::kQ8);
  const Packed packed({rows_[0]});
  std::vector<float> loss(rows_[0].size());
  EXPECT_THROW(
      model.loss_and_gradients(packed.batch(), rows_[0], loss, [](const auto&, auto, auto) {}),
      Error);
}

TEST_P(CudaModel, StepsEqualTheWholeToRounding) {
  for (const DType dtype : kForms) {
    const Model model = load(Device::kCuda, dtype);
    const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
    const std::vector<float> whole = logits_of(model, {rows_[0]});
    State state = model.new_state();
    State* pointer = &state;
    std::vector<float> stepped;
    std::vector<float> row(vocab);
    for (const std::int32_t id : rows_[0]) {
      model.step({&id, 1}, {&pointer, 1}, row);
      stepped.insert(stepped.end(), row.begin(), row.end());
    }
    const double layers = static_cast<double>(model.info().num_hidden_layers + 1);
    EXPECT_LE(relative_error(stepped, whole),
              dtype == DType::kF32 ? 1e-4 : 2 * (is_packed(dtype) ? 15 : 8) * layers * 0x1p-8);
  }
}

TEST_P(CudaModel, AStepDoesNotDependOnTheBatch) {
  for (const DType dtype : kForms) {
    const Model model = load(Device::kCuda, dtype);
    const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
    constexpr std::size_t kBatch = 11;
    std::vector<State> states(kBatch, model.new_state());
    std::vector<State> alone(kBatch, model.new_state());
    const std::vector<State*> pointers = test::pointers(states);
    std::vector<std::int32_t> ids(kBatch);
    std::vector<float> logits(kBatch * vocab);
    std::vector<float> row(vocab);
    for (int t = 0; t < 3; ++t) {
      for (std::size_t b = 0; b < kBatch; ++b) {
        ids[b] = rows_[0][(b * 3 + static_cast<std::size_t>(t)) % rows_[0].size()];
      }
      model.step(ids, pointers, logits);
      for (const std::size_t b : {std::size_t{0}, std::size_t{9}}) {
        State* pointer = &alone[b];
        model.step({&ids[b], 1}, {&pointer, 1}, row);
        EXPECT_TRUE(std::equal(row.begin(), row.end(),
                               logits.begin() + static_cast<std::ptrdiff_t>(b * vocab)));
      }
    }
  }
}

TEST_P(CudaModel, RecordedGreedyStepsEqualStepsAndSavedStatesGoOn) {
  const test::TemporaryDirectory directory;
  for (const DType dtype : kForms) {
    const Model model = load(Device::kCuda, dtype);
    const auto vocab = static_cast<std::ptrdiff_t>(model.info().vocab_size);
    State state = model.new_state();
    State fork = state;
    State* pointer = &state;
    std::int32_t id = rows_[0][0];
    std::vector<std::int32_t> chosen;
    model.greedy({&id, 1}, {&pointer, 1}, 9, [&](std::int64_t, std::span<const std::int32_t> ids) {
      chosen.push_back(ids[0]);
    });
    EXPECT_EQ(state.position(), 9);
    std::vector<std::int32_t> expected;
    std::vector<float> row(static_cast<std::size_t>(vocab));
    pointer = &fork;
    for (int t = 0; t < 9; ++t) {
      if (t == 4) {
        const std::string path = directory.path("state");
        model.save_state(fork, path);
        fork = model.load_state(path);
      }
      model.step({&id, 1}, {&pointer, 1}, row);
      id = static_cast<std::int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
      expected.push_back(id);
    }
    EXPECT_EQ(chosen, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, CudaModel, testing::ValuesIn(Golden::cases()), Golden::test_name);

}  // namespace
}  // namespace deltafox
