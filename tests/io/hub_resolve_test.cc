// Finding checkpoints without the network, and the environment variables that say where.
#include <filesystem>
#include <string>

#include "io/hub_env.h"
#include "io/hub_fixture.h"

namespace deltafox::test {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class HubResolve : public HubTest {
 protected:
  // As Python's huggingface_hub leaves it.
  fs::path cached(const std::string& revision) const {
    fs::path snapshot = repository() / "snapshots" / hub_.commit;
    write(repository() / "blobs" / hub_.etag("config.json"), hub_.files.at("config.json"));
    fs::create_directories(snapshot);
    fs::create_symlink("../../blobs/" + hub_.etag("config.json"), snapshot / "config.json");
    write(repository() / "refs" / revision, hub_.commit);
    return snapshot;
  }
};

TEST_F(HubResolve, DirectoryIsItself) {
  EXPECT_EQ(hub::resolve(root_.string()), root_.string());
}

TEST_F(HubResolve, IdIsFoundByBranchTagAndCommit) {
  const fs::path snapshot = cached("main");
  EXPECT_EQ(hub::resolve("org/tiny"), snapshot);
  EXPECT_EQ(hub::resolve("org/tiny", hub_.commit), snapshot);
  EXPECT_THAT(
      error_of([] { hub::resolve("org/tiny", "v2"); }),
      AllOf(HasSubstr("at revision v2"), HasSubstr("deltafox pull org/tiny --revision v2")));
  EXPECT_THAT(hub_.requests(), IsEmpty());
}

TEST_F(HubResolve, MissingIdTellsHowToGetIt) {
  EXPECT_EQ(error_of([] { hub::resolve("org/tiny"); }),
            "org/tiny: no such directory, and not in the cache " + (root_ / "hub").string() +
                "; get it with: deltafox pull org/tiny");
}

TEST_F(HubResolve, PartOfASnapshotIsNotFound) {
  fs::remove(cached("main") / "config.json");
  EXPECT_THAT(error_of([] { hub::resolve("org/tiny"); }), HasSubstr("deltafox pull org/tiny"));
}

TEST_F(HubResolve, WhatIsNeitherPathNorIdSaysSo) {
  for (const std::string text : {"", "./no/such/dir", "/no/such", "a/b/c"})
    EXPECT_THAT(error_of([&] { hub::resolve(text); }),
                HasSubstr("is neither a directory nor a hub id"));
  write(root_ / "file", "x");
  EXPECT_THAT(error_of([&] { hub::resolve((root_ / "file").string()); }),
              HasSubstr("is a file, not a checkpoint directory"));
}

TEST_F(HubResolve, DamagedRefIsAnError) {
  cached("main");
  write(repository() / "refs" / "main", "../../etc");
  EXPECT_THAT(error_of([] { hub::resolve("org/tiny"); }), HasSubstr("does not hold a commit"));
}

TEST_F(HubResolve, OfflinePullOnlyLooksIntoTheCache) {
  environment_.set("HF_HUB_OFFLINE", "YES");
  EXPECT_THAT(pull_error(), AllOf(HasSubstr("not in the cache"), HasSubstr("HF_HUB_OFFLINE")));
  const fs::path snapshot = cached("main");
  EXPECT_EQ(pull(), snapshot);
  EXPECT_THAT(hub_.requests(), IsEmpty());
  environment_.set("HF_HUB_OFFLINE", "0");
  pull();
  EXPECT_THAT(hub_.requests("GET model.safetensors"), SizeIs(1));
  EXPECT_THAT(hub_.requests("GET config.json"), IsEmpty());
}

TEST_F(HubResolve, CacheDirectoryFollowsTheEnvironment) {
  environment_.set("HOME", "/home/fox");
  environment_.set("HF_HOME", std::nullopt);
  EXPECT_EQ(hub::cache_directory(), "/home/fox/.cache/huggingface/hub");
  environment_.set("XDG_CACHE_HOME", "/xdg");
  EXPECT_EQ(hub::cache_directory(), "/xdg/huggingface/hub");
  environment_.set("HF_HOME", "~/hf");
  EXPECT_EQ(hub::cache_directory(), "/home/fox/hf/hub");
  environment_.set("HUGGINGFACE_HUB_CACHE", "/legacy");
  EXPECT_EQ(hub::cache_directory(), "/legacy");
  environment_.set("HF_HUB_CACHE", "$HOME/${XDG_CACHE_HOME}x/$NO_SUCH_NAME/$");
  EXPECT_EQ(hub::cache_directory().string(), "/home/fox//xdgx/$NO_SUCH_NAME/$");
}

TEST_F(HubResolve, WithoutAHomeTheErrorNamesTheVariable) {
  environment_.set("HOME", std::nullopt);
  environment_.set("HF_HOME", std::nullopt);
  EXPECT_THAT(error_of([] { hub::resolve("org/tiny"); }), HasSubstr("set HF_HOME"));
}

}  // namespace
}  // namespace deltafox::test
