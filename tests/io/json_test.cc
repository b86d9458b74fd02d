// Config files.
#include "io/json.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "io/file.h"
#include "io/io_support.h"

namespace deltafox::io {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

JsonObject config(const std::string& text) {
  return JsonObject::parse(text, "config.json");
}

std::string parse_error(const std::string& text) {
  return error_of([&] { config(text); });
}

TEST(JsonObject, ReadsEveryGoldenConfig) {
  int count = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(DELTAFOX_TEST_DATA "/golden")) {
    if (entry.path().filename() != "config.json") continue;
    const std::string path = entry.path();
    const JsonObject object = JsonObject::parse(read_text_file(path, 1 << 20), path);
    EXPECT_EQ(object.file(), path);
    EXPECT_THAT(object.string("model_type", ""), HasSubstr("-project_fox"));
    EXPECT_GT(object.integer("vocab_size", 0, 0, 1 << 20), 0) << path;
    ++count;
  }
  EXPECT_EQ(count, 11);
}

TEST(JsonObject, ReadsMamba2TimeStepLimit) {
  const std::string path = DELTAFOX_TEST_DATA "/golden/mamba2-tiny/config.json";
  const JsonObject object = JsonObject::parse(read_text_file(path, 1 << 20), path);
  EXPECT_THAT(object.numbers("time_step_limit", 0, kInfinity), ElementsAre(0, kInfinity));
}

TEST(JsonObject, ReadsPythonsNonFiniteNumbersOutsideStrings) {
  const JsonObject object = config(
      R"({"a": [1, -Infinity, 2e3, Infinity, 0], "b": "\"NaN, \\", "Infinity": "Infinity"})");
  EXPECT_THAT(object.numbers("a", -kInfinity, kInfinity),
              ElementsAre(1, -kInfinity, 2000, kInfinity, 0));
  EXPECT_EQ(object.string("b", ""), "\"NaN, \\");
  EXPECT_EQ(object.string("Infinity", ""), "Infinity");
  const nlohmann::json nan = parse_json("NaN", "x", JsonDialect::kPython);
  EXPECT_TRUE(std::isnan(nan.get<double>()));
}

TEST(JsonObject, RefusesWhatOnlyLooksLikeANonFiniteNumber) {
  for (const char* value : {"1Infinity", "Infinity1", "-NaN", "- Infinity", "--Infinity", "NaNs",
                            "1e-Infinity", "infinity", "+Infinity", "Infinit"}) {
    EXPECT_THAT(parse_error(fmt::format("{{\"a\": {}}}", value)),
                StartsWith("config.json: is not JSON: line 1, column "))
        << value;
  }
}

TEST(JsonObject, TheLastOfEqualKeysCounts) {
  EXPECT_EQ(config(R"({"a": 1, "a": 2})").integer("a", 0, 0, 9), 2);
}

TEST(JsonObject, StrictJsonHasUniqueKeysAndFiniteNumbers) {
  const auto strict = [](const char* text) {
    return error_of([&] { parse_json(text, "x", JsonDialect::kStrict); });
  };
  EXPECT_EQ(strict(R"({"a": {"b": 1, "b": 2}})"), "x: key 'b' occurs twice");
  EXPECT_THAT(strict(R"({"a": NaN})"), StartsWith("x: is not JSON: line 1, column 7"));
  EXPECT_EQ(strict(R"({"a": [{"b": 1}, {"b": 2}], "b": {"a": null}})"), "no error");
}

TEST(JsonObject, SaysWhereTheTextIsNotJson) {
  EXPECT_THAT(parse_error("{\n \"a\": trx\n}"),
              StartsWith("config.json: is not JSON: line 2, column 9: syntax error"));
  EXPECT_THAT(parse_error("{\"a\": NaN,\n \"b\": x}"), HasSubstr("line 2, column 7"));
  for (const char* text :
       {"", "{", "{\"a\"}", "{\"a\": 1} x", "{'a': 1}", "{\"a\": 01}", "{\"a\": 1e999}",
        "{\"a\": \"\xff\"}", "{\"a\": \"\n\"}", "{\"a\": \"\\ud800\"}"}) {
    EXPECT_THAT(parse_error(text), StartsWith("config.json: is not JSON: ")) << text;
  }
  EXPECT_EQ(parse_error(std::string("{}\0{", 4)), "config.json: is not JSON: contains a NUL byte");
}

TEST(JsonObject, MustBeAnObject) {
  EXPECT_EQ(parse_error("[1, 2]"), "config.json: must hold a JSON object, got [1,2]");
  EXPECT_EQ(parse_error("null"), "config.json: must hold a JSON object, got null");
}

TEST(JsonObject, BoundsDepth) {
  const auto nested = [](std::size_t depth) {
    return "{\"a\": " + std::string(depth - 1, '[') + std::string(depth - 1, ']') + "}";
  };
  EXPECT_EQ(parse_error(nested(64)), "no error");
  EXPECT_EQ(parse_error(nested(65)), "config.json: is nested deeper than 64 levels");
  EXPECT_EQ(parse_error(std::string(10'000'000, '[')),
            "config.json: is nested deeper than 64 levels");
}

TEST(JsonObject, GettersReturnTheValueOrTheDefault) {
  const JsonObject object = config(
      R"({"i": -3, "n": 1.5, "one": 1.0, "b": true, "s": "x", "l": [1, 2], "o": {"i": 4}, "z": null})");
  EXPECT_EQ(object.integer("i", 7, -9, 9), -3);
  EXPECT_EQ(object.integer("absent", 7, -9, 9), 7);
  EXPECT_EQ(object.number("n", 0, 0, 9), 1.5);
  EXPECT_EQ(object.number("one", 0, 0, 9), 1);
  EXPECT_EQ(object.number("i", 0, -9, 9), -3);
  EXPECT_EQ(object.number("absent", 0.5, 0, 9), 0.5);
  EXPECT_TRUE(object.boolean("b", false));
  EXPECT_TRUE(object.boolean("absent", true));
  EXPECT_EQ(object.string("s", "y"), "x");
  EXPECT_EQ(object.string("absent", "y"), "y");
  EXPECT_EQ(object.choice("s", "y", {"x", "y"}), "x");
  EXPECT_EQ(object.choice("absent", "y", {"x", "y"}), "y");
  EXPECT_EQ(object.object("o")->integer("i", 0, 0, 9), 4);
  EXPECT_FALSE(object.object("absent"));
  EXPECT_TRUE(object.contains("z"));
  EXPECT_FALSE(object.contains("absent"));
}

TEST(JsonObject, NullIsNothingForOptionalGettersAndRefusedByTheOthers) {
  const JsonObject object = config(R"({"z": null, "i": 3, "n": 0.5, "s": "x"})");
  EXPECT_EQ(object.optional_integer("z", 5, 0, 9), std::nullopt);
  EXPECT_EQ(object.optional_integer("absent", 5, 0, 9), 5);
  EXPECT_EQ(object.optional_integer("absent", std::nullopt, 0, 9), std::nullopt);
  EXPECT_EQ(object.optional_integer("i", std::nullopt, 0, 9), 3);
  EXPECT_EQ(object.optional_number("z", 5, 0, 9), std::nullopt);
  EXPECT_EQ(object.optional_number("absent", 5, 0, 9), 5);
  EXPECT_EQ(object.optional_number("n", std::nullopt, 0, 9), 0.5);
  EXPECT_EQ(object.optional_string("z", "d"), std::nullopt);
  EXPECT_EQ(object.optional_string("absent", "d"), "d");
  EXPECT_EQ(object.optional_string("s", std::nullopt), "x");
  EXPECT_FALSE(object.object("z"));
  EXPECT_THAT(object.integers("z", 0, 9), IsEmpty());
  EXPECT_EQ(error_of([&] { object.integer("z", 5, 0, 9); }),
            "config.json: key 'z': must be an integer from 0 to 9, got null");
  EXPECT_EQ(error_of([&] { object.number("z", 5, 0, 9); }),
            "config.json: key 'z': must be a number from 0 to 9, got null");
  EXPECT_EQ(error_of([&] { object.boolean("z", true); }),
            "config.json: key 'z': must be true or false, got null");
  EXPECT_EQ(error_of([&] { object.string("z", ""); }),
            "config.json: key 'z': must be a string, got null");
}

TEST(JsonObject, IntegersAreExactAndInRange) {
  const auto read = [](const std::string& value) {
    return error_of([&] { config("{\"k\": " + value + "}").integer("k", 0, 1, 65536); });
  };
  const std::string expected = "config.json: key 'k': must be an integer from 1 to 65536, got ";
  EXPECT_EQ(read("65536"), "no error");
  EXPECT_EQ(read("1"), "no error");
  for (const char* value : {"0", "65537", "\"abc\"", "true", "1.5", "18446744073709551615",
                            "-9223372036854775808", "[1]", "{}", "Infinity", "NaN"}) {
    EXPECT_EQ(read(value), expected + value);
  }
  EXPECT_THAT(read("18446744073709551616"), StartsWith(expected + "1.8446744073709552e+19"));
  EXPECT_EQ(config("{\"k\": 9223372036854775807}")
                .integer("k", 0, 0, std::numeric_limits<std::int64_t>::max()),
            std::numeric_limits<std::int64_t>::max());
  EXPECT_THAT(error_of([] {
                config("{\"k\": 9223372036854775808}")
                    .integer("k", 0, std::numeric_limits<std::int64_t>::min(),
                             std::numeric_limits<std::int64_t>::max());
              }),
              HasSubstr("got 9223372036854775808"));
}

TEST(JsonObject, NumbersAreInRangeAndNeverNan) {
  const auto read = [](const std::string& value, double max) {
    return error_of([&] { config("{\"k\": " + value + "}").number("k", 0, 0, max); });
  };
  EXPECT_EQ(read("Infinity", kInfinity), "no error");
  EXPECT_EQ(read("Infinity", 2.5),
            "config.json: key 'k': must be a number from 0 to 2.5, got Infinity");
  EXPECT_EQ(read("NaN", kInfinity),
            "config.json: key 'k': must be a number from 0 to Infinity, got NaN");
  EXPECT_EQ(read("-0.5", 1), "config.json: key 'k': must be a number from 0 to 1, got -0.5");
  EXPECT_EQ(read("true", 1), "config.json: key 'k': must be a number from 0 to 1, got true");
}

TEST(JsonObject, RefusesOtherChoices) {
  const JsonObject object = config(R"({"qk_norm": "L2", "n": 2})");
  EXPECT_EQ(error_of([&] {
              object.choice("qk_norm", "l2", {"l2", "sum"});
            }),
            "config.json: key 'qk_norm': must be one of \"l2\", \"sum\", got \"L2\"");
  EXPECT_EQ(error_of([&] { object.choice("n", "l2", {"l2"}); }),
            "config.json: key 'n': must be one of \"l2\", got 2");
}

TEST(JsonObject, ListsTakeASingleValueToo) {
  const JsonObject object = config(R"({"l": [3, 4], "i": 5, "s": ["a", "b"], "bad": [1, "x"]})");
  EXPECT_THAT(object.integers("l", 0, 9), ElementsAre(3, 4));
  EXPECT_THAT(object.integers("i", 0, 9), ElementsAre(5));
  EXPECT_THAT(object.integers("absent", 0, 9), IsEmpty());
  EXPECT_THAT(object.numbers("l", 0, 9), ElementsAre(3, 4));
  EXPECT_THAT(object.strings("s"), ElementsAre("a", "b"));
  EXPECT_EQ(error_of([&] { object.integers("bad", 0, 9); }),
            "config.json: key 'bad': must be an integer from 0 to 9, got \"x\"");
  EXPECT_EQ(error_of([&] { object.integers("l", 0, 3); }),
            "config.json: key 'l': must be an integer from 0 to 3, got 4");
}

TEST(JsonObject, MessagesNameNestedKeysInFull) {
  const JsonObject object = config(R"({"a": {"b": {"c": "x"}}})");
  const JsonObject inner = *object.object("a")->object("b");
  EXPECT_EQ(error_of([&] { inner.integer("c", 0, 0, 1); }),
            "config.json: key 'a.b.c': must be an integer from 0 to 1, got \"x\"");
  EXPECT_EQ(error_of([&] { inner.object("c"); }),
            "config.json: key 'a.b.c': must be an object, got \"x\"");
}

TEST(JsonObject, OutlivesTheDocumentItIsNestedIn) {
  const JsonObject inner =
      *config(R"({"a": {"b": "a string too long to be stored in place"}})").object("a");
  EXPECT_EQ(inner.string("b", ""), "a string too long to be stored in place");
}

TEST(Printable, KeepsTextOnOneLineAndShort) {
  EXPECT_EQ(printable("plain 🦊"), "plain 🦊");
  EXPECT_EQ(printable("a\nb\x1b[0m\x7f"), "a\\x0ab\\x1b[0m\\x7f");
  EXPECT_EQ(printable("\xff\xc3"), "\\xff\\xc3");
  EXPECT_EQ(printable("\xc2\x85"), "\\xc2\\x85");  // a line break in Unicode
  EXPECT_EQ(printable(std::string(1000, 'x')), std::string(200, 'x') + "...");
}

}  // namespace
}  // namespace deltafox::io
