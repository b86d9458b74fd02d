// Two-dimensional arrays of token ids in the zarr format, version 2: a directory with `.zarray`,
// which is JSON, and one file a chunk. Format: zarr-specs.readthedocs.io, "Storage specification
// v2".
//
// A chunk that is missing would read as the fill value; here it is an Error, like one that is
// damaged: nobody means to train on it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "core/thread_pool.h"
#include "io/codec.h"

namespace deltafox::io {

struct ZarrMetadata {
  std::array<std::int64_t, 2> shape{};
  std::array<std::int64_t, 2> chunks{};  // shape of each, those at the edges included
  int element_bytes = 0;                 // 1, 2, 4 or 8
  bool big_endian = false;
  bool is_signed = false;
  Codec codec = Codec::kNone;
  char separator = '.';  // between the numbers in a chunk's name
};

// Checks the text of a `.zarray`. Throws Error naming `file` and the key at fault.
ZarrMetadata parse_zarr_metadata(std::string_view text, const std::string& file);

class ZarrArray {
 public:
  static ZarrArray open(const std::string& directory);

  const std::string& path() const { return path_; }  // the directory
  std::int64_t rows() const { return metadata_.shape[0]; }
  std::int64_t columns() const { return metadata_.shape[1]; }

  // to [count, width] = rows [row, row + count), columns [column, column + width). Throws Error
  // that names the chunk's file, or the row and column of a value that is no id.
  void read(std::int64_t row, std::int64_t count, std::int64_t column, std::int64_t width,
            ThreadPool& threads, std::span<std::int32_t> to) const;

 private:
  struct Window;

  void read_chunk(std::int64_t i, std::int64_t j, const Window& window,
                  std::span<std::int32_t> to) const;
  std::string chunk_path(std::int64_t i, std::int64_t j) const;

  std::string path_;
  ZarrMetadata metadata_;
};

}  // namespace deltafox::io
