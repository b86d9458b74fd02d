// Writing a safetensors file piece by piece.
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/json.h"
#include "io/safetensors.h"

namespace deltafox::io {
namespace {

// Where the reference implementation puts a dtype: by descending rank.
int rank_of(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 6;
    case DType::kF32:
      return 5;
    case DType::kI32:
      return 4;
    case DType::kBF16:
      return 3;
    case DType::kF16:
      return 2;
    case DType::kU8:
      return 1;
    case DType::kQ8:
    case DType::kQ4:
    case DType::kBF16Tiles:
      break;  // never written: packed ones as U8, tiles not at all
  }
  return 0;
}

std::uint64_t bytes_of(const TensorDeclaration& tensor) {
  return static_cast<std::uint64_t>(tensor.shape.size()) * size_of(tensor.dtype);
}

std::string quoted(const std::string& text) {
  using nlohmann::json;
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

// The length and the header; `tensors` are in the order of their data.
std::string header_of(const std::vector<TensorDeclaration>& tensors,
                      const std::map<std::string, std::string>& metadata, std::size_t alignment) {
  std::vector<std::string> members;
  members.reserve(tensors.size() + 1);
  if (!metadata.empty()) {
    std::vector<std::string> pairs;
    pairs.reserve(metadata.size());
    for (const auto& [key, value] : metadata) {
      pairs.push_back(fmt::format("{}:{}", quoted(key), quoted(value)));
    }
    members.push_back(fmt::format("\"__metadata__\":{{{}}}", fmt::join(pairs, ",")));
  }
  std::uint64_t begin = 0;
  for (const TensorDeclaration& tensor : tensors) {
    std::vector<std::int64_t> dims;
    dims.reserve(Shape::kMaxRank);
    for (int i = 0; i < tensor.shape.rank(); ++i) dims.push_back(tensor.shape[i]);
    const std::uint64_t end = begin + bytes_of(tensor);
    members.push_back(fmt::format(R"({}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                                  quoted(tensor.name), name_of(tensor.dtype), fmt::join(dims, ","),
                                  begin, end));
    begin = end;
  }
  std::string text = fmt::format("{{{}}}", fmt::join(members, ","));
  const std::size_t before = sizeof(std::uint64_t) + text.size();
  text.append((alignment - before % alignment) % alignment, ' ');
  const std::uint64_t length = text.size();
  std::string prefix(sizeof length, '\0');
  std::memcpy(prefix.data(), &length, sizeof length);
  return prefix + text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(const std::string& path,
                                     std::vector<TensorDeclaration> tensors,
                                     const std::map<std::string, std::string>& metadata,
                                     std::size_t alignment)
    : file_(path) {
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorDeclaration& a, const TensorDeclaration& b) {
              return std::pair(-rank_of(a.dtype), std::string_view(a.name)) <
                     std::pair(-rank_of(b.dtype), std::string_view(b.name));
            });
  const std::string header = header_of(tensors, metadata, alignment);
  std::uint64_t end = header.size();
  for (const TensorDeclaration& tensor : tensors) {
    Slot slot;
    slot.begin = end;
    const std::uint64_t bytes = bytes_of(tensor);
    if (bytes > 0) slot.gaps[0] = bytes;
    end += bytes;
    if (tensor.name == "__metadata__" || !slots_.emplace(tensor.name, std::move(slot)).second) {
      fail("{}: tensor '{}': the name is taken", path, printable(tensor.name));
    }
  }
  file_.preallocate(end);
  file_.append(std::as_bytes(std::span(header)));
}

SafetensorsWriter::Slot& SafetensorsWriter::slot(std::string_view name) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) {
    fail("{}: tensor '{}' was not declared", file_.path(), printable(name));
  }
  return found->second;
}

void SafetensorsWriter::write(std::string_view name, std::span<const std::byte> bytes) {
  const auto& gaps = slot(name).gaps;
  write_at(name, gaps.empty() ? 0 : gaps.begin()->first, bytes);
}

void SafetensorsWriter::write_at(std::string_view name, std::uint64_t offset,
                                 std::span<const std::byte> bytes) {
  Slot& to = slot(name);
  if (bytes.empty()) return;
  auto gap = to.gaps.upper_bound(offset);
  const bool inside =
      gap != to.gaps.begin() && (--gap)->second >= offset && gap->second - offset >= bytes.size();
  if (!inside) {
    fail("{}: tensor '{}': {} bytes at {} are beyond its end or written already", file_.path(),
         printable(name), bytes.size(), offset);
  }
  file_.write_at(to.begin + offset, bytes);
  const std::uint64_t end = offset + bytes.size();
  const auto [gap_begin, gap_end] = *gap;
  to.gaps.erase(gap);
  if (gap_begin < offset) to.gaps[gap_begin] = offset;
  if (end < gap_end) to.gaps[end] = gap_end;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, slot] : slots_) {
    if (!slot.gaps.empty()) {
      fail("{}: tensor '{}': bytes from {} on were not written", file_.path(), printable(name),
           slot.gaps.begin()->first);
    }
  }
  file_.commit();
}

}  // namespace deltafox::io
