// Tokens chosen on the GPU are those that the CPU chooses from the same logits, for any options.
#include "ops/choose_token.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "cuda/gpu.h"
#include "infer/processors.h"
#include "infer/sampler.h"

namespace deltafox {
namespace {

using test::Gpu;
using test::Random;
using Ids = std::vector<std::int32_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();

Tensor device(DType dtype, const Shape& shape) {
  return {dtype, shape, Device::kCuda};
}

// What the kernel is asked for: as infer/continue_prompts.cc does.
TokenOptions options_of(const GenerationConfig& config) {
  return {.do_sample = config.do_sample,
          .seed = config.seed,
          .repetition_penalty = static_cast<float>(config.repetition_penalty),
          .no_repeat_ngram_size = static_cast<std::int32_t>(config.no_repeat_ngram_size),
          .min_length = static_cast<std::int32_t>(config.min_length),
          .min_new_tokens = static_cast<std::int32_t>(config.min_new_tokens),
          .renormalize = config.renormalize_logits,
          .temperature = static_cast<float>(config.temperature),
          .top_k = static_cast<std::int32_t>(config.top_k),
          .top_p = config.top_p,
          .log_min_p = exact_log(config.min_p.value_or(0)),
          .typical_p = config.typical_p,
          .epsilon_cutoff = config.epsilon_cutoff,
          .eta_cutoff = config.eta_cutoff,
          .logprobs = config.output_logprobs};
}

// Rows of logits, successive steps of which continue sequences on the GPU and on the CPU.
class Both {
 public:
  Both(Gpu& gpu, const GenerationConfig& config, const Ids& eos, std::int64_t vocab,
       std::int64_t stride, std::vector<Ids> prompts)
      : gpu_(gpu),
        config_(config),
        eos_(eos),
        vocab_(vocab),
        stride_(stride),
        ids_(std::move(prompts)),
        chain_(config, eos, static_cast<std::size_t>(vocab)),
        eos_tensor_(eos.empty() ? Tensor() : uploaded(DType::kI32, {std::ssize(eos)}, eos.data())),
        next_(device(DType::kI32, {rows()})),
        counter_(device(DType::kI32, {1})),
        memory_(cuda::allocate_shared(kSlots * ids_.size() * sizeof(ChosenToken))),
        chosen_(static_cast<ChosenToken*>(memory_.get())) {
    std::vector<TokenSequence> sequences;
    std::vector<std::uint32_t> seen(ids_.size() * words());
    std::vector<std::int32_t> history(ids_.size() * kHistory);
    for (std::size_t b = 0; b < ids_.size(); ++b) {
      prompt_sizes_.push_back(ids_[b].size());
      sequences.push_back({.length = static_cast<std::int32_t>(ids_[b].size()),
                           .prompt = static_cast<std::uint32_t>(7 * b),
                           .sequence = static_cast<std::uint32_t>(b)});
      for (const std::int32_t id : ids_[b]) {
        seen[b * words() + static_cast<std::size_t>(id / 32)] |= 1U << id % 32;
      }
      std::copy(ids_[b].begin(), ids_[b].end(),
                history.begin() + static_cast<std::ptrdiff_t>(b * kHistory));
    }
    sequences_ = uploaded(DType::kU8, {rows() * static_cast<std::int64_t>(sizeof(TokenSequence))},
                          sequences.data());
    seen_ = uploaded(DType::kI32, {rows(), static_cast<std::int64_t>(words())}, seen.data());
    history_ = uploaded(DType::kI32, {rows(), static_cast<std::int64_t>(kHistory)}, history.data());
  }

  // One token for each row of logits [B, stride].
  std::vector<ChosenToken> on_gpu(const Tensor& logits) {
    const Tensor copy = uploaded(DType::kF32, {rows(), stride_}, logits.f32());
    ops::choose_token(gpu_.ctx(),
                      {.logits = copy.view(),
                       .classes = vocab_,
                       .options = options_of(config_),
                       .sequences = sequences_.view(),
                       .eos_ids = eos_.empty() ? ConstTensorView{} : eos_tensor_.view(),
                       .seen = config_.repetition_penalty != 1 ? seen_.view() : TensorView{},
                       .history = config_.no_repeat_ngram_size > 0 ? history_.view() : TensorView{},
                       .ids = next_.view(),
                       .chosen = chosen_,
                       .slots = kSlots,
                       .counter = counter_.view()});
    gpu_.ctx().synchronize();
    const ChosenToken* slot = chosen_ + calls_++ % kSlots * ids_.size();
    return {slot, slot + ids_.size()};
  }

  std::vector<ChosenToken> on_cpu(const Tensor& logits) {
    std::vector<ChosenToken> chosen;
    for (std::size_t b = 0; b < ids_.size(); ++b) {
      const float* from = logits.f32() + static_cast<std::int64_t>(b) * stride_;
      std::vector<float> row(from, from + vocab_);
      const std::vector<float> model = row;
      chain_.apply(row, ids_[b], prompt_sizes_[b]);
      ChosenToken token;
      if (*std::max_element(row.begin(), row.end()) == -kInf) {
        token.id = ChosenToken::kNoneLeft;
      } else if (config_.do_sample) {
        const DrawKey key{.seed = config_.seed,
                          .prompt = static_cast<std::uint32_t>(7 * b),
                          .sequence = static_cast<std::uint32_t>(b),
                          .step = static_cast<std::uint32_t>(ids_[b].size() - prompt_sizes_[b])};
        token.id = infer::sample(row, infer::uniform(key), weights_);
      } else {
        token.id = infer::argmax(row);
      }
      if (config_.output_logprobs && token.id >= 0) {
        token.logprob = infer::log_probability(row, token.id);
        token.model_logprob = infer::log_probability(model, token.id);
      }
      ids_[b].push_back(std::max(token.id, 0));
      chosen.push_back(token);
    }
    return chosen;
  }

  std::vector<std::int32_t> next_ids() const {
    std::vector<std::int32_t> ids(ids_.size());
    next_.write_to(ids.data());
    return ids;
  }
  std::int32_t counter() const {
    std::int32_t count = 0;
    counter_.write_to(&count);
    return count;
  }

 private:
  static constexpr std::size_t kSlots = 3;
  static constexpr std::size_t kHistory = 64;

  std::int64_t rows() const { return std::ssize(ids_); }
  std::size_t words() const { return static_cast<std::size_t>((vocab_ + 31) / 32); }
  static Tensor uploaded(DType dtype, const Shape& shape, const void* from) {
    Tensor tensor = device(dtype, shape);
    tensor.read_from(from);
    return tensor;
  }

  Gpu& gpu_;
  GenerationConfig config_;
  Ids eos_;
  std::int64_t vocab_;
  std::int64_t stride_;
  std::vector<Ids> ids_;
  std::vector<std::size_t> prompt_sizes_;
  infer::ProcessorChain chain_;
  std::vector<std::uint64_t> weights_;
  Tensor eos_tensor_, sequences_, seen_, history_, next_, counter_;
  std::shared_ptr<void> memory_;
  ChosenToken* chosen_;
  std::size_t calls_ = 0;
};

void expect_same(const std::vector<ChosenToken>& got, const std::vector<ChosenToken>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t b = 0; b < got.size(); ++b) {
    ASSERT_EQ(got[b].id, expected[b].id) << "row " << b;
    ASSERT_EQ(got[b].logprob, expected[b].logprob) << "row " << b;
    ASSERT_EQ(got[b].model_logprob, expected[b].model_logprob) << "row " << b;
  }
}

// Of many kinds: flat and peaked, with ties and without, with tokens that are impossible.
Tensor random_logits(Random& random, std::int64_t rows, std::int64_t stride) {
  Tensor logits(DType::kF32, {rows, stride});
  for (std::int64_t b = 0; b < rows; ++b) {
    constexpr std::array kScales{0.0F, 0.01F, 1.0F, 3.0F, 8.0F};
    const float scale = kScales[static_cast<std::size_t>(random.integer(0, 4))];
    const bool ties = random.integer(0, 2) == 0;
    const bool holes = random.integer(0, 3) == 0;
    float* row = logits.f32() + b * stride;
    for (std::int64_t i = 0; i < stride; ++i) {
      row[i] = random.normal(scale) - 2;
      if (ties) row[i] = std::round(row[i] * 4) / 4;
      if (holes && random.integer(0, 1) == 0) row[i] = -kInf;
    }
  }
  return logits;
}

GenerationConfig random_config(Random& random, std::int64_t vocab) {
  const auto sometimes = [&] { return random.integer(0, 2) == 0; };
  const auto one_of = [&](std::initializer_list<double> values) {
    return *(values.begin() + random.integer(0, std::ssize(values) - 1));
  };
  GenerationConfig config;
  config.do_sample = random.integer(0, 4) != 0;
  config.seed = static_cast<std::uint64_t>(random.integer(0, 1 << 30)) << 20;
  config.top_k = sometimes() ? 0 : static_cast<std::int64_t>(one_of({1, 2, 50, 300, 700, 1e6}));
  if (sometimes()) config.temperature = one_of({0.1, 0.7, 1.3, 4});
  if (sometimes()) config.top_p = one_of({0, 0.1, 0.5, 0.9, 0.999});
  if (sometimes()) config.min_p = one_of({0, 0.01, 0.3, 1});
  if (sometimes()) config.typical_p = one_of({1e-6, 0.2, 0.9, 0.999});
  if (sometimes()) config.epsilon_cutoff = one_of({1e-6, 1e-3, 0.2});
  if (sometimes()) config.eta_cutoff = one_of({1e-6, 1e-3, 0.2});
  config.renormalize_logits = sometimes();
  if (sometimes()) config.repetition_penalty = one_of({0.5, 1.2, 3});
  if (sometimes()) config.no_repeat_ngram_size = random.integer(1, 3);
  if (sometimes()) config.min_new_tokens = random.integer(1, 3);
  if (sometimes()) config.min_length = random.integer(1, std::min<std::int64_t>(vocab, 12));
  config.output_logprobs = sometimes();
  return config;
}

TEST(CudaChooseToken, EqualsTheCpuForRandomOptionsAndLogits) {
  Random random(11);
  Gpu gpu(DType::kF32);
  // Fewer for tools under which it takes too long.
  const char* const fewer = std::getenv("DELTAFOX_TEST_ROUNDS");
  const int rounds = fewer != nullptr ? std::atoi(fewer) : 300;
  ASSERT_GT(rounds, 0);
  for (int round = 0; round < rounds; ++round) {
    constexpr std::array<std::int64_t, 5> kVocabs{5, 33, 1000, 5003, 50257};
    const std::int64_t vocab = kVocabs[static_cast<std::size_t>(round) % kVocabs.size()];
    const std::int64_t stride = vocab + random.integer(0, 7);
    const GenerationConfig config = random_config(random, vocab);
    SCOPED_TRACE(testing::Message() << "round " << round << ", vocabulary " << vocab);
    std::vector<Ids> prompts(static_cast<std::size_t>(random.integer(1, 3)));
    for (Ids& prompt : prompts) {
      prompt.resize(static_cast<std::size_t>(random.integer(1, 20)));
      for (std::int32_t& id : prompt) {
        id = static_cast<std::int32_t>(random.integer(0, std::min<std::int64_t>(vocab, 12) - 1));
      }
    }
    const Ids eos{0, static_cast<std::int32_t>(vocab - 1)};
    Both both(gpu, config, eos, vocab, stride, prompts);
    for (int step = 0; step < 4; ++step) {
      const Tensor logits = random_logits(random, std::ssize(prompts), stride);
      const std::vector<ChosenToken> expected = both.on_cpu(logits);
      ASSERT_NO_FATAL_FAILURE(expect_same(both.on_gpu(logits), expected)) << "step " << step;
    }
    ASSERT_EQ(both.counter(), 4);
  }
}

TEST(CudaChooseToken, TakesTheFirstOfTheLargest) {
  Random random(5);
  Gpu gpu(DType::kF32);
  constexpr std::int64_t kStride = 50260;  // what lies behind the classes does not count
  constexpr std::int64_t kVocab = 50257;
  Tensor logits = random.normal_tensor({3, kStride});
  for (const int i : {40, 4999, 4100, 50258}) logits.f32()[i] = 9;
  logits.f32()[kStride] = 9;
  logits.f32()[2 * kStride + 50256] = 9;
  logits.f32()[2 * kStride + 50257] = 10;
  Both both(gpu, {}, {}, kVocab, kStride, {{1}, {1}, {1}});
  for (int call = 0; call < 5; ++call) {
    const std::vector<ChosenToken> chosen = both.on_gpu(logits);
    EXPECT_EQ(chosen[0].id, 40);
    EXPECT_EQ(chosen[1].id, 0);
    EXPECT_EQ(chosen[2].id, 50256);
  }
  EXPECT_EQ(both.next_ids(), (Ids{40, 0, 50256}));
}

TEST(CudaChooseToken, SaysWhereNothingCanBeChosen) {
  Random random(6);
  Gpu gpu(DType::kF32);
  for (const std::int64_t vocab : {300, 50257}) {
    for (const auto& [do_sample, penalty] :
         {std::pair{false, false}, {false, true}, {true, true}}) {
      GenerationConfig config;
      config.do_sample = do_sample;
      config.top_p = 0.9;
      config.typical_p = 0.9;
      config.eta_cutoff = 0.1;
      if (penalty) config.repetition_penalty = 2;
      Tensor logits = random.normal_tensor({4, vocab});
      std::fill_n(logits.f32(), vocab, -kInf);
      logits.f32()[vocab + 299] = std::numeric_limits<float>::quiet_NaN();
      logits.f32()[2 * vocab] = kInf;
      std::fill_n(logits.f32() + 3 * vocab, vocab, -kInf);
      logits.f32()[3 * vocab + 7] = -3;
      Both both(gpu, config, {}, vocab, vocab, {{1}, {1}, {1}, {1}});
      const std::vector<ChosenToken> chosen = both.on_gpu(logits);
      EXPECT_EQ(chosen[0].id, ChosenToken::kNoneLeft);
      EXPECT_EQ(chosen[1].id, ChosenToken::kNotNumbers);
      EXPECT_EQ(chosen[2].id, ChosenToken::kNotNumbers);
      EXPECT_EQ(chosen[3].id, 7);
      EXPECT_EQ(both.next_ids(), (Ids{0, 0, 0, 7}));
    }
  }
}

}  // namespace
}  // namespace deltafox
