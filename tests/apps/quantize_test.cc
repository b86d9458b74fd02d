// deltafox quantize, and reading what it writes.
#include <gtest/gtest.h>

#include <cmath>

#include "apps/checkpoints.h"
#include "apps/program.h"
#include "io/safetensors.h"

namespace deltafox::test {
namespace {

// Wide enough for matrices to be packed.
constexpr const char* kConfig = R"({"model_type": "delta_net-project_fox", "vocab_size": 96,
  "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 192,
  "bos_token_id": null, "eos_token_id": null})";

class Quantize : public testing::Test {
 protected:
  Quantize() {
    directory_.write("config.json", kConfig);
    directory_.write("model/tokenizer_config.json", "{}");
    expect_success(run_program({"init", "--config", directory_.path("config.json"), "--output",
                                directory_.path("model")}));
  }

  std::string quantized(const std::string& dtype) const {
    expect_success(run_program({"quantize", "--model", directory_.path("model"), "--output",
                                directory_.path(dtype), "--dtype", dtype}));
    return directory_.path(dtype);
  }
  std::vector<float> logits(const std::string& model, const std::string& dtype = "auto") const {
    const std::string out = directory_.path("logits.safetensors");
    expect_success(run_program({"logits", "--model", model, "--dtype", dtype, "--input-ids",
                                "5,17,3,88,41,2,70", "--output", out}));
    return read_floats(out, "logits");
  }

  TemporaryDirectory directory_;
};

TEST_F(Quantize, GivesWhatQuantisingAtLoadGives) {
  for (const char* dtype : {"bfloat16", "int8", "int4"}) {
    EXPECT_EQ(logits(quantized(dtype)), logits(directory_.path("model"), dtype)) << dtype;
  }
}

TEST_F(Quantize, StaysCloseToTheWeights) {
  const std::vector<float> exact = logits(directory_.path("model"), "float32");
  float largest = 0;
  for (const float value : exact) largest = std::max(largest, std::abs(value));
  // Errors of weights, relative to their deviation: 2⁻⁹, 0.7% and 9%; those of activations and of
  // each of some ten products in a row add to them, those of 128 terms average out.
  const std::pair<const char*, float> tolerances[] = {
      {"bfloat16", 0.02F}, {"int8", 0.05F}, {"int4", 0.5F}};
  for (const auto& [dtype, tolerance] : tolerances) {
    const std::vector<float> close = logits(directory_.path("model"), dtype);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      ASSERT_NEAR(close[i], exact[i], tolerance * largest) << dtype;
    }
    EXPECT_NE(close, exact);
  }
}

TEST_F(Quantize, PacksMatricesAndCopiesTheTokenizer) {
  const auto file = io::SafetensorsFile::open(quantized("int4") + "/model.safetensors");
  EXPECT_TRUE(file.contains("model.layers.0.attn.q_proj.weight.q4"));
  EXPECT_TRUE(file.contains("model.embeddings.weight.q8"));
  EXPECT_EQ(file.view("model.layers.0.attn.b_proj.weight").dtype, DType::kBF16);
  EXPECT_EQ(file.view("model.norm.weight").dtype, DType::kF32);
  EXPECT_EQ(read_file(directory_.path("int4/tokenizer_config.json")), "{}");
}

TEST_F(Quantize, RefusesWhatIsQuantisedAlready) {
  const std::string int8 = quantized("int8");
  expect_refusal(run_program({"quantize", "--model", int8, "--output", directory_.path("again"),
                              "--dtype", "int4"}),
                 {"config.json", "quantised already"});
  expect_refusal(run_program({"info", "--model", int8, "--dtype", "float32"}),
                 {"model.embeddings.weight.q8", "cannot be kept in another dtype"});
  expect_refusal(run_program({"quantize", "--model", directory_.path("model"), "--output",
                              directory_.path("other"), "--dtype", "float16"}),
                 {"--dtype", "float16"});
}

TEST_F(Quantize, RefusesSchemesItDoesNotKnow) {
  const std::string int8 = quantized("int8");
  const std::string path = int8 + "/config.json";
  const auto refuse = [&](const std::string& key, const nlohmann::json& value,
                          const std::string& culprit) {
    auto config = nlohmann::json::parse(read_file(path));
    config["quantization_config"][key] = value;
    const std::string before = read_file(path);
    directory_.write("int8/config.json", config.dump());
    expect_refusal(run_program({"info", "--model", int8}), {"config.json", culprit});
    directory_.write("int8/config.json", before);
  };
  refuse("quant_method", "gptq", "gptq");
  refuse("version", 2, "quantization_config.version");
  refuse("weights", "int3", "int3");
}

TEST_F(Quantize, RefusesPackedTensorsOfAnotherSize) {
  const std::string int8 = quantized("int8");
  auto config = nlohmann::json::parse(read_file(int8 + "/config.json"));
  config["hidden_size"] = 64;
  directory_.write("int8/config.json", config.dump());
  expect_refusal(run_program({"info", "--model", int8}), {"model.embeddings.weight.q8", "U8"});
}

}  // namespace
}  // namespace deltafox::test
