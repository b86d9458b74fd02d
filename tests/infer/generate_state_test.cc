// Prompts that continue from a state, and the states that generate() returns.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "deltafox/error.h"
#include "deltafox/generate.h"
#include "deltafox/model.h"
#include "infer/generation.h"

namespace deltafox {
namespace {

using test::greedy;
using test::Ids;
using test::Prompts;
using test::tiny_model;

TEST(GenerateFromState, IsTheUnbrokenContinuation) {
  const Model model = tiny_model();
  const Prompts prompts{{17, 4, 99, 200}, {5}, {8, 8, 120, 54, 3, 77}};
  GenerateOptions options;
  options.return_states = true;
  const auto begun = generate(model, prompts, greedy(5), options);

  const Prompts more{{1, 2}, {3}, {4, 5, 6}};
  Prompts whole;
  std::vector<State> states;
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    ASSERT_TRUE(begun[p].state.has_value());
    EXPECT_EQ(begun[p].state->position(), std::ssize(begun[p].ids));
    states.push_back(*begun[p].state);
    whole.push_back(begun[p].ids);
    whole.back().insert(whole.back().end(), more[p].begin(), more[p].end());
  }
  GenerateOptions from_states;
  from_states.initial_states = states;
  const auto resumed = generate(model, more, greedy(12), from_states);
  const auto unbroken = generate(model, whole, greedy(12));
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    const auto got = resumed[p].new_ids();
    const auto expected = unbroken[p].new_ids();
    EXPECT_EQ(Ids(got.begin(), got.end()), Ids(expected.begin(), expected.end()));
    EXPECT_FALSE(resumed[p].state.has_value());
    EXPECT_EQ(states[p].position(), std::ssize(begun[p].ids));  // it was a copy that went on
  }
}

TEST(GenerateFromState, RefusesBeamsAndAnotherNumberOfStates) {
  const Model model = tiny_model();
  const std::vector<State> states{model.new_state(), model.new_state()};
  GenerateOptions options;
  options.initial_states = states;
  EXPECT_THROW(generate(model, Prompts{{1}}, greedy(2), options), Error);
  GenerationConfig beams = greedy(2);
  beams.num_beams = 2;
  EXPECT_THROW(generate(model, Prompts{{1}, {2}}, beams, options), Error);
  GenerateOptions returning;
  returning.return_states = true;
  EXPECT_THROW(generate(model, Prompts{{1}}, beams, returning), Error);
}

}  // namespace
}  // namespace deltafox
