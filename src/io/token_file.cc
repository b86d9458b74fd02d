#include "io/token_file.h"

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "core/error.h"

namespace deltafox::io {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::size_t kHeaderBytes = 64;
constexpr std::array<char, 8> kMagic{'D', 'F', 'T', 'O', 'K', 'E', 'N', 'S'};
constexpr std::uint32_t kVersion = 1;
constexpr std::int32_t kMaxVocab = 1 << 24;

template <typename T>
T load(std::span<const std::byte> from, std::size_t offset) {
  T value{};
  std::memcpy(&value, from.data() + offset, sizeof value);
  return value;
}

std::array<std::byte, kHeaderBytes> to_bytes(const TokenFileHeader& header) {
  std::array<std::byte, kHeaderBytes> bytes{};
  const auto put = [&](std::size_t offset, auto value) {
    std::memcpy(bytes.data() + offset, &value, sizeof value);
  };
  put(0, kMagic);
  put(8, kVersion);
  put(12, static_cast<std::uint32_t>(header.id_bytes));
  put(16, header.size);
  put(24, header.vocab_size);
  put(28, header.separator);
  put(32, header.documents);
  return bytes;
}

}  // namespace

TokenFileHeader parse_token_file(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < kHeaderBytes || std::memcmp(file.data(), kMagic.data(), kMagic.size()) != 0) {
    fail("{}: is no token file", path);
  }
  if (const auto version = load<std::uint32_t>(file, 8); version != kVersion) {
    fail("{}: token file of version {}, expected {}", path, version, kVersion);
  }
  TokenFileHeader header;
  header.id_bytes = load<std::int32_t>(file, 12);
  header.size = load<std::int64_t>(file, 16);
  header.vocab_size = load<std::int32_t>(file, 24);
  header.separator = load<std::int32_t>(file, 28);
  header.documents = load<std::int64_t>(file, 32);
  if (header.id_bytes != 2 && header.id_bytes != 4) {
    fail("{}: ids of {} bytes, expected 2 or 4", path, header.id_bytes);
  }
  const std::size_t data = file.size() - kHeaderBytes;
  const auto id_bytes = static_cast<std::size_t>(header.id_bytes);
  if (header.size < 0 || data % id_bytes != 0 ||
      static_cast<std::size_t>(header.size) != data / id_bytes) {
    fail("{}: is {} bytes long, not what {} ids of {} bytes take", path, file.size(), header.size,
         header.id_bytes);
  }
  if (header.vocab_size < 1 || header.vocab_size > kMaxVocab) {
    fail("{}: vocab_size {} is not from 1 to {}", path, header.vocab_size, kMaxVocab);
  }
  if (header.separator < 0 || header.separator >= header.vocab_size) {
    fail("{}: separator {} is not in the vocabulary of {}", path, header.separator,
         header.vocab_size);
  }
  return header;
}

TokenFile TokenFile::open(const std::string& path) {
  TokenFile file;
  file.path_ = path;
  file.file_ = MappedFile(path);
  file.header_ = parse_token_file(file.file_.bytes(), path);
  return file;
}

void TokenFile::read(std::int64_t begin, std::span<std::int32_t> to) const {
  const auto count = static_cast<std::int64_t>(to.size());
  if (begin < 0 || count > header_.size || begin > header_.size - count) {
    fail("{}: ids {} to {} are not among its {}", path_, begin, begin + count, header_.size);
  }
  const std::byte* from =
      file_.bytes().data() + kHeaderBytes + begin * static_cast<std::int64_t>(header_.id_bytes);
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t id = 0;
    std::memcpy(&id, from + i * header_.id_bytes, static_cast<std::size_t>(header_.id_bytes));
    if (id >= static_cast<std::uint32_t>(header_.vocab_size)) {
      fail("{}: id {} at position {} is not in the vocabulary of {}", path_, id, begin + i,
           header_.vocab_size);
    }
    to[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(id);
  }
}

TokenFileWriter::TokenFileWriter(const std::string& path, std::int32_t vocab_size,
                                 std::int32_t separator)
    : file_(path),
      header_{.id_bytes = vocab_size <= 65536 ? 2 : 4,
              .vocab_size = vocab_size,
              .separator = separator},
      end_(kHeaderBytes) {}

void TokenFileWriter::append(std::span<const std::int32_t> ids) {
  const auto id_bytes = static_cast<std::size_t>(header_.id_bytes);
  std::vector<std::byte> bytes(ids.size() * id_bytes);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    std::memcpy(bytes.data() + i * id_bytes, &ids[i], id_bytes);
  }
  file_.write_at(end_, bytes);
  end_ += bytes.size();
  header_.size += static_cast<std::int64_t>(ids.size());
}

void TokenFileWriter::finish(std::int64_t documents) {
  header_.documents = documents;
  file_.write_at(0, to_bytes(header_));
  file_.commit();
}

}  // namespace deltafox::io
