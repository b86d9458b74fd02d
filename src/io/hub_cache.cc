#include "io/hub_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"
#include "io/hub_names.h"

namespace deltafox::hub {
namespace {

namespace fs = std::filesystem;

std::string last_error() {
  return std::generic_category().message(errno);
}

void make_directory(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) fail("{}: cannot create the directory: {}", path.string(), error.message());
}

void rename_file(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error) fail("{}: cannot rename to {}: {}", from.string(), to.string(), error.message());
}

// A name beside `path` that no other process uses. It does not end in .incomplete: it is no
// download.
fs::path temporary_beside(const fs::path& path) {
  const auto thread = std::hash<std::thread::id>{}(std::this_thread::get_id());
  return path.parent_path() /
         fmt::format(".{}.{}-{:x}.tmp", path.filename().string(), ::getpid(), thread);
}

}  // namespace

Descriptor::Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}
Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

FileLock::FileLock(const fs::path& path, const std::function<void()>& tick) {
  constexpr auto kPoll = std::chrono::milliseconds(50);
  for (;;) {
    file_ = Descriptor(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    if (file_.get() < 0) fail("{}: cannot open the lock: {}", path.string(), last_error());
    while (::flock(file_.get(), LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK && errno != EINTR)
        fail("{}: cannot lock: {}", path.string(), last_error());
      tick();
      std::this_thread::sleep_for(kPoll);
    }
    // Whoever held the lock may have removed the file: then this is a lock on nothing.
    struct stat ours = {};
    struct stat named = {};
    if (::fstat(file_.get(), &ours) == 0 && ::stat(path.c_str(), &named) == 0 &&
        ours.st_ino == named.st_ino && ours.st_dev == named.st_dev)
      return;
  }
}

PartialFile::PartialFile(fs::path path)
    : path_(std::move(path)),
      file_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {
  struct stat status = {};
  if (file_.get() < 0 || ::fstat(file_.get(), &status) != 0)
    fail("{}: cannot open for writing: {}", path_.string(), last_error());
  size_ = status.st_size;
}

void PartialFile::append(std::span<const char> bytes) {
  while (!bytes.empty()) {
    const ::ssize_t count = ::write(file_.get(), bytes.data(), bytes.size());
    if (count < 0) {
      if (errno == EINTR) continue;
      fail("{}: cannot write after {} bytes: {}", path_.string(), size_, last_error());
    }
    size_ += count;
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void PartialFile::clear() {
  if (size_ == 0) return;
  if (::ftruncate(file_.get(), 0) != 0)
    fail("{}: cannot truncate: {}", path_.string(), last_error());
  size_ = 0;
}

void PartialFile::discard() {
  std::error_code ignored;  // the error that led here matters more
  fs::remove(path_, ignored);
}

void PartialFile::commit(const fs::path& name) {
  if (::fsync(file_.get()) != 0) fail("{}: cannot write: {}", path_.string(), last_error());
  rename_file(path_, name);
}

RepoCache::RepoCache(const fs::path& cache, const std::string& id) {
  std::string name = "models--" + id;
  if (const auto slash = name.find('/'); slash != std::string::npos) name.replace(slash, 1, "--");
  root_ = cache / name;
  locks_ = cache / ".locks" / name;
}

fs::path RepoCache::blob(const std::string& etag) const {
  return root_ / "blobs" / etag;
}
fs::path RepoCache::partial(const std::string& etag) const {
  return root_ / "blobs" / (etag + ".incomplete");
}
fs::path RepoCache::lock(const std::string& etag) const {
  return locks_ / (etag + ".lock");
}
fs::path RepoCache::snapshot(const std::string& commit) const {
  return root_ / "snapshots" / commit;
}

bool RepoCache::has(const std::string& commit, const std::string& name) const {
  std::error_code error;
  return fs::is_regular_file(snapshot(commit) / name, error);
}

std::string RepoCache::read_ref(const std::string& revision) const {
  std::ifstream file(root_ / "refs" / revision);
  std::string commit;
  std::getline(file, commit);
  return commit;
}

std::optional<std::string> RepoCache::find_commit(const std::string& revision) const {
  if (is_commit(revision)) return revision;
  const std::string commit = read_ref(revision);
  if (commit.empty()) return std::nullopt;
  if (!is_commit(commit)) fail("{}: does not hold a commit", (root_ / "refs" / revision).string());
  return commit;
}

void RepoCache::create_directories() const {
  make_directory(root_ / "blobs");
  make_directory(locks_);
}

void RepoCache::write_ref(const std::string& revision, const std::string& commit) const {
  if (is_commit(revision) || read_ref(revision) == commit) return;
  const fs::path path = root_ / "refs" / revision;
  make_directory(path.parent_path());
  const fs::path temporary = temporary_beside(path);
  std::ofstream file(temporary, std::ios::trunc);
  file << commit;
  file.close();
  if (!file) fail("{}: cannot write", temporary.string());
  rename_file(temporary, path);
}

void RepoCache::link(const std::string& commit, const std::string& name,
                     const std::string& etag) const {
  const fs::path path = snapshot(commit) / name;
  make_directory(path.parent_path());
  fs::path target = "../..";
  for (auto depth = std::count(name.begin(), name.end(), '/'); depth > 0; --depth) target /= "..";
  target /= fs::path("blobs") / etag;
  const fs::path temporary = temporary_beside(path);
  std::error_code error;
  fs::remove(temporary, error);
  fs::create_symlink(target, temporary, error);
  if (error) fail("{}: cannot create the symlink: {}", temporary.string(), error.message());
  rename_file(temporary, path);
}

}  // namespace deltafox::hub
