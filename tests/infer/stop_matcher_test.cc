#include "infer/stop_matcher.h"

#include <gtest/gtest.h>

namespace deltafox::infer {

namespace {

struct Outcome {
  std::vector<std::string> shown;  // one for each piece, then the rest if nothing was found
  std::string found;
};
bool operator==(const Outcome& a, const Outcome& b) {
  return a.shown == b.shown && a.found == b.found;
}
std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  return out << testing::PrintToString(outcome.shown) << ", found \"" << outcome.found << '"';
}

Outcome push_all(StopMatcher matcher, const std::vector<std::string>& pieces) {
  Outcome outcome;
  for (const std::string& piece : pieces) {
    outcome.shown.push_back(matcher.push(piece));
    if (!matcher.found().empty()) break;
  }
  const std::string rest = matcher.finish();
  outcome.found = matcher.found();
  if (outcome.found.empty()) {
    outcome.shown.push_back(rest);
  } else {
    EXPECT_EQ(rest, "");
  }
  return outcome;
}

Outcome match(std::vector<std::string> stops, bool keep, const std::vector<std::string>& pieces,
              std::string_view before = "") {
  return push_all(StopMatcher(std::move(stops), keep, before), pieces);
}

}  // namespace

TEST(StopMatcher, ShowsEverythingAtOnceWithoutStopStrings) {
  EXPECT_EQ(match({}, true, {"a", "bc"}), (Outcome{{"a", "bc", ""}, ""}));
}

// The examples that transformers documents for "stop".
TEST(StopMatcher, FindsAStopStringWhateverThePiecesAre) {
  const std::vector<std::vector<std::string>> matching = {{"st", "op"},      {"stop"},
                                                          {"st", "opera"},   {"sto", "pper"},
                                                          {"las", "topper"}, {"s", "to", "pped"}};
  for (const auto& pieces : matching) {
    std::string all;
    for (const auto& piece : pieces) all += piece;
    const Outcome kept = match({"stop"}, true, pieces);
    EXPECT_EQ(kept.found, "stop");
    std::string shown;
    for (const auto& piece : kept.shown) shown += piece;
    EXPECT_EQ(shown, all);
    const Outcome cut = match({"stop"}, false, pieces);
    std::string shown_cut;
    for (const auto& piece : cut.shown) shown_cut += piece;
    EXPECT_EQ(shown_cut, all.substr(0, all.find("stop")));
  }
}

TEST(StopMatcher, HoldsBackOnlyWhatMayBecomeAStopString) {
  EXPECT_EQ(match({"stop"}, false, {"a s", "to", "w st", "op", "never"}),
            (Outcome{{"a ", "", "stow ", ""}, "stop"}));
  EXPECT_EQ(match({"stop"}, true, {"a s", "to", "w st", "op!"}),
            (Outcome{{"a ", "", "stow ", "stop!"}, "stop"}));
  EXPECT_EQ(match({"stop"}, false, {"as", "t"}), (Outcome{{"a", "", "st"}, ""}));
}

TEST(StopMatcher, FollowsSelfOverlappingPrefixes) {
  EXPECT_EQ(match({"aab"}, false, {"a", "a", "a", "b"}), (Outcome{{"", "", "a", ""}, "aab"}));
}

TEST(StopMatcher, MayBeginInThePromptButNotEndThere) {
  EXPECT_EQ(match({"stop"}, true, {"op"}, "non st"), (Outcome{{"op"}, "stop"}));
  EXPECT_EQ(match({"stop"}, false, {"op it"}, "non st"), (Outcome{{""}, "stop"}));
  EXPECT_EQ(match({"stop"}, true, {" it"}, "non stop"), (Outcome{{" it", ""}, ""}));
  // What the prompt holds is never shown, even where it begins a stop string that does not come.
  EXPECT_EQ(match({"stop"}, true, {"o", "w"}, "st"), (Outcome{{"", "ow", ""}, ""}));
}

TEST(StopMatcher, TakesTheMatchThatBeginsFirstThenTheLongest) {
  EXPECT_EQ(match({"cd", "bcd", "bc"}, false, {"abcde"}), (Outcome{{"a"}, "bcd"}));
}

TEST(StopMatcher, EmptyPiecesChangeNothing) {
  EXPECT_EQ(match({"stop"}, false, {"s", "", "t", "", "op"}),
            (Outcome{{"", "", "", "", ""}, "stop"}));
}

TEST(StopMatcher, LongTextsAreNotKept) {
  StopMatcher matcher({"xyz"}, true, std::string(1000, 'x'));
  std::string shown;
  for (int i = 0; i < 1000; ++i) shown += matcher.push("xy");
  shown += matcher.finish();
  std::string expected;
  for (int i = 0; i < 1000; ++i) expected += "xy";
  EXPECT_EQ(shown, expected);
}

}  // namespace deltafox::infer
