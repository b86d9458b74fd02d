// Reading one safetensors file.
#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/json.h"

namespace deltafox::io {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation

struct KnownDType {
  std::string_view name;
  std::size_t bytes;
  std::optional<DType> dtype;
};

constexpr std::array kDTypes{
    KnownDType{"F32", 4, DType::kF32},      KnownDType{"BF16", 2, DType::kBF16},
    KnownDType{"F16", 2, DType::kF16},      KnownDType{"I32", 4, DType::kI32},
    KnownDType{"I64", 8, DType::kI64},      KnownDType{"U8", 1, DType::kU8},
    KnownDType{"F64", 8, std::nullopt},     KnownDType{"I16", 2, std::nullopt},
    KnownDType{"I8", 1, std::nullopt},      KnownDType{"BOOL", 1, std::nullopt},
    KnownDType{"U16", 2, std::nullopt},     KnownDType{"U32", 4, std::nullopt},
    KnownDType{"U64", 8, std::nullopt},     KnownDType{"F8_E4M3", 1, std::nullopt},
    KnownDType{"F8_E5M2", 1, std::nullopt},
};

// Reads one entry of the header; its members name the tensor in messages.
class EntryReader {
 public:
  EntryReader(const std::string& path, const std::string& name, const json& value)
      : path_(path), name_(name), value_(value) {}

  TensorEntry read(std::span<const std::byte> data) const {
    if (!value_.is_object()) refuse("its entry must be an object");
    const KnownDType& dtype = read_dtype();
    TensorEntry entry{name_, dtype.name, dtype.dtype, {}, nullptr, dtype.bytes};
    for (const json& dim : list("shape")) {
      entry.shape.push_back(static_cast<std::int64_t>(natural("shape", dim)));
      multiply(entry.bytes, static_cast<std::uint64_t>(entry.shape.back()));
    }
    const json& offsets = list("data_offsets");
    if (offsets.size() != 2) refuse("data_offsets must be a pair");
    const std::uint64_t begin = natural("data_offsets", offsets[0]);
    const std::uint64_t end = natural("data_offsets", offsets[1]);
    if (begin > end || end > data.size()) {
      refuse("data_offsets [{}, {}] are not within the {} bytes of data", begin, end, data.size());
    }
    if (end - begin != entry.bytes) {
      refuse("data_offsets span {} bytes, but its shape and dtype need {}", end - begin,
             entry.bytes);
    }
    entry.data = data.data() + begin;
    return entry;
  }

 private:
  template <typename... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) const {
    fail("{}: tensor '{}': {}", path_, printable(name_),
         fmt::format(format, std::forward<Args>(args)...));
  }

  const json& member(const char* key) const {
    const auto found = value_.find(key);
    if (found == value_.end()) refuse("{} is missing", key);
    return *found;
  }

  const json& list(const char* key) const {
    const json& value = member(key);
    if (!value.is_array()) refuse("{} must be a list", key);
    return value;
  }

  // All sizes stay within int64, whose arithmetic the rest of the program uses.
  std::uint64_t natural(const char* key, const json& value) const {
    if (!value.is_number_unsigned() ||
        value.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
      refuse("{} must hold integers from 0 to 2^63-1", key);
    }
    return value.get<std::uint64_t>();
  }

  const KnownDType& read_dtype() const {
    const json& value = member("dtype");
    if (!value.is_string()) refuse("dtype must be a string");
    const auto& name = value.get_ref<const std::string&>();
    const auto* found = std::find_if(kDTypes.begin(), kDTypes.end(),
                                     [&](const KnownDType& known) { return known.name == name; });
    if (found == kDTypes.end()) refuse("dtype '{}' is unknown", printable(name));
    return *found;
  }

  void multiply(std::size_t& product, std::uint64_t dim) const {
    constexpr auto kMax = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (dim != 0 && product > kMax / dim) refuse("its shape overflows");
    product *= dim;
  }

  const std::string& path_;
  const std::string& name_;
  const json& value_;
};

std::map<std::string, std::string> read_metadata(const json& value, const std::string& path) {
  if (!value.is_object()) fail("{}: __metadata__ must be an object", path);
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) {
      fail("{}: __metadata__ key '{}' must be a string", path, printable(key));
    }
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

// The tensors must follow one another without gaps or overlaps from the first byte to the last.
void check_coverage(const std::vector<TensorEntry>& tensors, std::span<const std::byte> data,
                    const std::string& path) {
  std::vector<const TensorEntry*> order;
  order.reserve(tensors.size());
  for (const TensorEntry& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const TensorEntry* a, const TensorEntry* b) {
    return std::pair(a->data, a->bytes) < std::pair(b->data, b->bytes);
  });
  const std::byte* end = data.data();
  for (const TensorEntry* tensor : order) {
    if (tensor->data != end) {
      fail("{}: tensor '{}': its data {}", path, printable(tensor->name),
           tensor->data < end ? "overlaps that of another tensor" : "begins after a gap");
    }
    end += tensor->bytes;
  }
  const auto used = static_cast<std::size_t>(end - data.data());
  if (used != data.size()) {
    fail("{}: {} bytes at the end belong to no tensor", path, data.size() - used);
  }
}

// The data of a misaligned tensor, where it may be read through a pointer to its type.
Buffer aligned_copy(const TensorEntry& tensor) {
  Buffer copy(tensor.bytes);
  std::memcpy(copy.data(), tensor.data, tensor.bytes);
  return copy;
}

}  // namespace

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& path) {
  if (file.size() < kLengthBytes) {
    fail("{}: too short for a safetensors file: {} bytes", path, file.size());
  }
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  const std::size_t rest = file.size() - kLengthBytes;
  if (length > kMaxHeaderBytes || length > rest) {
    fail("{}: not a safetensors file, or truncated: header of {} bytes in a file of {}", path,
         length, file.size());
  }
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  const std::span<const std::byte> data = file.subspan(kLengthBytes + length);
  if (!text.starts_with('{')) fail("{}: header is not a JSON object", path);
  const json header = parse_json(text, path + ": header", JsonDialect::kStrict);

  SafetensorsHeader result;
  result.tensors.reserve(header.size());
  // JSON objects are sorted by key, and so are the entries.
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      result.metadata = read_metadata(value, path);
    } else {
      result.tensors.push_back(EntryReader(path, name, value).read(data));
    }
  }
  check_coverage(result.tensors, data, path);
  return result;
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile file;
  file.path_ = path;
  file.file_ = MappedFile(path);
  file.file_.prefer_huge_pages();
  file.header_ = parse_safetensors(file.file_.bytes(), path);
  for (TensorEntry& tensor : file.header_.tensors) {
    if (!tensor.dtype || tensor.bytes == 0) continue;
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % size_of(*tensor.dtype) == 0) continue;
    file.realigned_.push_back(aligned_copy(tensor));
    tensor.data = file.realigned_.back().data();
  }
  return file;
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found =
      std::lower_bound(header_.tensors.begin(), header_.tensors.end(), name,
                       [](const TensorEntry& entry, std::string_view n) { return entry.name < n; });
  return found != header_.tensors.end() && found->name == name ? &*found : nullptr;
}

ConstTensorView SafetensorsFile::view(std::string_view name) const {
  const TensorEntry* entry = find(name);
  if (entry == nullptr) fail("{}: tensor '{}' is missing", path_, printable(name));
  if (!entry->dtype) {
    fail("{}: tensor '{}': dtype {} is not supported", path_, printable(name), entry->dtype_name);
  }
  if (entry->shape.size() > Shape::kMaxRank) {
    fail("{}: tensor '{}': {} dimensions, at most {} are supported", path_, printable(name),
         entry->shape.size(), Shape::kMaxRank);
  }
  return {entry->data, *entry->dtype, Shape(entry->shape)};
}

}  // namespace deltafox::io
