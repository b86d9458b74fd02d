// Files: read by mapping, written so that a reader never sees half of one.
//
// Every function throws Error with one line that starts with the path and ends with the system's
// reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace deltafox::io {

// A regular file mapped for reading. The bytes stay where they are when the object is moved.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // A hint for a file that is read as a whole: what is not in memory yet is read in huge pages
  // where the file system has them (ext4 since Linux 6.16). So they stay in memory, and this
  // process and those to come map them with an eighth of the faults.
  void prefer_huge_pages() const;

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Maps the pages of a stretch of a mapping now rather than one by one as they are read. A hint.
void populate(std::span<const std::byte> bytes);

// The whole file, which may also be a pipe. Throws Error if it is longer than `max_bytes`.
std::string read_text_file(const std::string& path, std::size_t max_bytes);

// A file that gets its name only when it is complete: it is written as `<path>.tmp-<pid>-<n>`, and
// commit() renames it to `path`, replacing what was there. Without commit() the temporary file is
// removed. A path that names a device or a pipe (/dev/stdout) is written directly.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  // After what has been appended so far.
  void append(std::span<const std::byte> bytes);
  // At a place of the caller's choice; not for pipes.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  // Reserves room for `bytes`, so that a disk too full is found out now; the file becomes at least
  // that long. Does nothing where the file system cannot.
  void preallocate(std::uint64_t bytes);
  // Makes the contents durable and gives the file its name. To be called once, at the end.
  void commit();

  const std::string& path() const { return path_; }

 private:
  struct Pending;
  friend void remove_pending_files() noexcept;
  static Pending* claim(const std::string& path);

  std::string path_;
  int fd_ = -1;
  Pending* pending_ = nullptr;  // null if the path is written directly
  std::uint64_t appended_ = 0;
};

// Makes a directory, and those above it that are missing. In the end it removes again which of them
// it made and are empty: what fails half-way leaves no trace.
class NewDirectory {
 public:
  explicit NewDirectory(const std::string& path);
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;
  ~NewDirectory();

 private:
  std::vector<std::filesystem::path> made_;  // the innermost first
};

// Removes the temporary files of every AtomicFile that is not committed. Async-signal-safe: for the
// handler of a signal that ends the program.
void remove_pending_files() noexcept;

}  // namespace deltafox::io
