// Damaged checkpoints: each is refused with one line that names the file, tensor or key.
#include <gtest/gtest.h>

#include "apps/checkpoints.h"
#include "apps/program.h"

namespace deltafox::test {
namespace {

constexpr const char* kTensor = "model.layers.0.attn.q_proj.weight";

void expect_refused(const CheckpointCopy& checkpoint, const std::vector<std::string>& culprits) {
  // The one reads the whole model, the other only looks at it.
  expect_refusal(
      run_program({"generate", "--model", checkpoint.path(), "--input-ids", "1,2", "--output-ids"}),
      culprits);
  expect_refusal(run_program({"info", "--model", checkpoint.path()}), culprits);
}

void expect_config_refused(const char* key, const nlohmann::json& value) {
  SCOPED_TRACE(key + (" = " + value.dump()));
  const CheckpointCopy checkpoint;
  checkpoint.edit_config([&](nlohmann::json& config) { config[key] = value; });
  expect_refused(checkpoint, {"config.json", key});
}

TEST(DamagedCheckpoint, WholeOneIsAccepted) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json&) {});
  checkpoint.edit_config([](nlohmann::json&) {});
  expect_success(run_program({"info", "--model", checkpoint.path()}));
}

TEST(DamagedCheckpoint, MissingTensor) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json& header) {
    header["renamed"] = header.at(kTensor);
    header.erase(kTensor);
  });
  expect_refused(checkpoint, {kTensor, "missing"});
}

TEST(DamagedCheckpoint, GapWhereATensorWas) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json& header) { header.erase(kTensor); });
  expect_refused(checkpoint, {"model.safetensors"});
}

TEST(DamagedCheckpoint, TruncatedTensor) {
  const CheckpointCopy checkpoint;
  const std::string path = checkpoint.path("model.safetensors");
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1000);
  expect_refused(checkpoint, {"model.safetensors"});
}

TEST(DamagedCheckpoint, TruncatedHeader) {
  for (const std::uintmax_t bytes : {0, 3, 8, 100}) {
    const CheckpointCopy checkpoint;
    std::filesystem::resize_file(checkpoint.path("model.safetensors"), bytes);
    expect_refused(checkpoint, {"model.safetensors"});
  }
}

TEST(DamagedCheckpoint, OverlappingTensors) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json& header) {
    header[kTensor]["data_offsets"] =
        header.at("model.layers.0.attn.k_proj.weight").at("data_offsets");
  });
  expect_refused(checkpoint, {"model.safetensors", "tensor"});
}

TEST(DamagedCheckpoint, MisshapedTensor) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json& header) { header[kTensor]["shape"] = {32, 128}; });
  expect_refused(checkpoint, {"model.safetensors", kTensor, "[32, 128]"});
}

TEST(DamagedCheckpoint, ShapeThatDoesNotFitTheBytes) {
  for (const nlohmann::json& shape :
       {nlohmann::json{64, 65}, nlohmann::json{std::int64_t{1} << 62, 8},
        nlohmann::json{-64, -64}}) {
    const CheckpointCopy checkpoint;
    checkpoint.edit_header([&](nlohmann::json& header) { header[kTensor]["shape"] = shape; });
    expect_refused(checkpoint, {"model.safetensors", kTensor});
  }
}

TEST(DamagedCheckpoint, WronglyTypedTensor) {
  for (const char* dtype : {"I32", "F64", "Q7"}) {
    const CheckpointCopy checkpoint;
    checkpoint.edit_header([&](nlohmann::json& header) { header[kTensor]["dtype"] = dtype; });
    expect_refused(checkpoint, {"model.safetensors", kTensor});
  }
}

TEST(DamagedCheckpoint, UnknownTensor) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_header([](nlohmann::json& header) {
    header["stranger"] = {{"dtype", "F32"}, {"shape", {0}}, {"data_offsets", {0, 0}}};
  });
  expect_refused(checkpoint, {"model.safetensors", "stranger"});
}

TEST(DamagedCheckpoint, HeaderLengthBeyondTheFile) {
  const CheckpointCopy checkpoint;
  for (const std::uint64_t length : {std::uint64_t{1} << 60, ~std::uint64_t{0}}) {
    checkpoint.write("model.safetensors", CheckpointCopy::with_length(length, "{}"));
    expect_refused(checkpoint, {"model.safetensors", "header"});
  }
}

TEST(DamagedCheckpoint, HeaderThatIsNotJson) {
  const CheckpointCopy checkpoint;
  for (const std::string header : {"{\"a\": ", "\xff\xfe\xfd\xfc", "[1, 2]", "null", "not json"}) {
    checkpoint.write("model.safetensors", CheckpointCopy::with_length(header.size(), header));
    expect_refused(checkpoint, {"model.safetensors"});
  }
}

TEST(DamagedCheckpoint, NoWeights) {
  const CheckpointCopy checkpoint;
  std::filesystem::remove(checkpoint.path("model.safetensors"));
  expect_refused(checkpoint, {checkpoint.path(), "model.safetensors"});
}

TEST(DamagedCheckpoint, ConfigThatIsMissingOrNotJson) {
  const CheckpointCopy checkpoint;
  for (const std::string text : {"", "{", "[]", "{\"hidden_size\": 64,}", "\xff"}) {
    checkpoint.write("config.json", text);
    expect_refused(checkpoint, {"config.json"});
  }
  std::filesystem::remove(checkpoint.path("config.json"));
  expect_refused(checkpoint, {"config.json"});
}

TEST(DamagedCheckpoint, AnotherModelType) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_config([](nlohmann::json& config) { config["model_type"] = "llama"; });
  expect_refused(checkpoint, {"config.json", "model_type", "llama"});
}

TEST(DamagedCheckpoint, ImpossibleSizes) {
  expect_config_refused("hidden_size", 0);
  expect_config_refused("hidden_size", -64);
  expect_config_refused("hidden_size", std::int64_t{1} << 40);
  expect_config_refused("hidden_size", "64");
  expect_config_refused("hidden_size", 64.5);
  expect_config_refused("num_heads", 0);
  expect_config_refused("num_heads", 3);
  expect_config_refused("num_hidden_layers", 1 << 30);
  expect_config_refused("vocab_size", 0);
  expect_config_refused("conv_size", 0);
  expect_config_refused("qk_norm", "l3");
  expect_config_refused("eos_token_id", 256);
}

TEST(DamagedCheckpoint, SizesOfAnotherModel) {
  const CheckpointCopy checkpoint;
  checkpoint.edit_config([](nlohmann::json& config) { config["hidden_size"] = 128; });
  expect_refused(checkpoint, {"model.safetensors", "shape"});
}

TEST(DamagedCheckpoint, TokenizerFiles) {
  const auto tokenize = [](const CheckpointCopy& checkpoint) {
    return run_program({"tokenize", "--model", checkpoint.path(), "abc"});
  };
  const CheckpointCopy checkpoint;
  expect_refusal(tokenize(checkpoint), {checkpoint.path(), "vocab.json"});
  checkpoint.add_byte_tokenizer();
  expect_success(tokenize(checkpoint));
  checkpoint.write("merges.txt", "#version: 0.2\nthere is nothing\n");
  expect_refusal(tokenize(checkpoint), {"merges.txt", "2"});
  checkpoint.write("vocab.json", "{\"a\": ");
  expect_refusal(tokenize(checkpoint), {"vocab.json"});
}

}  // namespace
}  // namespace deltafox::test
