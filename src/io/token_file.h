// Token ids in a file: what `deltafox data` writes and training reads by mapping.
//
// 64 bytes of header, all numbers little-endian:
//   0  "DFTOKENS"
//   8  u32 version, 1
//  12  u32 bytes of an id, 2 or 4
//  16  u64 number of ids
//  24  u32 vocab_size: every id is smaller
//  28  u32 the id that stands between documents, and before the first token of a window
//  32  u64 number of documents
//  40  zeros
// and then the ids, unsigned. In Python: numpy.fromfile(path, "<u2", offset=64).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "io/file.h"

namespace deltafox::io {

struct TokenFileHeader {
  int id_bytes = 2;
  std::int64_t size = 0;  // ids
  std::int32_t vocab_size = 0;
  std::int32_t separator = 0;
  std::int64_t documents = 0;
};

// Checks the header and that `file` holds just as many ids as it says. Throws Error naming `path`.
TokenFileHeader parse_token_file(std::span<const std::byte> file, const std::string& path);

class TokenFile {
 public:
  static TokenFile open(const std::string& path);

  const std::string& path() const { return path_; }
  const TokenFileHeader& header() const { return header_; }
  std::int64_t size() const { return header_.size; }

  // to = ids [begin, begin + to.size()). Throws Error naming the place of an id that the vocabulary
  // does not have.
  void read(std::int64_t begin, std::span<std::int32_t> to) const;

 private:
  std::string path_;
  MappedFile file_;
  TokenFileHeader header_;
};

// Writes a token file, piece by piece; it gets its name in finish().
class TokenFileWriter {
 public:
  // Ids of vocabularies of up to 65,536 entries take two bytes.
  TokenFileWriter(const std::string& path, std::int32_t vocab_size, std::int32_t separator);

  void append(std::span<const std::int32_t> ids);
  void finish(std::int64_t documents);

 private:
  AtomicFile file_;
  TokenFileHeader header_;
  std::uint64_t end_;  // of what is written, in the file
};

}  // namespace deltafox::io
