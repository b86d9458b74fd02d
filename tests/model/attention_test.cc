// The Forgetting Transformer and the Transformer: every option against a plain float64 model,
// growing states, pruning, presets, configurations of flash-linear-attention, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/float_convert.h"
#include "deltafox/error.h"
#include "deltafox/model.h"
#include "model/init.h"
#include "model/registry.h"
#include "support/golden.h"
#include "support/plain_transformer.h"
#include "support/random.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using nlohmann::json;

std::string config_of(const char* model_type, const json& options) {
  json config{{"model_type", model_type},
              {"vocab_size", 61},
              {"hidden_size", 48},
              {"num_heads", 4},
              {"num_hidden_layers", 2},
              {"intermediate_size", 32},
              // Large, so that gates and scores are far from constant.
              {"initializer_range", 0.3}};
  config.update(options);
  return config.dump();
}

std::vector<std::int32_t> random_ids(std::uint32_t seed, std::int64_t count, std::int64_t vocab) {
  test::Random random(seed);
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t < count; ++t) {
    ids.push_back(static_cast<std::int32_t>(random.integer(0, vocab - 1)));
  }
  return ids;
}

std::vector<float> logits(const Model& model, State& state, std::vector<std::int32_t> ids) {
  std::vector<State> states{state};
  std::vector<float> result = test::logits(model, {std::move(ids)}, states);
  state = states[0];
  return result;
}

// Copies a checkpoint with changed tensors: change(name, values).
template <typename Change>
void copy_checkpoint(const std::string& from, const std::string& to, Change&& change) {
  const io::SafetensorsFile file = io::SafetensorsFile::open(from + "/model.safetensors");
  std::vector<io::TensorDeclaration> tensors;
  std::map<std::string, Tensor> values;
  for (const io::TensorEntry& entry : file.tensors()) {
    Tensor tensor(DType::kF32, Shape(entry.shape));
    convert(file.view(entry.name), tensor.view());
    change(entry.name, std::span(tensor.f32(), entry.bytes / sizeof(float)));
    tensors.push_back({entry.name, DType::kF32, Shape(entry.shape)});
    values.emplace(entry.name, std::move(tensor));
  }
  io::SafetensorsWriter writer(to + "/model.safetensors", tensors);
  for (auto& [name, tensor] : values) {
    writer.write(name, std::as_bytes(std::span(tensor.f32(), tensor.bytes() / sizeof(float))));
  }
  writer.finish();
}

struct Variant {
  const char* name;
  const char* model_type;
  json options;
};

constexpr const char* kFox = "forgetting_transformer-project_fox";
constexpr const char* kTransformer = "transformer-project_fox";

std::vector<Variant> variants() {
  const json times{{"fgate_bias_init", true}, {"decay_time_min", 2}, {"decay_time_max", 50}};
  json bias{{"fgate_type", "bias_only"}};
  bias.update(times);
  json fixed{{"fgate_type", "fixed"}, {"use_output_norm", true}};
  fixed.update(times);
  return {
      {"defaults", kFox, json::object()},
      {"window_and_rope",
       kFox,
       {{"window_size", 70}, {"use_rope", true}, {"rope_base", 1000}, {"use_k_shift", true}}},
      {"grouped_heads",
       kFox,
       {{"num_kv_heads", 2}, {"qk_norm", true}, {"use_k_shift", true}, {"use_v_shift", true}}},
      {"silu_gate_and_shared_norm",
       kFox,
       {{"use_output_gate", true},
        {"ogate_act", "silu"},
        {"qk_norm", true},
        {"qk_norm_share_param_across_head", true},
        {"use_v_shift", true}}},
      {"sigmoid_gates", kFox, {{"use_output_gate", true}, {"hidden_act", "sigmoid"}}},
      {"learned_bias", kFox, bias},
      {"fixed_gates_and_output_norm", kFox, fixed},
      {"no_gates_tied", kFox, {{"fgate_type", "none"}, {"tie_word_embeddings", true}}},
      {"transformer", kTransformer, {{"rope_base", 500}}},
      {"transformer_window", kTransformer, {{"window_size", 33}, {"num_kv_heads", 1}}},
      {"transformer_without_positions", kTransformer, {{"use_rope", false}}},
  };
}

class AttentionVariant : public testing::TestWithParam<Variant> {
 protected:
  AttentionVariant() { write_initialised(config_, directory_.path("model"), {}); }

  const test::TemporaryDirectory directory_;
  const std::string config_ = config_of(GetParam().model_type, GetParam().options);
  const std::vector<std::int32_t> ids_ = random_ids(3, 200, 61);
};

TEST_P(AttentionVariant, EqualsThePlainModel) {
  const Model model = Model::load(directory_.path("model"));
  State state = model.new_state();
  const std::vector<float> got = logits(model, state, ids_);
  const auto expected = test::PlainTransformer(directory_.path("model"), config_).logits(ids_);
  double largest = 0;
  for (const auto& row : expected) {
    for (const double logit : row) largest = std::max(largest, std::abs(logit));
  }
  for (std::size_t t = 0; t < ids_.size(); ++t) {
    for (std::size_t n = 0; n < 61; ++n) {
      ASSERT_NEAR(got[t * 61 + n], expected[t][n], 5e-6 * largest) << "token " << t;
    }
  }
}

TEST_P(AttentionVariant, SplitForkedAndRestoredStatesGiveTheSameBits) {
  const Model model = Model::load(directory_.path("model"));
  State whole = model.new_state();
  const std::vector<float> expected = logits(model, whole, ids_);
  State state = model.new_state();
  std::vector<float> got;
  for (std::size_t begin = 0; begin < ids_.size(); begin += 10) {
    const State before = state;
    const std::vector<std::int32_t> part(ids_.begin() + static_cast<std::ptrdiff_t>(begin),
                                         ids_.begin() + static_cast<std::ptrdiff_t>(begin) + 10);
    const std::vector<float> out = logits(model, state, part);
    got.insert(got.end(), out.begin(), out.end());
    model.save_state(before, directory_.path("state"));
    State restored = model.load_state(directory_.path("state"));
    EXPECT_EQ(restored.bytes(), before.bytes());
    EXPECT_EQ(logits(model, restored, part), out);
    State fork = before;
    logits(model, fork, random_ids(5, 30, 61));  // must leave the others alone
  }
  EXPECT_EQ(got, expected);
}

INSTANTIATE_TEST_SUITE_P(Options, AttentionVariant, testing::ValuesIn(variants()),
                         [](const auto& param) { return std::string(param.param.name); });

TEST(AttentionState, GrowsWithTheSequenceAndOnlyToItsWindow) {
  const test::TemporaryDirectory directory;
  const auto bytes_after = [&](const char* name, const json& options, std::int64_t tokens) {
    const std::string path = directory.path(name);
    if (!std::filesystem::exists(path)) {
      write_initialised(config_of(kTransformer, options), path, {});
    }
    const Model model = Model::load(path);
    State state = model.new_state();
    logits(model, state, random_ids(1, tokens, 61));
    return state.bytes();
  };
  // Keys and values of 4 heads of 12, padded to 16, in 2 layers.
  constexpr std::size_t kPageBytes = std::size_t{2} * 64 * 4 * (12 + 16) * 4;
  EXPECT_EQ(bytes_after("full", json::object(), 1), kPageBytes);
  EXPECT_EQ(bytes_after("full", json::object(), 65), 2 * kPageBytes);
  EXPECT_EQ(bytes_after("full", json::object(), 3000), 47 * kPageBytes);
  EXPECT_EQ(bytes_after("window", {{"window_size", 64}}, 3000), 2 * kPageBytes);
}

TEST(AttentionState, AFileThatClaimsMoreTokensThanItHoldsIsRefused) {
  const test::TemporaryDirectory directory;
  write_initialised(config_of(kTransformer, json::object()), directory.path("model"), {});
  const Model model = Model::load(directory.path("model"));
  State state = model.new_state();
  logits(model, state, random_ids(1, 10, 61));
  model.save_state(state, directory.path("state"));
  std::string file = test::read_file(directory.path("state"));
  const std::string position = R"("position":"10")";
  const std::size_t at = file.find(position);
  ASSERT_NE(at, std::string::npos);
  file.replace(at, position.size(), R"("position":"99999999999")");
  const std::uint64_t length = [&] {
    std::uint64_t header = 0;
    std::memcpy(&header, file.data(), sizeof header);
    return header + 9;
  }();
  std::memcpy(file.data(), &length, sizeof length);
  directory.write("claims", file);
  try {
    model.load_state(directory.path("claims"));
    FAIL() << "was read";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("'position'"));
  }
}

class Pruning : public testing::TestWithParam<const char*> {};

TEST_P(Pruning, SkipsBlocksAndLeavesLogits) {
  const test::TemporaryDirectory directory;
  const std::string golden = test::Golden(GetParam()).directory();
  for (const char* name : {"full", "pruned"}) {
    json config = json::parse(test::read_file(golden + "/config.json"));
    if (std::string(name) == "pruned") config["log_pruning_tolerance"] = -10;
    directory.write(std::string(name) + "/config.json", config.dump());
    copy_checkpoint(golden, directory.path(name),
                    [](const std::string& tensor, std::span<float> values) {
                      // Gates of about a half: strong forgetting.
                      if (tensor.ends_with("fgate_proj.bias")) std::ranges::fill(values, 0.0F);
                    });
  }
  const Model full = Model::load(directory.path("full"));
  const Model pruned = Model::load(directory.path("pruned"));
  State full_state = full.new_state();
  State pruned_state = pruned.new_state();
  const std::int64_t vocab = full.info().vocab_size;
  const auto expect_close = [&](const std::vector<std::int32_t>& ids) {
    const std::vector<float> expected = logits(full, full_state, ids);
    const std::vector<float> got = logits(pruned, pruned_state, ids);
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-3) << i;
  };
  expect_close(random_ids(1, 1500, vocab));
  const AttentionStats prefill = pruned.attention_stats();
  EXPECT_GT(prefill.skipped_blocks, prefill.blocks / 2);
  for (std::uint32_t step = 0; step < 20; ++step) expect_close(random_ids(step, 1, vocab));
  const AttentionStats all = pruned.attention_stats();
  EXPECT_GT(all.skipped_blocks - prefill.skipped_blocks, (all.blocks - prefill.blocks) / 2);
  EXPECT_EQ(full.attention_stats().skipped_blocks, 0);
  EXPECT_EQ(full.attention_stats().blocks, all.blocks);
}

INSTANTIATE_TEST_SUITE_P(Golden, Pruning,
                         testing::Values("fox_llama-tiny", "fox_pro-tiny", "fox_pro-unshared-d64"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

// All parameters but the embedding, in millions cut off as the paper's table has them.
std::int64_t millions(const std::string& preset) {
  CausalLM model = build_model(io::JsonObject::parse(preset_config(preset), preset));
  std::int64_t total = 0;
  model.visit_params([&](const std::string& name, const Param& param) {
    if (name != model.config().names.embeddings) total += param.shape.size();
  });
  return total / 1'000'000;
}

TEST(Presets, HaveThePapersParameterCounts) {
  EXPECT_EQ(millions("fox_pro-760m"), 759);
  EXPECT_EQ(millions("transformer_pro-760m"), 757);
  EXPECT_EQ(millions("fox_llama-760m"), 757);
  EXPECT_EQ(millions("transformer_llama-760m"), 756);
}

TEST(FixedGates, AreNoParametersAndDecayInTheGivenTimes) {
  const test::TemporaryDirectory directory;
  const json options{{"fgate_type", "fixed"},
                     {"fgate_bias_init", true},
                     {"decay_time_min", 4},
                     {"decay_time_max", 256},
                     {"num_heads", 4}};
  write_initialised(config_of(kFox, options), directory.path("fixed"), {});
  write_initialised(config_of(kFox, {{"fgate_type", "none"}}), directory.path("none"), {});
  EXPECT_EQ(Model::load(directory.path("fixed")).info().num_parameters,
            Model::load(directory.path("none")).info().num_parameters);
  const io::Checkpoint checkpoint = io::Checkpoint::open(directory.path("fixed"));
  const float* bias = checkpoint.view("model.layers.0.attn.fgate_bias").f32();
  for (int h = 0; h < 4; ++h) {
    const double time = -1 / std::log(1 / (1 + std::exp(-static_cast<double>(bias[h]))));
    EXPECT_NEAR(time, std::pow(4, 1 + h), 1e-3 * time);  // 4, 16, 64, 256
  }
}

struct Refusal {
  const char* key;  // that the message names
  const char* model_type;
  json options;
};

TEST(AttentionConfig, RefusesWhatIsWrongByName) {
  const Refusal refusals[] = {
      {"num_heads", kFox, {{"num_heads", 5}}},
      {"num_kv_heads", kFox, {{"num_kv_heads", 3}}},
      {"window_size", kFox, {{"window_size", 0}}},
      {"fgate_type", kFox, {{"fgate_type", "half"}}},
      {"fgate_bias_init", kFox, {{"fgate_bias_init", true}}},
      {"fgate_bias_init", kFox, {{"fgate_type", "fixed"}}},
      {"decay_time_min", kFox, {{"fgate_type", "bias_only"}, {"fgate_bias_init", true}}},
      {"decay_time_max",
       kFox,
       {{"fgate_type", "bias_only"}, {"fgate_bias_init", true}, {"decay_time_min", 1}}},
      {"decay_time_min", kFox, {{"decay_time_min", 3}}},
      {"ogate_act", kFox, {{"ogate_act", "relu"}}},
      {"ogate_act",
       kFox,
       {{"ogate_act", "silu"}, {"use_output_gate", true}, {"use_output_norm", true}}},
      {"log_pruning_tolerance", kFox, {{"log_pruning_tolerance", 1}}},
      {"hidden_act", kFox, {{"hidden_act", "gelu"}}},
      {"hidden_act", kTransformer, {{"hidden_act", "sigmoid"}}},
      {"use_rope", kTransformer, {{"hidden_size", 36}, {"num_heads", 4}}},
      {"attention_bias", kTransformer, {{"attention_bias", 3}}},
      {"qkv_bias", "forgetting_transformer", {{"qkv_bias", true}}},
      {"window_size", "forgetting_transformer", {{"window_size", 64}}},
      {"attnres_block_size", "forgetting_transformer", {{"attnres_block_size", 4}}},
      {"hidden_act", "forgetting_transformer", {{"hidden_act", "powlu"}}},
      {"allow_neg_eigval", "delta_net", {{"allow_neg_eigval", true}}},
      {"attn", "delta_net", {{"attn", {{"layers", {0}}}}}},
      {"use_short_conv", "delta_net", {{"use_short_conv", false}}},
  };
  for (const Refusal& refusal : refusals) {
    const std::string config = config_of(refusal.model_type, refusal.options);
    try {
      build_model(io::JsonObject::parse(config, "config.json"));
      ADD_FAILURE() << "accepted: " << config;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(),
                  testing::StartsWith(std::string("config.json: key '") + refusal.key + "'"));
    }
  }
}

// A golden checkpoint under flash-linear-attention's names and layouts gives the golden logits.
struct Rename {
  const char* golden;
  const char* model_type;
};

class FlashLinearAttention : public testing::TestWithParam<Rename> {};

TEST_P(FlashLinearAttention, CheckpointsGiveTheSameLogits) {
  const test::Golden golden(GetParam().golden);
  const test::TemporaryDirectory directory;
  json config = json::parse(test::read_file(golden.directory() + "/config.json"));
  config["model_type"] = GetParam().model_type;
  directory.write("model/config.json", config.dump());

  const io::SafetensorsFile file =
      io::SafetensorsFile::open(golden.directory() + "/model.safetensors");
  std::vector<io::TensorDeclaration> tensors;
  std::map<std::string, std::span<const std::byte>> contents;
  const auto add = [&](const std::string& name, const Shape& shape, const std::byte* data) {
    tensors.push_back({name, DType::kF32, shape});
    contents[name] = {data, static_cast<std::size_t>(shape.size()) * sizeof(float)};
  };
  for (const io::TensorEntry& entry : file.tensors()) {
    std::string name = entry.name;
    const std::size_t gate = name.find("fgate_proj");
    if (gate != std::string::npos) name.replace(gate, 10, "f_proj");
    const std::size_t packed = name.find("mlp.gate_proj");
    if (packed == std::string::npos) {
      add(name, Shape(entry.shape), entry.data);
      continue;
    }
    const Shape half{entry.shape[0] / 2, entry.shape[1]};
    add(name, half, entry.data);
    add(name.replace(packed, 13, "mlp.up_proj"), half, entry.data + entry.bytes / 2);
  }
  io::SafetensorsWriter writer(directory.path("model/model.safetensors"), tensors);
  for (const auto& [name, bytes] : contents) writer.write(name, bytes);
  writer.finish();

  const Model model = Model::load(directory.path("model"));
  const auto rows = golden.rows("input_ids");
  std::vector<State> states(rows.size(), model.new_state());
  const std::vector<float> got = test::logits(model, rows, states);
  const std::span<const float> expected = golden.floats("logits");
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], 2e-5) << i;
}

INSTANTIATE_TEST_SUITE_P(Golden, FlashLinearAttention,
                         testing::Values(Rename{"fox_llama-tiny", "forgetting_transformer"},
                                         Rename{"delta_net-tiny", "delta_net"}),
                         [](const auto& param) { return std::string(param.param.model_type); });

}  // namespace
}  // namespace deltafox
