// Every golden case that the engine has an architecture for: logits, losses, hidden states and
// greedy continuations of the official model code in float64, and the invariances of a state.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "cpu/isa.h"
#include "deltafox/model.h"
#include "io/safetensors.h"
#include "support/golden.h"
#include "support/temporary.h"

namespace deltafox {
namespace {

using test::Golden;

constexpr float kLogitTolerance = 2e-5F;
constexpr float kLossTolerance = 1e-5F;

class GoldenModel : public testing::TestWithParam<std::string> {
 protected:
  // Logits of packed sequences, all at once.
  std::vector<float> logits(const std::vector<std::vector<std::int32_t>>& sequences,
                            std::vector<State>* states = nullptr) {
    std::vector<State> fresh;
    for (std::size_t b = 0; b < sequences.size(); ++b) fresh.push_back(model_.new_state());
    return test::logits(model_, sequences, states != nullptr ? *states : fresh);
  }

  void expect_logits(std::span<const float> got, std::span<const float> expected) {
    ASSERT_EQ(got.size(), expected.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], kLogitTolerance)
          << "token " << i / static_cast<std::size_t>(vocab()) << ", entry "
          << i % static_cast<std::size_t>(vocab());
    }
  }

  std::int64_t vocab() const { return model_.info().vocab_size; }

  Golden golden_{GetParam()};
  Model model_ = Model::load(golden_.directory());
  std::vector<std::vector<std::int32_t>> rows_ = golden_.rows("input_ids");  // [B][T]
};

TEST_P(GoldenModel, LogitsOfTheBatch) {
  expect_logits(logits(rows_), golden_.floats("logits"));
}

TEST_P(GoldenModel, LossOfTheBatch) {
  const std::vector<std::int32_t> ids = golden_.ids("input_ids");
  const std::vector<std::int32_t> labels = golden_.ids("labels");
  std::vector<State> states(rows_.size(), model_.new_state());
  std::vector<float> loss(ids.size());
  model_.loss(test::Packed(rows_).batch(), labels, test::pointers(states), loss);
  const std::span<const float> expected = golden_.floats("loss");
  for (std::size_t t = 0; t < loss.size(); ++t)
    ASSERT_NEAR(loss[t], expected[t], kLossTolerance) << t;
}

TEST_P(GoldenModel, HiddenStatesOfTheLastPosition) {
  const std::int64_t layers = model_.info().num_hidden_layers;
  const auto width = static_cast<std::size_t>(model_.info().hidden_size);
  const std::size_t batch = rows_.size();
  std::vector<State> states(batch, model_.new_state());
  std::vector<float> last(static_cast<std::size_t>(layers + 2) * batch * width);
  const test::Packed packed(rows_);
  model_.logits(
      packed.batch(), test::pointers(states), {},
      [&](std::int64_t layer, std::int64_t first, std::int64_t count, const float* hidden) {
        for (std::size_t b = 0; b < batch; ++b) {
          const std::int64_t row = packed.batch().cu_seqlens[b + 1] - 1 - first;
          if (row < 0 || row >= count) continue;
          std::copy_n(hidden + static_cast<std::size_t>(row) * width, width,
                      last.data() + (static_cast<std::size_t>(layer) * batch + b) * width);
        }
      });
  // The expected ones hold what comes before (or follows) each layer, and the final norm.
  const std::size_t shift = golden_.hidden_states_follow_layers() ? 1 : 0;
  const std::span<const float> expected = golden_.floats("last_hidden_states");
  ASSERT_EQ(expected.size(), static_cast<std::size_t>(layers + 1) * batch * width);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::size_t layer = i / (batch * width);
    const std::size_t at =
        i + (layer == static_cast<std::size_t>(layers) ? 1 : shift) * batch * width;
    ASSERT_NEAR(last[at], expected[i], kLogitTolerance) << "layer " << layer;
  }
}

TEST_P(GoldenModel, RealPositionsOfAPaddedBatch) {
  if (!golden_.contains("padded.input_ids")) GTEST_SKIP() << "the case has no padded batch";
  const auto ids = golden_.rows("padded.input_ids");
  const auto mask = golden_.rows("padded.attention_mask");
  std::vector<std::vector<std::int32_t>> real(ids.size());
  for (std::size_t b = 0; b < ids.size(); ++b) {
    for (std::size_t t = 0; t < ids[b].size(); ++t) {
      if (mask[b][t] != 0) real[b].push_back(ids[b][t]);
    }
  }
  const std::vector<float> got = logits(real);
  const std::span<const float> expected = golden_.floats("padded.logits");
  const auto entries = static_cast<std::size_t>(vocab());
  std::vector<float> wanted;
  for (std::size_t b = 0; b < ids.size(); ++b) {
    for (std::size_t t = 0; t < ids[b].size(); ++t) {
      if (mask[b][t] == 0) continue;
      const auto row = expected.subspan((b * ids[b].size() + t) * entries, entries);
      wanted.insert(wanted.end(), row.begin(), row.end());
    }
  }
  expect_logits(got, wanted);
}

TEST_P(GoldenModel, GreedyContinuation) {
  const std::vector<std::int32_t> expected = golden_.ids("greedy.ids");
  std::vector<std::int32_t> ids = golden_.ids("greedy.prompt");
  std::vector<State> states{model_.new_state()};
  std::vector<float> last(static_cast<std::size_t>(vocab()));
  model_.forward(test::Packed({ids}).batch(), test::pointers(states), last);
  while (ids.size() < expected.size()) {
    const auto best =
        static_cast<std::int32_t>(std::max_element(last.begin(), last.end()) - last.begin());
    ids.push_back(best);
    model_.step(std::span(&best, 1), test::pointers(states), last);
  }
  EXPECT_EQ(ids, expected);
}

TEST_P(GoldenModel, AnySplitOfASequence) {
  const std::span<const float> expected = golden_.floats("logits");
  const std::vector<std::int32_t>& sequence = rows_.front();
  for (const std::int64_t piece : {1, 2, 7, 11, 12, 63, 64, 65, 100}) {
    std::vector<State> states{model_.new_state()};
    std::vector<float> got;
    for (std::size_t begin = 0; begin < sequence.size(); begin += static_cast<std::size_t>(piece)) {
      const std::size_t end = std::min(sequence.size(), begin + static_cast<std::size_t>(piece));
      const std::vector<std::int32_t> part(sequence.begin() + static_cast<std::ptrdiff_t>(begin),
                                           sequence.begin() + static_cast<std::ptrdiff_t>(end));
      const std::vector<float> out = logits({part}, &states);
      got.insert(got.end(), out.begin(), out.end());
    }
    EXPECT_EQ(states[0].position(), static_cast<std::int64_t>(sequence.size()));
    expect_logits(got, expected.first(got.size()));
  }
}

TEST_P(GoldenModel, ARaggedBatchGivesEachSequenceItsOwnBits) {
  const std::vector<std::int32_t>& a = rows_.front();
  const std::vector<std::int32_t>& b = rows_.back();
  const auto half = static_cast<std::ptrdiff_t>(b.size() / 2);
  const std::vector<std::vector<std::int32_t>> ragged{{a.begin(), a.begin() + 1},
                                                      a,
                                                      {b.begin(), b.begin() + half},
                                                      {b.begin() + 3, b.begin() + 20},
                                                      b};
  const std::vector<float> together = logits(ragged);
  std::vector<float> alone;
  for (const auto& sequence : ragged) {
    const std::vector<float> out = logits({sequence});
    alone.insert(alone.end(), out.begin(), out.end());
  }
  EXPECT_EQ(together, alone);
}

TEST_P(GoldenModel, AnyNumberOfThreadsGivesTheSameBits) {
  const Model one = Model::load(golden_.directory(), {.threads = 1});
  const Model four = Model::load(golden_.directory(), {.threads = 4});
  std::vector<State> one_states(rows_.size(), one.new_state());
  std::vector<State> four_states(rows_.size(), four.new_state());
  EXPECT_EQ(test::logits(one, rows_, one_states), test::logits(four, rows_, four_states));
}

TEST_P(GoldenModel, CopiedWeightsGiveTheSameBits) {
  const Model copied = Model::load(golden_.directory(), {.copy_weights = true});
  std::vector<State> states(rows_.size(), model_.new_state());
  std::vector<State> copied_states(rows_.size(), copied.new_state());
  EXPECT_EQ(test::logits(model_, rows_, states), test::logits(copied, rows_, copied_states));
  EXPECT_EQ(copied.info().weight_bytes, model_.info().weight_bytes);
}

// What an AMX processor keeps in the order of its tiles, against the same in rows.
TEST_P(GoldenModel, MatricesInTilesGiveTheSameBits) {
  const auto load = [&](const cpu::Isa& isa) {
    const cpu::IsaForTesting only(isa);
    return Model::load(golden_.directory(), {.dtype = DType::kBF16});
  };
  cpu::Isa without = cpu::isa();
  without.amx_bf16 = false;
  const Model rows = load(without);
  const Model tiles = load(cpu::isa());
  std::vector<State> row_states(rows_.size(), rows.new_state());
  std::vector<State> tile_states(rows_.size(), tiles.new_state());
  EXPECT_EQ(test::logits(rows, rows_, row_states), test::logits(tiles, rows_, tile_states));
  const std::vector<Weight> expected = rows.weights();
  const std::vector<Weight> got = tiles.weights();
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    std::vector<std::byte> bytes(got[i].bytes);
    std::vector<std::byte> expected_bytes(expected[i].bytes);
    got[i].copy_to(bytes.data());
    expected[i].copy_to(expected_bytes.data());
    EXPECT_EQ(bytes, expected_bytes) << got[i].name;
    EXPECT_EQ(got[i].dtype, expected[i].dtype) << got[i].name;
  }
  const bool any = std::any_of(got.begin(), got.end(), [](const Weight& w) { return w.tiled; });
  EXPECT_EQ(any, cpu::isa().amx_bf16);
}

TEST_P(GoldenModel, ForkingAndSavingAStateChangesNothing) {
  constexpr std::ptrdiff_t kHead = 20;
  const std::vector<std::int32_t>& sequence = rows_.front();
  const std::vector<std::int32_t> head(sequence.begin(), sequence.begin() + kHead);
  const std::vector<std::int32_t> tail(sequence.begin() + kHead, sequence.end());
  std::vector<State> states{model_.new_state()};
  logits({head}, &states);
  const test::TemporaryDirectory directory;
  const std::string path = directory.path("state.safetensors");
  model_.save_state(states[0], path);
  std::vector<State> fork{states[0]};
  const std::vector<float> expected = logits({tail}, &states);
  EXPECT_EQ(logits({tail}, &fork), expected);
  std::vector<State> restored{Model::load(golden_.directory()).load_state(path)};
  EXPECT_EQ(restored[0].position(), kHead);
  // A state belongs to the loaded model that made it; another load of the same files reads the
  // file.
  restored[0] = model_.load_state(path);
  EXPECT_EQ(logits({tail}, &restored), expected);
}

INSTANTIATE_TEST_SUITE_P(Golden, GoldenModel, testing::ValuesIn(Golden::cases()),
                         Golden::test_name);

}  // namespace
}  // namespace deltafox
