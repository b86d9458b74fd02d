// Tensors in files: the safetensors format, and checkpoints of one or several such files.
//
// A file is: the header's length (8 bytes, little-endian), the header (a JSON object: name to
// dtype, shape and data_offsets; `__metadata__` to strings), the data. The tensors must cover the
// data without gaps or overlaps. Format: github.com/huggingface/safetensors.
//
// Every function throws Error with one line: "<path>: tensor '<name>': what is wrong".
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/buffer.h"
#include "core/tensor.h"
#include "io/file.h"

namespace deltafox::io {

struct TensorEntry {
  std::string name;
  std::string_view dtype_name;      // as in the file
  std::optional<DType> dtype;       // empty if it is none that deltafox computes with
  std::vector<std::int64_t> shape;  // any rank; its product is the number of elements
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // sorted by name
  std::map<std::string, std::string> metadata;
};

// Reads and checks the header of a file that is in memory as `file`; the entries point into it,
// where they may be misaligned. `path` is for messages.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& path);

// A safetensors file, mapped. What it hands out points into the mapping and lives as long as the
// object does, moved or not; it is aligned for its dtype (the rare tensor that is not so in the
// file is copied when it is opened).
class SafetensorsFile {
 public:
  static SafetensorsFile open(const std::string& path);

  const std::string& path() const { return path_; }
  const std::vector<TensorEntry>& tensors() const { return header_.tensors; }  // sorted by name
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const TensorEntry* find(std::string_view name) const;  // null if there is none
  bool contains(std::string_view name) const { return find(name) != nullptr; }
  // Throws Error if the tensor is missing, of an unsupported dtype or of more than four dimensions.
  ConstTensorView view(std::string_view name) const;

 private:
  std::string path_;
  MappedFile file_;
  SafetensorsHeader header_;
  std::vector<Buffer> realigned_;
};

// The weights in a checkpoint directory: model.safetensors, or else the shards that
// model.safetensors.index.json lists, as one set of tensors.
class Checkpoint {
 public:
  // Throws Error if a file is missing or malformed, the index names a file outside the directory,
  // a tensor is not in the shard that the index says, or is in two.
  static Checkpoint open(const std::string& directory);

  const std::string& path() const { return path_; }  // the directory
  std::vector<std::string> names() const;            // sorted
  bool contains(std::string_view name) const { return entries_.contains(name); }
  ConstTensorView view(std::string_view name) const;        // as SafetensorsFile::view
  const std::string& file_of(std::string_view name) const;  // the path of the file it is in
  const TensorEntry* find(std::string_view name) const;     // null if there is none

 private:
  void add(SafetensorsFile file);

  std::string path_;
  std::deque<SafetensorsFile> files_;
  std::map<std::string_view, const SafetensorsFile*> entries_;
};

struct TensorDeclaration {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
};

// Writes a safetensors file of which only the header is in memory. The layout is that of the
// reference implementation: wide dtypes first, then by name. The file gets its name in finish();
// without it nothing is left behind.
class SafetensorsWriter {
 public:
  // Reserves the room that all tensors need, so a disk too full is found out here. The data begin
  // at a multiple of `alignment`, as much as that of the reference implementation or more: of
  // kCacheLine for what is read where it is mapped.
  static constexpr std::size_t kCacheLine = 64;
  SafetensorsWriter(const std::string& path, std::vector<TensorDeclaration> tensors,
                    const std::map<std::string, std::string>& metadata = {},
                    std::size_t alignment = 8);

  // The next bytes of a tensor: those after the first stretch written so far.
  void write(std::string_view name, std::span<const std::byte> bytes);
  // Bytes [offset, offset + bytes.size()) of a tensor, none of which has been written yet.
  void write_at(std::string_view name, std::uint64_t offset, std::span<const std::byte> bytes);
  // Throws Error if a byte of a tensor has not been written.
  void finish();

 private:
  struct Slot {
    std::uint64_t begin = 0;                      // in the file
    std::map<std::uint64_t, std::uint64_t> gaps;  // what is not written yet: offset to end
  };
  Slot& slot(std::string_view name);

  AtomicFile file_;
  std::map<std::string, Slot, std::less<>> slots_;
};

}  // namespace deltafox::io
