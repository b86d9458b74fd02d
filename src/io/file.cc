#include "io/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace deltafox::io {
namespace {

[[noreturn]] void fail_errno(const std::string& path, const char* what, int code = errno) {
  fail("{}: {}: {}", path, what, std::generic_category().message(code));
}

// A file descriptor that closes itself, for functions that may throw.
class Descriptor {
 public:
  Descriptor(const std::string& path, int flags) : fd_(open(path.c_str(), flags | O_CLOEXEC)) {
    if (fd_ < 0) fail_errno(path, "cannot open");
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(fd_); }
  int get() const { return fd_; }

 private:
  int fd_;
};

struct stat status_of(int fd, const std::string& path) {
  struct stat status {};
  if (fstat(fd, &status) != 0) fail_errno(path, "cannot inspect");
  if (S_ISDIR(status.st_mode)) fail("{}: is a directory", path);
  return status;
}

// write_some(bytes) as write(2): repeated until all is written.
template <typename WriteSome>
void write_all(const std::string& path, std::span<const std::byte> bytes, WriteSome&& write_some) {
  while (!bytes.empty()) {
    const ssize_t written = write_some(bytes);
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_errno(path, "cannot write");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

std::string directory_of(const std::string& path) {
  const std::string directory = std::filesystem::path(path).parent_path().string();
  return directory.empty() ? "." : directory;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // Opening a pipe must not wait for a writer: it is refused below.
  const Descriptor fd(path, O_RDONLY | O_NONBLOCK);
  const struct stat status = status_of(fd.get(), path);
  if (!S_ISREG(status.st_mode)) fail("{}: is not a regular file", path);
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ == 0) return;  // there are no empty mappings
  void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) fail_errno(path, "cannot map");
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::prefer_huge_pages() const {
  if (data_ != nullptr) madvise(const_cast<std::byte*>(data_), size_, MADV_HUGEPAGE);
}

// One read for what Linux maps around a fault. MADV_POPULATE_READ faults as often and then looks
// up every page besides, which takes half as long again.
void populate(std::span<const std::byte> bytes) {
  constexpr std::size_t kFaultAround = std::size_t{64} << 10;
  for (std::size_t at = 0; at < bytes.size(); at += kFaultAround) {
    static_cast<void>(*static_cast<const volatile std::byte*>(bytes.data() + at));
  }
}

std::string read_text_file(const std::string& path, std::size_t max_bytes) {
  const Descriptor fd(path, O_RDONLY);
  const struct stat status = status_of(fd.get(), path);
  std::string text;
  text.reserve(std::min(static_cast<std::size_t>(status.st_size), max_bytes));
  std::array<char, std::size_t{1} << 16> piece;
  while (true) {
    const ssize_t count = read(fd.get(), piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_errno(path, "cannot read");
    if (count == 0) return text;
    if (static_cast<std::size_t>(count) > max_bytes - text.size()) {
      fail("{}: is longer than {} bytes", path, max_bytes);
    }
    text.append(piece.data(), static_cast<std::size_t>(count));
  }
}

// The temporary files form a list that a signal handler can walk at any time: entries are only ever
// added, and used again when their file is done. A handler reads `path` of armed entries only.
struct AtomicFile::Pending {
  enum State : int { kFree, kClaimed, kArmed };
  std::atomic<int> state{kClaimed};
  std::string path;
  Pending* next = nullptr;
};

namespace {
std::atomic<void*> pending_head{nullptr};
static_assert(std::atomic<void*>::is_always_lock_free && std::atomic<int>::is_always_lock_free);
}  // namespace

AtomicFile::Pending* AtomicFile::claim(const std::string& path) {
  static std::atomic<std::uint64_t> counter{0};
  const std::string temporary =
      fmt::format("{}.tmp-{}-{}", path, getpid(), counter.fetch_add(1, std::memory_order_relaxed));
  auto* entry = static_cast<Pending*>(pending_head.load());
  for (; entry != nullptr; entry = entry->next) {
    int expected = Pending::kFree;
    if (entry->state.compare_exchange_strong(expected, Pending::kClaimed)) break;
  }
  if (entry == nullptr) {
    entry = new Pending;  // lives as long as the program: see above
    void* head = pending_head.load();
    do {
      entry->next = static_cast<Pending*>(head);
    } while (!pending_head.compare_exchange_weak(head, entry));
  }
  entry->path = temporary;
  entry->state.store(Pending::kArmed);
  return entry;
}

void remove_pending_files() noexcept {
  using Pending = AtomicFile::Pending;
  for (auto* entry = static_cast<Pending*>(pending_head.load()); entry != nullptr;
       entry = entry->next) {
    if (entry->state.load() == Pending::kArmed) unlink(entry->path.c_str());
  }
}

NewDirectory::NewDirectory(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  for (fs::path missing = fs::absolute(path);
       !fs::exists(missing, error) && missing.has_relative_path();
       missing = missing.parent_path()) {
    made_.push_back(missing);
  }
  fs::create_directories(path, error);
  if (error) fail("{}: cannot make the directory: {}", path, error.message());
}

NewDirectory::~NewDirectory() {
  std::error_code error;  // not empty: as it should be
  for (const std::filesystem::path& path : made_) std::filesystem::remove(path, error);
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  if (path_.empty()) fail("cannot write to a file without a name");
  struct stat status {};
  if (stat(path_.c_str(), &status) == 0) {
    if (S_ISDIR(status.st_mode)) fail("{}: is a directory", path_);
    if (!S_ISREG(status.st_mode)) {
      // A rename would replace the device itself.
      fd_ = open(path_.c_str(), O_WRONLY | O_CLOEXEC);
      if (fd_ < 0) fail_errno(path_, "cannot open");
      return;
    }
  }
  const std::string directory = directory_of(path_);
  if (stat(directory.c_str(), &status) != 0) {
    fail_errno(path_, fmt::format("directory '{}'", directory).c_str());
  }
  if (!S_ISDIR(status.st_mode)) fail("{}: '{}' is not a directory", path_, directory);
  do {
    if (pending_ != nullptr) pending_->state.store(Pending::kFree);
    pending_ = claim(path_);
    fd_ = open(pending_->path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EEXIST);  // left by a dead process of the same number
  if (fd_ < 0) {
    const int code = errno;
    pending_->state.store(Pending::kFree);
    fail_errno(path_, "cannot create", code);
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) close(fd_);
  if (pending_ == nullptr) return;
  unlink(pending_->path.c_str());
  pending_->state.store(Pending::kFree);
}

void AtomicFile::append(std::span<const std::byte> bytes) {
  if (pending_ != nullptr) {
    write_at(appended_, bytes);
    appended_ += bytes.size();
    return;
  }
  assert(fd_ >= 0);
  write_all(path_, bytes,
            [&](std::span<const std::byte> rest) { return write(fd_, rest.data(), rest.size()); });
}

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  assert(fd_ >= 0);
  write_all(path_, bytes, [&](std::span<const std::byte> rest) {
    const std::uint64_t at = offset + (bytes.size() - rest.size());
    return pwrite(fd_, rest.data(), rest.size(), static_cast<off_t>(at));
  });
}

void AtomicFile::preallocate(std::uint64_t bytes) {
  if (pending_ == nullptr || bytes == 0) return;
  int result = 0;
  do {
    result = fallocate(fd_, 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
    fail_errno(path_, fmt::format("cannot reserve {} bytes", bytes).c_str());
  }
}

void AtomicFile::commit() {
  assert(fd_ >= 0);
  if (pending_ != nullptr && fsync(fd_) != 0) fail_errno(path_, "cannot write");
  if (close(std::exchange(fd_, -1)) != 0) fail_errno(path_, "cannot write");
  if (pending_ == nullptr) return;
  if (rename(pending_->path.c_str(), path_.c_str()) != 0) fail_errno(path_, "cannot create");
  std::exchange(pending_, nullptr)->state.store(Pending::kFree);
  // The name is durable once the directory is; not every file system can promise that.
  const int directory = open(directory_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;
  fsync(directory);
  close(directory);
}

}  // namespace deltafox::io
