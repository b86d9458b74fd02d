// Mapping, reading and atomically writing files.
#include "io/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "io/io_support.h"

namespace deltafox::io {
namespace {

using testing::StartsWith;

std::string text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

TEST(MappedFile, HoldsTheContentsAndSurvivesAMove) {
  const TempDir dir;
  write_file(dir / "a", "fox");
  MappedFile file(dir / "a");
  file.prefer_huge_pages();
  const std::byte* const data = file.bytes().data();
  const MappedFile moved(std::move(file));
  EXPECT_EQ(moved.bytes().data(), data);
  EXPECT_EQ(text_of(moved), "fox");
  MappedFile assigned;
  assigned = MappedFile(dir / "a");
  EXPECT_EQ(text_of(assigned), "fox");
}

TEST(MappedFile, MayBeEmpty) {
  const TempDir dir;
  write_file(dir / "a", "");
  const MappedFile file(dir / "a");
  file.prefer_huge_pages();
  EXPECT_TRUE(file.bytes().empty());
}

TEST(MappedFile, SaysWhatCannotBeMapped) {
  const TempDir dir;
  const auto map = [&](const std::string& path) {
    return error_of([&] { const MappedFile file(path); });
  };
  EXPECT_EQ(map(dir / "a"), dir / "a" + ": cannot open: No such file or directory");
  EXPECT_EQ(map(dir.path()), dir.path() + ": is a directory");
  EXPECT_EQ(map("/dev/zero"), "/dev/zero: is not a regular file");
}

TEST(MappedFile, DoesNotWaitForAPipe) {
  const TempDir dir;
  ASSERT_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(error_of([&] { const MappedFile file(dir / "pipe"); }),
            dir / "pipe" + ": is not a regular file");
}

TEST(ReadTextFile, ReadsUpToTheLimit) {
  const TempDir dir;
  const std::string text(200'000, 'x');
  write_file(dir / "a", text);
  EXPECT_EQ(read_text_file(dir / "a", text.size()), text);
  EXPECT_EQ(error_of([&] { read_text_file(dir / "a", text.size() - 1); }),
            dir / "a" + ": is longer than 199999 bytes");
  EXPECT_EQ(error_of([&] { read_text_file("/dev/zero", 1000); }),
            "/dev/zero: is longer than 1000 bytes");
  EXPECT_EQ(read_text_file("/dev/null", 0), "");
}

TEST(ReadTextFile, SaysWhatCannotBeRead) {
  const TempDir dir;
  EXPECT_EQ(error_of([&] { read_text_file(dir / "a", 10); }),
            dir / "a" + ": cannot open: No such file or directory");
  EXPECT_EQ(error_of([&] { read_text_file(dir.path(), 10); }), dir.path() + ": is a directory");
}

TEST(AtomicFile, ReplacesTheFileOnlyUponCommit) {
  const TempDir dir;
  write_file(dir / "a", "old");
  AtomicFile file(dir / "a");
  file.append(as_bytes("new"));
  EXPECT_EQ(read_file(dir / "a"), "old");
  file.commit();
  EXPECT_EQ(read_file(dir / "a"), "new");
  EXPECT_EQ(dir.entries(), 1U);
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  const TempDir dir;
  write_file(dir / "a", "old");
  {
    AtomicFile file(dir / "a");
    file.append(as_bytes("new"));
    EXPECT_EQ(dir.entries(), 2U);
  }
  EXPECT_EQ(read_file(dir / "a"), "old");
  EXPECT_EQ(dir.entries(), 1U);
}

TEST(AtomicFile, AppendsAndWritesAnywhere) {
  const TempDir dir;
  AtomicFile file(dir / "a");
  file.preallocate(6);
  file.append(as_bytes("ab"));
  file.write_at(4, as_bytes("ef"));
  file.append(as_bytes("cd"));
  file.commit();
  EXPECT_EQ(read_file(dir / "a"), "abcdef");
}

TEST(AtomicFile, NamesARelativePathInTheWorkingDirectory) {
  const TempDir dir;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(dir.path());
  AtomicFile file("a");
  file.append(as_bytes("x"));
  file.commit();
  std::filesystem::current_path(before);
  EXPECT_EQ(read_file(dir / "a"), "x");
}

TEST(AtomicFile, SaysWhereItCannotWrite) {
  const TempDir dir;
  write_file(dir / "file", "");
  const auto create = [](const std::string& path) {
    return error_of([&] { const AtomicFile file(path); });
  };
  EXPECT_EQ(create(dir / "no/a"),
            dir / "no/a" + ": directory '" + dir / "no" + "': No such file or directory");
  EXPECT_EQ(create(dir / "file/a"), dir / "file/a" + ": '" + dir / "file" + "' is not a directory");
  EXPECT_EQ(create(dir.path()), dir.path() + ": is a directory");
  EXPECT_EQ(create(""), "cannot write to a file without a name");
  EXPECT_THAT(create("/proc/deltafox"), StartsWith("/proc/deltafox: cannot create: "));
  const std::string long_name = dir / std::string(300, 'x');
  EXPECT_EQ(create(long_name), long_name + ": cannot create: File name too long");
  EXPECT_EQ(dir.entries(), 1U);
}

TEST(AtomicFile, SaysThatTheDiskIsFullAndCleansUp) {
  const TempDir dir;
  const std::string big(100'000, 'x');
  {
    const FileSizeLimit limit(4096);
    EXPECT_EQ(error_of([&] {
                AtomicFile file(dir / "a");
                file.append(as_bytes(big));
                file.commit();
              }),
              dir / "a" + ": cannot write: File too large");
    EXPECT_EQ(error_of([&] {
                AtomicFile file(dir / "a");
                file.preallocate(big.size());
              }),
              dir / "a" + ": cannot reserve 100000 bytes: File too large");
  }
  EXPECT_EQ(dir.entries(), 0U);
  EXPECT_EQ(error_of([&] { AtomicFile("/dev/full").append(as_bytes("x")); }),
            "/dev/full: cannot write: No space left on device");
}

TEST(AtomicFile, CleansUpWhenItCannotTakeItsName) {
  const TempDir dir;
  EXPECT_EQ(error_of([&] {
              AtomicFile file(dir / "a");
              std::filesystem::create_directory(dir / "a");
              file.commit();
            }),
            dir / "a" + ": cannot create: Is a directory");
  EXPECT_EQ(dir.entries(), 1U);
}

TEST(AtomicFile, WritesDevicesInPlace) {
  AtomicFile file("/dev/null");
  file.append(as_bytes("x"));
  file.commit();
  struct stat status {};
  ASSERT_EQ(stat("/dev/null", &status), 0);
  EXPECT_TRUE(S_ISCHR(status.st_mode));
}

TEST(AtomicFile, ThreadsDoNotDisturbOneAnother) {
  const TempDir dir;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&dir, t] {
      for (int i = 0; i < 20; ++i) {
        AtomicFile file(dir / std::to_string(t));
        file.append(as_bytes(std::to_string(i)));
        if (i % 2 == 1) file.commit();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(dir.entries(), 4U);
  for (int t = 0; t < 4; ++t) EXPECT_EQ(read_file(dir / std::to_string(t)), "19");
}

TEST(RemovePendingFiles, ASignalHandlerLeavesCommittedFilesOnly) {
  const TempDir dir;
  const auto interrupted = [&] {
    std::signal(SIGINT, [](int) {
      remove_pending_files();
      _exit(130);
    });
    AtomicFile committed(dir / "committed");
    committed.append(as_bytes("x"));
    AtomicFile first(dir / "first");
    AtomicFile second(dir / "second");
    committed.commit();
    if (dir.entries() == 3) std::raise(SIGINT);
  };
  EXPECT_EXIT(interrupted(), testing::ExitedWithCode(130), "");
  EXPECT_EQ(dir.entries(), 1U);
  EXPECT_EQ(read_file(dir / "committed"), "x");
}

}  // namespace
}  // namespace deltafox::io
