// The pure functions over names and headers, and the digests, against values known from elsewhere.
#include "io/hub_names.h"

#include <filesystem>
#include <string>

#include "io/hub_digest.h"
#include "io/hub_fixture.h"
#include "io/hub_listing.h"

namespace deltafox::test {
namespace {

using hub::DigestKind;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(HubNames, RepoIdsFollowTheHubsRules) {
  for (const char* good : {"gpt2", "org/name", "Foo-BAR_foo.bar123", "a/b.c-d_e", "_x/1"})
    EXPECT_TRUE(hub::is_repo_id(good)) << good;
  for (const char* bad : {"", "/", "a/", "/a", "a/b/c", "a--b", "a..b", ".a", "a-", "a/b.git",
                          "a b", "a/\xc3\xa9", "a\n"})
    EXPECT_FALSE(hub::is_repo_id(bad)) << bad;
  EXPECT_TRUE(hub::is_repo_id(std::string(96, 'a')));
  EXPECT_FALSE(hub::is_repo_id(std::string(97, 'a')));
}

TEST(HubNames, EtagsLoseWeaknessAndQuotes) {
  EXPECT_EQ(hub::normalize_etag("\"abc\""), "abc");
  EXPECT_EQ(hub::normalize_etag("W/\"abc\""), "abc");
  EXPECT_EQ(hub::normalize_etag("abc"), "abc");
  EXPECT_EQ(hub::normalize_etag("\""), "\"");
  EXPECT_EQ(hub::normalize_etag(""), "");
}

TEST(HubNames, DigestKindGoesByLengthAndAlphabet) {
  EXPECT_EQ(hub::digest_kind(std::string(64, 'a')), DigestKind::kSha256);
  EXPECT_EQ(hub::digest_kind(std::string(40, '0')), DigestKind::kGitBlob);
  EXPECT_FALSE(hub::digest_kind(std::string(40, 'A')));
  EXPECT_FALSE(hub::digest_kind(std::string(32, 'a')));
  EXPECT_FALSE(hub::digest_kind(""));
}

TEST(HubNames, ContentRangesAreReadStrictly) {
  const auto range = hub::parse_content_range("bytes 5-9/100");
  ASSERT_TRUE(range);
  EXPECT_EQ(range->first, 5);
  EXPECT_EQ(range->total, 100);
  EXPECT_FALSE(hub::parse_content_range("bytes 5-9/*")->total);
  for (const char* bad :
       {"", "bytes", "bytes 5-/100", "bytes -9/100", "bytes 9-5/100", "bytes */100", "bytes 5-9",
        "5-9/100", "bytes 5-9/", "bytes 5-9/x", "bytes 5/9-100", "bytes 99999999999999999999-5/9"})
    EXPECT_FALSE(hub::parse_content_range(bad)) << bad;
}

TEST(HubNames, PercentEncodingKeepsOnlyUnreservedBytes) {
  EXPECT_EQ(hub::percent_encode("refs/pr/1", false), "refs%2Fpr%2F1");
  EXPECT_EQ(hub::percent_encode("a b/c?#%\xc3\xa9", true), "a%20b/c%3F%23%25%C3%A9");
  EXPECT_EQ(hub::percent_encode("A-z_0.9~", true), "A-z_0.9~");
}

TEST(HubNames, PrintableIsOneShortLine) {
  EXPECT_EQ(hub::printable("a\nb\x1b\xc3\xa9"), "a?b???");
  EXPECT_EQ(hub::printable(std::string(1000, 'x')).size(), 203U);
}

TEST(HubNames, ListingKeepsWhatACheckpointNeedsOnce) {
  const std::string commit(40, 'a');
  const auto listing = hub::parse_listing(
      R"({"sha": ")" + commit +
          R"(", "siblings": [{"rfilename": "x.py"}, {"rfilename": "a.safetensors"},
          {"rfilename": "config.json", "size": 3}, {"rfilename": "a.safetensors"}, {"rfilename": "../x.py"}]})",
      "org/name");
  EXPECT_EQ(listing.commit, commit);
  EXPECT_THAT(listing.files, ElementsAre("a.safetensors", "config.json"));
}

TEST(HubNames, ListingThatIsNoneSaysWhy) {
  const std::string head = R"({"sha": ")" + std::string(40, 'a') + R"(")";
  const std::pair<std::string, const char*> cases[] = {
      {"<html>", "not a JSON object"},
      {"[]", "not a JSON object"},
      {"", "not a JSON object"},
      {std::string(100'000, '['), "not a JSON object"},
      {head, "not a JSON object"},
      {"{}", "names no commit"},
      {R"({"sha": 5})", "names no commit"},
      {head + "}", "no \"siblings\""},
      {head + R"(, "siblings": {}})", "no \"siblings\""},
      {head + R"(, "siblings": ["x"]})", "entry without a name"},
      {head + R"(, "siblings": [{"rfilename": 1}]})", "entry without a name"},
      {head + R"(, "siblings": [[{"rfilename": "x"}]]})", "entry without a name"},
      {head + R"(, "siblings": [{"lfs": {"rfilename": "x"}}]})", "entry without a name"},
      {head + R"(, "other": [{"rfilename": "config.json"}], "siblings": []})", "no config.json"},
      {head + R"(, "siblings": []})", "no config.json"},
      {head + R"(, "siblings": [{"rfilename": "config.json"}]})", "no weights"},
  };
  for (const auto& [text, why] : cases) {
    try {
      hub::parse_listing(text, "org/name");
      ADD_FAILURE() << text;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(why)) << text;
      EXPECT_THAT(error.what(), ::testing::StartsWith("org/name: "));
    }
  }
}

// The empty and the "hello\n" blob are what `git hash-object` and `sha256sum` print.
TEST(HubDigest, AgreesWithGitAndSha256sum) {
  const auto path = std::filesystem::path(::testing::TempDir()) / "deltafox-digest";
  const auto digest = [&](const std::string& text, DigestKind kind) {
    std::ofstream(path, std::ios::binary) << text;
    return hub::file_digest(path.string(), kind, [] {});
  };
  EXPECT_EQ(digest("", DigestKind::kGitBlob), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
  EXPECT_EQ(digest("hello\n", DigestKind::kGitBlob), "ce013625030ba8dba906f756967f9e9ca394464a");
  EXPECT_EQ(digest("", DigestKind::kSha256),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(digest("hello\n", DigestKind::kSha256),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
  std::filesystem::remove(path);
  EXPECT_THROW(hub::file_digest(path.string(), DigestKind::kSha256, [] {}), Error);
}

}  // namespace
}  // namespace deltafox::test
