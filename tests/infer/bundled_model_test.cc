// models/english-9m: that it has learnt English, and that float32 gives the text that it gave when
// it was put here.
#include <gtest/gtest.h>

#include <numeric>

#include "deltafox/generate.h"
#include "infer/golden.h"

namespace deltafox {
namespace {

const std::string kDirectory = std::string(DELTAFOX_SOURCE_DIR) + "/models/english-9m";

Model bundled_model() {
  LoadOptions options;
  options.dtype = DType::kF32;
  return Model::load(kDirectory, options);
}

// The end of Pride and Prejudice and the beginning of Sense and Sensibility, which its training
// left out.
TEST(BundledModel, PredictsATextThatItHasNotSeen) {
  constexpr std::int64_t kTokens = 512;
  const Model model = bundled_model();
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  const std::vector<std::int32_t> ids =
      tokenizer.encode(test::read_text(DELTAFOX_TEST_DATA "/english/held_out.txt"));
  ASSERT_GT(static_cast<std::int64_t>(ids.size()), kTokens);

  const std::vector<std::int64_t> cu_seqlens = {0, kTokens};
  State state = model.new_state();
  State* const states[] = {&state};
  std::vector<float> loss(kTokens);
  const std::span<const std::int32_t> all(ids);
  model.loss({all.first(kTokens), cu_seqlens}, all.subspan(1, kTokens), states, loss);
  const double mean = std::accumulate(loss.begin(), loss.end(), 0.0) / kTokens;
  EXPECT_LT(mean, 3.44);  // it is 3.4323; guessing among 8,192 tokens would be 9.01
}

TEST(BundledModel, ContinuesAPromptAsWhenItWasMade) {
  const Model model = bundled_model();
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  const std::vector<std::vector<std::int32_t>> prompts = {tokenizer.encode("Once upon a time")};
  GenerationConfig config = GenerationConfig::load(kDirectory);
  config.max_new_tokens = 32;
  GenerateOptions options;
  options.tokenizer = &tokenizer;
  EXPECT_EQ(
      generate(model, prompts, config, options).front().text,
      ", I was very much pleased with you. You are not afraid of my own feelings; but I am sure "
      "that you will be so kind as to see you");
}

}  // namespace
}  // namespace deltafox
