// What a pull does when the server, the network, the disk or the user lets it down.
#include <atomic>
#include <filesystem>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io/hub_cache.h"
#include "io/hub_fixture.h"

namespace deltafox::test {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

constexpr const char* kGetWeights = "GET model.safetensors";
constexpr const char* kHeadWeights = "HEAD model.safetensors";
constexpr const char* kList = "GET /api/models/org/tiny/revision/main";

class HubFailure : public HubTest {
 protected:
  void expect_complete(const std::string& snapshot) {
    EXPECT_EQ(contents(fs::path(snapshot) / kWeights), hub_.files[kWeights]);
    EXPECT_FALSE(fs::exists(partial()));
  }
  void expect_nothing_named() {
    EXPECT_FALSE(fs::exists(repository() / "snapshots"));
    EXPECT_FALSE(fs::exists(repository() / "refs"));
    EXPECT_FALSE(fs::exists(repository() / "blobs" / hub_.etag(kWeights)));
  }
};

TEST_F(HubFailure, DroppedConnectionResumesWhereItBroke) {
  misbehave(kGetWeights, 1, [](HubReply& reply) { reply.cut_after = 60'000; });
  expect_complete(pull());
  const auto gets = hub_.requests(kGetWeights);
  ASSERT_THAT(gets, SizeIs(2));
  EXPECT_EQ(gets[0].header("range"), "");
  EXPECT_EQ(gets[1].header("range"), "bytes=60000-");
}

TEST_F(HubFailure, GainedBytesRenewThePatience) {
  // Ten pieces: more failures than max_retries allows in a row.
  misbehave(kGetWeights, 9, [](HubReply& reply) { reply.cut_after = 10'000; });
  expect_complete(pull());
  EXPECT_THAT(hub_.requests(kGetWeights), SizeIs(10));
}

TEST_F(HubFailure, PartialFileOfAnEarlierPullIsResumed) {
  misbehave(kGetWeights, kAlways,
            [](HubReply& reply) { reply.cut_after = reply.status == 200 ? 40'000 : 0; });
  EXPECT_THAT(pull_error(),
              AllOf(StartsWith("org/tiny: model.safetensors: "), HasSubstr("times in a row")));
  EXPECT_EQ(contents(partial()), hub_.files[kWeights].substr(0, 40'000));
  expect_nothing_named();

  hub_.intercept = nullptr;
  hub_.forget_requests();
  expect_complete(pull());
  ASSERT_THAT(hub_.requests(kGetWeights), SizeIs(1));
  EXPECT_EQ(hub_.requests(kGetWeights)[0].header("range"), "bytes=40000-");
  EXPECT_THAT(hub_.requests("GET config.json"), IsEmpty());
}

TEST_F(HubFailure, CompletePartialFileIsOnlyChecked) {
  write(partial(), hub_.files[kWeights]);
  expect_complete(pull());
  EXPECT_THAT(hub_.requests(kGetWeights), IsEmpty());
}

TEST_F(HubFailure, PartialFileThatIsTooLongIsBegunAnew) {
  write(partial(), hub_.files[kWeights] + "more");
  expect_complete(pull());
  EXPECT_EQ(hub_.requests(kGetWeights).at(0).header("range"), "");
}

TEST_F(HubFailure, ServerThatIgnoresRangeIsReadFromTheStart) {
  write(partial(), hub_.files[kWeights].substr(0, 30'000));
  misbehave(kGetWeights, 1, [this](HubReply& reply) {
    reply.status = 200;
    reply.headers.erase("Content-Range");
    reply.body = hub_.files[kWeights];
  });
  expect_complete(pull());
  ASSERT_THAT(hub_.requests(kGetWeights), SizeIs(1));
  EXPECT_EQ(hub_.requests(kGetWeights)[0].header("range"), "bytes=30000-");
}

TEST_F(HubFailure, ServerThatIgnoresRangeAndDropsIsNotAskedForever) {
  misbehave(kGetWeights, kAlways, [this](HubReply& reply) {
    reply = HubReply();
    reply.body = hub_.files[kWeights];
    reply.cut_after = 50'000;
  });
  EXPECT_THAT(pull_error(), HasSubstr("3 times in a row"));
  EXPECT_THAT(hub_.requests(kGetWeights), SizeIs(3));
}

TEST_F(HubFailure, RangeNotSatisfiableBeginsAnew) {
  write(partial(), hub_.files[kWeights].substr(0, 30'000));
  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 416;
  });
  expect_complete(pull());
  EXPECT_EQ(hub_.requests(kGetWeights).at(1).header("range"), "");
}

TEST_F(HubFailure, RangeThatWasNotAskedForIsRefused) {
  write(partial(), hub_.files[kWeights].substr(0, 30'000));
  misbehave(kGetWeights, 1,
            [](HubReply& reply) { reply.headers["Content-Range"] = "bytes 5-99999/100000"; });
  EXPECT_THAT(pull_error(), HasSubstr("asked for bytes from 30000, the server sends 'bytes 5-"));
  EXPECT_FALSE(fs::exists(partial()));
  expect_nothing_named();
}

TEST_F(HubFailure, WrongContentsAreDiscardedNamingBothDigests) {
  std::string wrong = hub_.files[kWeights];
  wrong[500] ^= 1;
  misbehave(kGetWeights, 1, [&](HubReply& reply) { reply.body = wrong; });
  EXPECT_THAT(pull_error(), AllOf(StartsWith("org/tiny: model.safetensors: "),
                                  HasSubstr("expected the digest " + hub_.etag(kWeights) +
                                            ", got " + sha256(wrong))));
  EXPECT_FALSE(fs::exists(partial()));
  expect_nothing_named();
  expect_complete(pull());
}

TEST_F(HubFailure, WrongContentsOfASmallFileAreDiscarded) {
  const std::string wrong(hub_.files["config.json"].size(), 'x');
  misbehave("GET config.json", 1, [&](HubReply& reply) { reply.body = wrong; });
  EXPECT_THAT(pull_error(), AllOf(HasSubstr("config.json"), HasSubstr(git_blob_id(wrong)),
                                  HasSubstr(hub_.etag("config.json"))));
  expect_nothing_named();
}

TEST_F(HubFailure, DamagedPartialFileIsDiscarded) {
  write(partial(), std::string(30'000, 'x'));
  EXPECT_THAT(pull_error(), HasSubstr("expected the digest"));
  EXPECT_FALSE(fs::exists(partial()));
  expect_complete(pull());
}

TEST_F(HubFailure, OtherSizeThanPromisedIsRefused) {
  misbehave(kGetWeights, 1, [](HubReply& reply) { reply.body += "more"; });
  EXPECT_THAT(pull_error(), HasSubstr("expected 100000 bytes, the server offers 100004"));
  EXPECT_FALSE(fs::exists(partial()));

  misbehave(kGetWeights, 1, [](HubReply& reply) { reply.body.resize(99'000); });
  EXPECT_THAT(pull_error(), HasSubstr("expected 100000 bytes, the server offers 99000"));

  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply.body += "more";
    reply.chunked = true;
  });
  EXPECT_THAT(pull_error(), HasSubstr("expected 100000 bytes, the server sends more"));
  EXPECT_FALSE(fs::exists(partial()));

  misbehave(kGetWeights, kAlways, [](HubReply& reply) {
    reply = HubReply();
    reply.body = "short";
    reply.chunked = true;
  });
  EXPECT_THAT(pull_error(), HasSubstr("expected 100000 bytes, the server sent 5"));
  expect_nothing_named();
}

TEST_F(HubFailure, RefusedAccessTellsAboutTheToken) {
  misbehave(kList, 1, [](HubReply& reply) { reply.status = 401; });
  EXPECT_THAT(pull_error(), AllOf(StartsWith("org/tiny: access refused with 401"),
                                  HasSubstr("gated"), HasSubstr("set HF_TOKEN")));
  environment_.set("HF_TOKEN", "abc");
  misbehave(kHeadWeights, 1, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 403;
    reply.headers["X-Error-Message"] = "Access to model org/tiny is restricted.";
  });
  EXPECT_THAT(pull_error(),
              AllOf(StartsWith("org/tiny: model.safetensors: access refused with 403"),
                    HasSubstr("Access to model org/tiny is restricted."),
                    HasSubstr("the token in use may not read it"), Not(HasSubstr("abc"))));
}

TEST_F(HubFailure, NotFoundSaysWhatIsMissing) {
  hub_.id = "org/other";
  options_.revision = "v9";
  EXPECT_THAT(error_of([&] { hub::pull("org/tiny", options_); }),
              StartsWith("org/tiny: repository not found"));
  misbehave("GET /api/models/org/other/revision/v9", 1,
            [](HubReply& reply) { reply.headers["X-Error-Code"] = "RevisionNotFound"; });
  EXPECT_THAT(pull_error(), StartsWith("org/other: revision 'v9' not found"));
  misbehave("GET /api/models/org/other/revision/v9", 1,
            [](HubReply& reply) { reply.headers.clear(); });
  EXPECT_THAT(pull_error(), StartsWith("org/other: repository or revision 'v9' not found"));

  hub_.id = "org/tiny";
  options_.revision = "main";
  misbehave(kHeadWeights, 1, [](HubReply& reply) { reply.status = 404; });
  EXPECT_THAT(pull_error(), StartsWith("org/tiny: model.safetensors: file not found"));
  misbehave(kGetWeights, 1, [](HubReply& reply) { reply.status = 418; });
  EXPECT_THAT(pull_error(), HasSubstr("answered with status 418"));
}

TEST_F(HubFailure, RetryAfterIsObeyed) {
  misbehave(kHeadWeights, 1, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 429;
    reply.headers["Retry-After"] = "1";
  });
  const auto start = std::chrono::steady_clock::now();
  expect_complete(pull());
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  EXPECT_THAT(hub_.requests(kHeadWeights), SizeIs(2));
}

TEST_F(HubFailure, RetryAfterBeyondTheLimitIsAnError) {
  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 429;
    reply.headers["Retry-After"] = "86400";
  });
  EXPECT_THAT(pull_error(), AllOf(HasSubstr("429"), HasSubstr("asks to wait 86400 s")));
}

TEST_F(HubFailure, ServerErrorsAreTriedAgain) {
  for (const char* brief : {kList, kHeadWeights, kGetWeights}) {
    fs::remove_all(repository());
    hub_.forget_requests();
    misbehave(brief, 2, [](HubReply& reply) {
      reply = HubReply();
      reply.status = 503;
      reply.body = "busy";
    });
    expect_complete(pull());
    EXPECT_THAT(hub_.requests(brief), SizeIs(3));
  }
}

TEST_F(HubFailure, ServerErrorsForeverAreReportedAfterTheLastTry) {
  misbehave(kGetWeights, kAlways, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 502;
  });
  EXPECT_THAT(pull_error(), AllOf(StartsWith("org/tiny: model.safetensors: "),
                                  HasSubstr("status 502, 3 times in a row")));
  EXPECT_THAT(hub_.requests(kGetWeights), SizeIs(3));
  expect_nothing_named();
}

TEST_F(HubFailure, RetriesWaitTwiceAsLongEachTime) {
  options_.retry_delay = std::chrono::milliseconds(50);
  misbehave(kList, kAlways, [](HubReply& reply) { reply.status = 500; });
  const auto start = std::chrono::steady_clock::now();
  pull_error();
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(50 + 100));
}

TEST_F(HubFailure, StalledServerIsTriedAgain) {
  options_.stall_timeout = std::chrono::milliseconds(200);
  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply.cut_after = 70'000;
    reply.stall = true;
  });
  expect_complete(pull());
  EXPECT_EQ(hub_.requests(kGetWeights).at(1).header("range"), "bytes=70000-");
}

TEST_F(HubFailure, ClosedPortIsReportedAtOnce) {
  options_.max_retries = 100;
  options_.retry_delay = std::chrono::seconds(10);
  environment_.set("HF_ENDPOINT", "http://127.0.0.1:1");
  EXPECT_THAT(pull_error(), AllOf(StartsWith("org/tiny: http://127.0.0.1:1/api/"),
                                  HasSubstr("Failed to connect")));
}

TEST_F(HubFailure, StoppedPullKeepsThePartialFileAndResumes) {
  options_.on_progress = [](const hub::Progress& progress) { return progress.done_bytes < 50'000; };
  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply.cut_after = 50'000;
    reply.stall = true;
  });
  EXPECT_THAT(pull_error(), StartsWith("org/tiny: model.safetensors: stopped"));
  EXPECT_EQ(contents(partial()), hub_.files[kWeights].substr(0, 50'000));
  expect_nothing_named();

  options_.on_progress = nullptr;
  expect_complete(pull());
  EXPECT_EQ(hub_.requests(kGetWeights).at(1).header("range"), "bytes=50000-");
}

TEST_F(HubFailure, StopIsHeardWhileWaiting) {
  options_.retry_delay = std::chrono::hours(1);
  misbehave(kHeadWeights, kAlways, [](HubReply& reply) { reply.status = 500; });
  int calls = 0;
  options_.on_progress = [&](const hub::Progress& progress) {
    return progress.file != kWeights || ++calls < 3;
  };
  EXPECT_THAT(pull_error(), HasSubstr("stopped"));
}

TEST_F(HubFailure, StopIsHeardWhileAnotherProcessDownloads) {
  const fs::path path =
      root_ / "hub" / ".locks" / "models--org--tiny" / (hub_.etag(kWeights) + ".lock");
  fs::create_directories(path.parent_path());
  const hub::FileLock lock(path, [] {});
  int calls = 0;
  options_.on_progress = [&](const hub::Progress& progress) {
    return progress.file != kWeights || ++calls < 3;
  };
  EXPECT_THAT(pull_error(), HasSubstr("stopped"));
  EXPECT_THAT(hub_.requests(kGetWeights), IsEmpty());
}

TEST_F(HubFailure, LockThatIsRemovedWhileHeldIsTakenAnew) {
  const fs::path path = root_ / "lock";
  std::optional<hub::FileLock> first(std::in_place, path, [] {});
  std::atomic<bool> waits = false;
  std::thread second([&] {
    const hub::FileLock lock(path, [&] { waits = true; });
    EXPECT_TRUE(fs::exists(path));
  });
  while (!waits) std::this_thread::yield();
  fs::remove(path);
  first.reset();
  second.join();
}

TEST_F(HubFailure, SignedUrlsAreNotPrinted) {
  hub_.intercept = [](const HubRequest& request, HubReply& reply) {
    if (request.brief() == kGetWeights) {
      reply.status = 302;
      reply.headers["Location"] = "/cdn/x?Signature=secret";
    } else if (request.target.starts_with("/cdn/")) {
      reply.status = 410;
    }
  };
  EXPECT_THAT(pull_error(),
              AllOf(HasSubstr("/cdn/x answered with status 410"), Not(HasSubstr("secret"))));
}

TEST_F(HubFailure, WhatOnProgressThrowsReachesTheCaller) {
  options_.on_progress = [](const hub::Progress& progress) -> bool {
    if (progress.done_bytes > 0) throw std::runtime_error("from the caller");
    return true;
  };
  EXPECT_THROW(pull(), std::runtime_error);
}

TEST_F(HubFailure, FullDiskIsAnErrorThatNamesTheFile) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  fs::create_directories(repository() / "blobs");
  fs::create_symlink("/dev/full", partial());
  EXPECT_THAT(pull_error(), AllOf(HasSubstr(partial().string()), HasSubstr("No space left")));
}

TEST_F(HubFailure, FileLargerThanTheDiskIsNotBegun) {
  misbehave(kHeadWeights, 1,
            [](HubReply& reply) { reply.headers["X-Linked-Size"] = "4000000000000000000"; });
  EXPECT_THAT(pull_error(), HasSubstr("needs 4000000000000000000 bytes"));
  EXPECT_THAT(hub_.requests(kGetWeights), IsEmpty());
}

TEST_F(HubFailure, UnsafeNamesAreRefused) {
  for (const std::string name : {"../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors",
                                 "a//x.safetensors", "a\\..\\x.safetensors", "a\nb.safetensors"}) {
    hub_.files[name] = "evil";
    EXPECT_THAT(pull_error(), HasSubstr("unsafe name")) << name;
    hub_.files.erase(name);
  }
  EXPECT_THAT(hub_.requests(kGetWeights), IsEmpty());
}

TEST_F(HubFailure, UnsafeEtagsCommitsAndSizesAreRefused) {
  for (const std::string& etag :
       std::vector<std::string>{"", "\"../../x\"", "\"abc\"", std::string(64, 'Z')}) {
    misbehave("HEAD config.json", 1, [&](HubReply& reply) { reply.headers["ETag"] = etag; });
    EXPECT_THAT(pull_error(), HasSubstr("neither a SHA-256 nor a git blob id")) << etag;
  }
  for (const std::string size : {"", "-1", "12x", "99999999999999999999"}) {
    misbehave(kHeadWeights, 1, [&](HubReply& reply) {
      reply.headers["X-Linked-Size"] = size;
      reply.chunked = true;
    });
    EXPECT_THAT(pull_error(), HasSubstr("gives no size")) << size;
  }
  misbehave(kHeadWeights, 1, [](HubReply& reply) { reply.headers.erase("X-Repo-Commit"); });
  EXPECT_THAT(pull_error(), HasSubstr("X-Repo-Commit"));
  misbehave(kList, 1,
            [](HubReply& reply) { reply.body = R"({"sha": "../../../x", "siblings": []})"; });
  EXPECT_THAT(pull_error(), HasSubstr("names no commit"));
}

TEST_F(HubFailure, HugeAnswersAreCutOff) {
  misbehave(kList, 1, [](HubReply& reply) { reply.body.assign(std::size_t{17} << 20, ' '); });
  EXPECT_THAT(pull_error(), HasSubstr("the answer is larger than"));
  misbehave(kHeadWeights, 1, [](HubReply& reply) {
    for (int i = 0; i < 100; ++i) reply.headers["X-" + std::to_string(i)] = std::string(1000, 'x');
  });
  EXPECT_THAT(pull_error(), HasSubstr("headers are larger than"));
}

TEST_F(HubFailure, RedirectLoopsEnd) {
  misbehave(kGetWeights, kAlways, [](HubReply& reply) {
    reply = HubReply();
    reply.status = 302;
    reply.headers["Location"] = "model.safetensors";
  });
  EXPECT_THAT(pull_error(), HasSubstr("more than 10 redirects"));
}

TEST_F(HubFailure, RedirectToAnotherProtocolIsRefused) {
  misbehave(kGetWeights, 1, [](HubReply& reply) {
    reply.status = 302;
    reply.headers["Location"] = "file:///etc/passwd";
  });
  EXPECT_THAT(pull_error(), HasSubstr("file"));
  expect_nothing_named();
}

TEST_F(HubFailure, RepositoryThatIsNoCheckpointSaysSo) {
  hub_.files.erase(kWeights);
  EXPECT_EQ(pull_error(), "org/tiny: no weights in .safetensors format");
  hub_.files.erase("config.json");
  EXPECT_THAT(pull_error(), HasSubstr("no config.json"));
}

TEST_F(HubFailure, BadIdsAndRevisionsAreNotSent) {
  for (const std::string id : {"", "..", "--", "a/b/c", "a--b/c", "a/..", "/a", "a/", "a b", "-a/b",
                               "a/b.git", "a/b?c", "https://x/y"})
    EXPECT_THAT(error_of([&] { hub::pull(id, options_); }), HasSubstr("is not a hub id")) << id;
  for (const std::string revision :
       {"", "../x", "/x", "x/", "a//b", "a b", "a?b", "x.lock", ".x"}) {
    options_.revision = revision;
    EXPECT_THAT(pull_error(), HasSubstr("is not the name of a branch, tag or commit")) << revision;
  }
  EXPECT_THAT(hub_.requests(), IsEmpty());
}

TEST_F(HubFailure, BadEnvironmentIsNamed) {
  environment_.set("HF_ENDPOINT", "ftp://x");
  EXPECT_THAT(pull_error(), StartsWith("HF_ENDPOINT: "));
  environment_.set("HF_ENDPOINT", hub_.url());
  environment_.set("HF_TOKEN", "abc\r\nX-Evil: 1");
  EXPECT_THAT(pull_error(), AllOf(StartsWith("HF_TOKEN: "), Not(HasSubstr("abc"))));
  environment_.set("HF_TOKEN", std::nullopt);
  options_.stall_timeout = std::chrono::milliseconds(0);
  EXPECT_THAT(pull_error(), HasSubstr("stall_timeout must be positive"));
}

}  // namespace
}  // namespace deltafox::test
