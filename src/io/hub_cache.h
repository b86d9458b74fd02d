// The files of one repository in the cache that Python's huggingface_hub shares:
//
//   CACHE/models--ORG--NAME/blobs/ETAG                 contents, named by digest
//                           blobs/ETAG.incomplete      what a download got so far
//                           snapshots/COMMIT/PATH      relative symlinks into blobs
//                           refs/REVISION              the commit a branch or tag stood at
//   CACHE/.locks/models--ORG--NAME/ETAG.lock           flock: who downloads the blob
//
// Every failure of the file system is an Error that names the path.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>

namespace deltafox::hub {

// An open file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept;
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor();
  int get() const { return fd_; }

 private:
  int fd_;
};

// An exclusive flock, held until destruction. `tick` is called while another process holds it and
// may throw to give up.
class FileLock {
 public:
  FileLock(const std::filesystem::path& path, const std::function<void()>& tick);

 private:
  Descriptor file_;
};

// The contents that a download got so far. The file stays where it is unless commit or discard is
// called.
class PartialFile {
 public:
  explicit PartialFile(std::filesystem::path path);
  const std::filesystem::path& path() const { return path_; }
  std::int64_t size() const { return size_; }
  void append(std::span<const char> bytes);
  void clear();
  void discard();
  // Gives the file its final name, safe against loss of power.
  void commit(const std::filesystem::path& name);

 private:
  std::filesystem::path path_;
  Descriptor file_;
  std::int64_t size_ = 0;
};

class RepoCache {
 public:
  // `id` is a valid one (is_repo_id).
  RepoCache(const std::filesystem::path& cache, const std::string& id);

  std::filesystem::path blob(const std::string& etag) const;
  std::filesystem::path partial(const std::string& etag) const;
  std::filesystem::path lock(const std::string& etag) const;
  std::filesystem::path snapshot(const std::string& commit) const;
  // True if the snapshot has this file and its contents are there.
  bool has(const std::string& commit, const std::string& name) const;

  // The commit of a revision that is one, or that refs/ knows; else nothing.
  std::optional<std::string> find_commit(const std::string& revision) const;
  // Makes the directories that downloads write to.
  void create_directories() const;
  // Notes the commit of a branch or tag. Writes nothing where nothing changes, so that a complete
  // cache may be read-only.
  void write_ref(const std::string& revision, const std::string& commit) const;
  // Makes snapshots/COMMIT/NAME a symlink to the blob, replacing what was there.
  void link(const std::string& commit, const std::string& name, const std::string& etag) const;

 private:
  std::string read_ref(const std::string& revision) const;  // empty if there is none

  std::filesystem::path root_;
  std::filesystem::path locks_;
};

}  // namespace deltafox::hub
