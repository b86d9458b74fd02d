#include "io/zarr.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "core/error.h"
#include "io/file.h"
#include "io/json.h"

namespace deltafox::io {
namespace {

constexpr std::size_t kMaxMetadataBytes = std::size_t{1} << 20;
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 40;
// Of a decompressed chunk: a mistaken file must not ask for all the memory.
constexpr std::int64_t kMaxChunkBytes = std::int64_t{1} << 30;

std::array<std::int64_t, 2> two(const JsonObject& json, const char* key) {
  const std::vector<std::int64_t> values = json.integers(key, 1, kMaxExtent);
  if (values.size() != 2) {
    fail("{}: key '{}': expected two numbers, got {}", json.file(), key, values.size());
  }
  return {values[0], values[1]};
}

// "<u2": byte order, kind, bytes.
void read_dtype(const JsonObject& json, ZarrMetadata& metadata) {
  const std::string dtype = json.string("dtype", "");
  const bool known = dtype.size() == 3 && std::strchr("<>|", dtype[0]) != nullptr &&
                     std::strchr("iu", dtype[1]) != nullptr &&
                     std::strchr("1248", dtype[2]) != nullptr;
  if (!known) {
    fail("{}: key 'dtype': expected whole numbers such as <u2 or <i4, got '{}'", json.file(),
         printable(dtype));
  }
  metadata.big_endian = dtype[0] == '>';
  metadata.is_signed = dtype[1] == 'i';
  metadata.element_bytes = dtype[2] - '0';
}

// An element as stored; values of 8 bytes without a sign above the range come out negative.
std::int64_t load(const std::byte* at, const ZarrMetadata& metadata) {
  std::uint64_t bits = 0;
  const int bytes = metadata.element_bytes;
  for (int b = 0; b < bytes; ++b) {
    const int shift = 8 * (metadata.big_endian ? bytes - 1 - b : b);
    bits |= static_cast<std::uint64_t>(at[b]) << shift;
  }
  if (metadata.is_signed && bytes < 8) {
    const int unused = 64 - 8 * bytes;
    return static_cast<std::int64_t>(bits << unused) >> unused;
  }
  return static_cast<std::int64_t>(bits);
}

}  // namespace

ZarrMetadata parse_zarr_metadata(std::string_view text, const std::string& file) {
  const JsonObject json = JsonObject::parse(text, file);
  ZarrMetadata metadata;
  json.integer("zarr_format", 0, 2, 2);
  if (!json.contains("zarr_format")) fail("{}: key 'zarr_format': is missing", file);
  metadata.shape = two(json, "shape");
  metadata.chunks = two(json, "chunks");
  read_dtype(json, metadata);
  json.choice("order", "C", {"C"});
  if (json.has_value("filters")) fail("{}: key 'filters': is not supported", file);
  if (const auto compressor = json.object("compressor")) {
    metadata.codec = codec_named(compressor->string("id", ""), file);
  }
  metadata.separator = json.choice("dimension_separator", ".", {".", "/"})[0];
  const std::int64_t most = kMaxChunkBytes / metadata.element_bytes;
  if (metadata.chunks[0] > most || metadata.chunks[1] > most / metadata.chunks[0]) {
    fail("{}: key 'chunks': a chunk is larger than {} bytes", file, kMaxChunkBytes);
  }
  return metadata;
}

ZarrArray ZarrArray::open(const std::string& directory) {
  ZarrArray array;
  array.path_ = directory;
  const std::string file = directory + "/.zarray";
  array.metadata_ = parse_zarr_metadata(read_text_file(file, kMaxMetadataBytes), file);
  return array;
}

struct ZarrArray::Window {
  std::int64_t row, count, column, width;
};

std::string ZarrArray::chunk_path(std::int64_t i, std::int64_t j) const {
  return fmt::format("{}/{}{}{}", path_, i, metadata_.separator, j);
}

void ZarrArray::read_chunk(std::int64_t i, std::int64_t j, const Window& window,
                           std::span<std::int32_t> to) const {
  const auto [chunk_rows, chunk_columns] = metadata_.chunks;
  const std::string path = chunk_path(i, j);
  const MappedFile file(path);
  std::vector<std::byte> chunk(
      static_cast<std::size_t>(chunk_rows * chunk_columns * metadata_.element_bytes));
  decompress(metadata_.codec, file.bytes(), chunk, path);
  // The chunk's part of the window.
  const std::int64_t first_row = std::max(window.row, i * chunk_rows);
  const std::int64_t end_row = std::min(window.row + window.count, (i + 1) * chunk_rows);
  const std::int64_t first_column = std::max(window.column, j * chunk_columns);
  const std::int64_t end_column = std::min(window.column + window.width, (j + 1) * chunk_columns);
  for (std::int64_t row = first_row; row < end_row; ++row) {
    const std::byte* from =
        chunk.data() + ((row - i * chunk_rows) * chunk_columns + first_column - j * chunk_columns) *
                           metadata_.element_bytes;
    auto out = to.begin() + (row - window.row) * window.width + first_column - window.column;
    for (std::int64_t column = first_column; column < end_column; ++column) {
      const std::int64_t value = load(from, metadata_);
      if (value < 0 || value > std::numeric_limits<std::int32_t>::max()) {
        fail("{}: row {}, column {}: {} is no token id", path, row, column, value);
      }
      *out++ = static_cast<std::int32_t>(value);
      from += metadata_.element_bytes;
    }
  }
}

void ZarrArray::read(std::int64_t row, std::int64_t count, std::int64_t column, std::int64_t width,
                     ThreadPool& threads, std::span<std::int32_t> to) const {
  if (row < 0 || count < 1 || row > rows() - count || column < 0 || width < 1 ||
      column > columns() - width || static_cast<std::int64_t>(to.size()) != count * width) {
    fail("{}: rows {} to {}, columns {} to {} are not in an array of {} x {}", path_, row,
         row + count, column, column + width, rows(), columns());
  }
  const Window window{row, count, column, width};
  const std::int64_t first_i = row / metadata_.chunks[0];
  const std::int64_t first_j = column / metadata_.chunks[1];
  const std::int64_t down = (row + count - 1) / metadata_.chunks[0] - first_i + 1;
  const std::int64_t across = (column + width - 1) / metadata_.chunks[1] - first_j + 1;
  std::mutex mutex;
  std::optional<std::string> problem;  // tasks must not throw
  threads.parallel_for(down * across, [&](std::int64_t task) {
    try {
      read_chunk(first_i + task / across, first_j + task % across, window, to);
    } catch (const std::exception& error) {
      const std::scoped_lock lock(mutex);
      // Of several, the same one whatever the threads did.
      if (!problem || error.what() < *problem) problem = error.what();
    }
  });
  if (problem) throw Error(*problem);
}

}  // namespace deltafox::io
