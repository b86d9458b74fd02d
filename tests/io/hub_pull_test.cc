// Pulls that succeed: the layout they leave, what they ask for, and what they do not ask for again.
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "io/hub_fixture.h"

namespace deltafox::test {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class HubPull : public HubTest {};

TEST_F(HubPull, LeavesTheLayoutOfHuggingfaceHub) {
  const std::string snapshot = pull();
  EXPECT_EQ(snapshot, repository() / "snapshots" / hub_.commit);
  EXPECT_EQ(contents(repository() / "refs" / "main"), hub_.commit);
  for (const std::string name : {"config.json", "vocab.json", "model.safetensors"}) {
    const fs::path link = fs::path(snapshot) / name;
    ASSERT_TRUE(fs::is_symlink(link)) << name;
    EXPECT_EQ(fs::read_symlink(link), fs::path("../../blobs") / hub_.etag(name));
    EXPECT_EQ(contents(link), hub_.files[name]);
    EXPECT_TRUE(
        fs::exists(root_ / "hub" / ".locks" / "models--org--tiny" / (hub_.etag(name) + ".lock")));
  }
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(repository()))
    if (!entry.is_directory()) names.push_back(entry.path().filename());
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("main", "config.json", "vocab.json",
                                                     "model.safetensors", hub_.etag("config.json"),
                                                     hub_.etag("vocab.json"), hub_.etag(kWeights)));
}

TEST_F(HubPull, FetchesOnlyWhatACheckpointNeeds) {
  hub_.files["modeling.py"] = "import os";
  hub_.files["tokenizer_config.json"] = "{}";
  hub_.files["tokenizer.model"] = "spm";
  pull();
  std::vector<std::string> gets;
  for (const auto& request : hub_.requests())
    if (request.method == "GET") gets.push_back(request.brief());
  EXPECT_THAT(gets,
              ElementsAre("GET /api/models/org/tiny/revision/main", "GET config.json",
                          "GET model.safetensors", "GET tokenizer_config.json", "GET vocab.json"));
}

TEST_F(HubPull, SecondPullOnlyAsksForTheCommit) {
  const std::string first = pull();
  hub_.forget_requests();
  EXPECT_EQ(pull(), first);
  ASSERT_THAT(hub_.requests(), SizeIs(1));
  EXPECT_EQ(hub_.requests()[0].brief(), "GET /api/models/org/tiny/revision/main");
}

TEST_F(HubPull, NewCommitFetchesOnlyWhatChanged) {
  pull();
  hub_.commit.back() = '2';
  hub_.files["config.json"] = R"({"model_type": "hgrn2-project_fox"})";
  hub_.forget_requests();
  const std::string snapshot = pull();
  EXPECT_THAT(hub_.requests("GET config.json"), SizeIs(1));
  EXPECT_THAT(hub_.requests("GET model.safetensors"), IsEmpty());
  EXPECT_EQ(contents(fs::path(snapshot) / kWeights), hub_.files[kWeights]);
  EXPECT_EQ(contents(repository() / "refs" / "main"), hub_.commit);
}

TEST_F(HubPull, CompleteCacheMayBeReadOnly) {
  const std::string snapshot = pull();
  const auto before = fs::last_write_time(repository() / "refs");
  fs::remove_all(root_ / "hub" / ".locks");
  EXPECT_EQ(pull(), snapshot);
  EXPECT_FALSE(fs::exists(root_ / "hub" / ".locks"));
  EXPECT_EQ(fs::last_write_time(repository() / "refs"), before);
}

TEST_F(HubPull, RestoresABlobThatWasRemovedOrCutShort) {
  const fs::path snapshot = pull();
  fs::remove(repository() / "blobs" / hub_.etag(kWeights));
  pull();
  EXPECT_EQ(contents(snapshot / kWeights), hub_.files[kWeights]);

  write(repository() / "blobs" / hub_.etag(kWeights), "short");
  fs::remove(snapshot / kWeights);
  pull();
  EXPECT_EQ(contents(snapshot / kWeights), hub_.files[kWeights]);
}

TEST_F(HubPull, NestedFilesAndShardsKeepTheirPaths) {
  hub_.files.erase(kWeights);
  hub_.files["model.safetensors.index.json"] =
      R"({"weight_map": {"a": "shards/1/x.safetensors", "b": "model-00002-of-00002.safetensors"}})";
  hub_.files["shards/1/x.safetensors"] = "first";
  hub_.files["model-00002-of-00002.safetensors"] = "second";
  const fs::path snapshot = pull();
  EXPECT_EQ(fs::read_symlink(snapshot / "shards/1/x.safetensors"),
            fs::path("../../../../blobs") / sha256("first"));
  EXPECT_EQ(contents(snapshot / "shards/1/x.safetensors"), "first");
  EXPECT_EQ(contents(snapshot / "model-00002-of-00002.safetensors"), "second");
  EXPECT_EQ(contents(snapshot / "model.safetensors.index.json"),
            hub_.files["model.safetensors.index.json"]);
}

TEST_F(HubPull, EmptyFilesAndEqualContentsArePulled) {
  hub_.files["merges.txt"] = "";
  hub_.files["extra.safetensors"] = hub_.files[kWeights];
  const fs::path snapshot = pull();
  EXPECT_EQ(contents(snapshot / "merges.txt"), "");
  EXPECT_EQ(contents(snapshot / "extra.safetensors"), hub_.files[kWeights]);
  EXPECT_EQ(
      hub_.requests("GET model.safetensors").size() + hub_.requests("GET extra.safetensors").size(),
      1U);
}

TEST_F(HubPull, IdWithoutOrganisation) {
  hub_.id = "gpt2";
  EXPECT_EQ(pull(), root_ / "hub" / "models--gpt2" / "snapshots" / hub_.commit);
  EXPECT_EQ(hub::resolve("gpt2"), root_ / "hub" / "models--gpt2" / "snapshots" / hub_.commit);
}

TEST_F(HubPull, RevisionMayHoldSlashes) {
  hub_.revision = options_.revision = "refs/pr/1";
  const std::string snapshot = pull();
  EXPECT_EQ(hub_.requests()[0].target, "/api/models/org/tiny/revision/refs%2Fpr%2F1");
  EXPECT_EQ(contents(repository() / "refs" / "refs" / "pr" / "1"), hub_.commit);
  EXPECT_EQ(hub::resolve("org/tiny", "refs/pr/1"), snapshot);
}

TEST_F(HubPull, CommitAsRevisionNeedsNoRef) {
  options_.revision = hub_.commit;
  const std::string snapshot = pull();
  EXPECT_FALSE(fs::exists(repository() / "refs"));
  EXPECT_EQ(hub::resolve("org/tiny", hub_.commit), snapshot);
}

TEST_F(HubPull, SendsTheTokenOfTheEnvironmentOrTheFile) {
  write(root_ / "token", "from-file\n");
  options_.revision = "main";
  pull();
  for (const auto& request : hub_.requests())
    EXPECT_EQ(request.header("authorization"), "Bearer from-file") << request.brief();

  environment_.set("HF_TOKEN", " from-variable\n");
  hub_.forget_requests();
  pull();
  EXPECT_EQ(hub_.requests()[0].header("authorization"), "Bearer from-variable");

  environment_.set("HF_TOKEN", "");
  write(root_ / "elsewhere", "from-path");
  environment_.set("HF_TOKEN_PATH", (root_ / "elsewhere").string());
  hub_.forget_requests();
  pull();
  EXPECT_EQ(hub_.requests()[0].header("authorization"), "Bearer from-path");
}

TEST_F(HubPull, TokenStaysWithItsHost) {
  environment_.set("HF_TOKEN", "secret");
  hub_.intercept = [this](const HubRequest& request, HubReply& reply) {
    if (request.brief() != "GET model.safetensors" && request.brief() != "HEAD model.safetensors")
      return;
    if (request.header("host").starts_with("localhost")) return;
    reply.status = 302;
    reply.headers["Location"] = hub_.url("localhost") + request.target;
  };
  const fs::path snapshot = pull();
  EXPECT_EQ(contents(snapshot / kWeights), hub_.files[kWeights]);
  int elsewhere = 0;
  for (const auto& request : hub_.requests()) {
    const bool foreign = request.header("host").starts_with("localhost");
    elsewhere += foreign ? 1 : 0;
    EXPECT_EQ(request.header("authorization"), foreign ? "" : "Bearer secret") << request.brief();
  }
  EXPECT_EQ(elsewhere, 1) << "the HEAD must stop at the answer with X-Linked-Etag";
}

TEST_F(HubPull, FollowsRelativeRedirects) {
  hub_.intercept = [this](const HubRequest& request, HubReply& reply) {
    if (request.target.ends_with("/config.json")) {
      reply = HubReply();
      reply.status = 307;
      reply.headers["Location"] = "/moved?file=config.json";
    } else if (request.target == "/moved?file=config.json") {
      reply = HubReply();
      reply.headers["X-Repo-Commit"] = hub_.commit;
      reply.headers["ETag"] = '"' + hub_.etag("config.json") + '"';
      reply.body = hub_.files["config.json"];
    }
  };
  EXPECT_EQ(contents(fs::path(pull()) / "config.json"), hub_.files["config.json"]);
  EXPECT_THAT(hub_.requests("GET /moved?file=config.json"), SizeIs(1));
  EXPECT_THAT(hub_.requests("HEAD /moved?file=config.json"), SizeIs(1));
}

TEST_F(HubPull, ReportsProgressOfEveryFile) {
  std::map<std::string, hub::Progress> last;
  options_.on_progress = [&](const hub::Progress& progress) {
    EXPECT_LE(progress.done_bytes, progress.total_bytes);
    last[progress.file] = progress;
    return true;
  };
  pull();
  for (const std::string name : {"config.json", "vocab.json", "model.safetensors"}) {
    ASSERT_TRUE(last.contains(name));
    EXPECT_EQ(last[name].total_bytes, static_cast<std::int64_t>(hub_.files[name].size()));
    EXPECT_EQ(last[name].done_bytes, last[name].total_bytes);
  }
}

TEST_F(HubPull, ConcurrentPullsFetchEachBlobOnce) {
  std::vector<std::string> snapshots(4);
  std::vector<std::thread> pullers;
  pullers.reserve(snapshots.size());
  for (auto& snapshot : snapshots) pullers.emplace_back([&] { snapshot = pull(); });
  for (auto& puller : pullers) puller.join();
  for (const auto& snapshot : snapshots) {
    EXPECT_EQ(contents(fs::path(snapshot) / kWeights), hub_.files[kWeights]);
    EXPECT_EQ(contents(fs::path(snapshot) / "config.json"), hub_.files["config.json"]);
  }
  EXPECT_THAT(hub_.requests("GET model.safetensors"), SizeIs(1));
  EXPECT_THAT(hub_.requests("GET config.json"), SizeIs(1));
}

}  // namespace
}  // namespace deltafox::test
