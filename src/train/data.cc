#include "train/data.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/error.h"
#include "core/philox.h"

namespace deltafox::train {
namespace {

// Fisher and Yates, from a counter-based generator: the same on any machine, at any pass.
void shuffle(std::uint64_t seed, std::int64_t pass, std::span<std::uint32_t> order) {
  std::iota(order.begin(), order.end(), 0U);
  for (std::size_t i = order.size(); i > 1; --i) {
    const PhiloxBlock bits =
        philox4x32_10({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(pass),
                       static_cast<std::uint32_t>(static_cast<std::uint64_t>(pass) >> 32), 0},
                      {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
    const std::uint64_t draw = (static_cast<std::uint64_t>(bits[1]) << 32) | bits[0];
    std::swap(order[i - 1], order[draw % i]);
  }
}

}  // namespace

DataSet DataSet::long_crawl(const std::string& directory, const BatchShape& shape,
                            std::optional<std::int64_t> total_tokens) {
  io::ZarrArray array = io::ZarrArray::open(directory);
  const std::int64_t columns = array.columns();
  std::int64_t rows = array.rows();
  if (columns % shape.length != 0) {
    fail("{}: rows of {} ids do not fall into windows of {}", directory, columns, shape.length);
  }
  if (total_tokens) {
    if (*total_tokens % columns != 0 || *total_tokens / columns > rows ||
        *total_tokens / columns % shape.size != 0) {
      fail("{}: {} tokens are no batches of {} of its {} rows of {} ids", directory, *total_tokens,
           shape.size, rows, columns);
    }
    rows = *total_tokens / columns;
  }
  if (rows < shape.size) fail("{}: {} rows make no batch of {}", directory, rows, shape.size);
  DataSet data(std::move(array), shape);
  data.batches_ = rows / shape.size * (columns / shape.length);
  return data;
}

DataSet DataSet::tokens(const std::string& path, const BatchShape& shape,
                        std::optional<std::uint64_t> seed,
                        std::optional<std::int64_t> total_tokens) {
  io::TokenFile file = io::TokenFile::open(path);
  const std::int64_t size = std::min(file.size(), total_tokens.value_or(file.size()));
  const std::int64_t windows = size / shape.length;
  if (windows < 1 || (windows < shape.size && !seed)) {
    fail("{}: {} tokens make no batch of {} windows of {}", path, size, shape.size, shape.length);
  }
  if (windows > std::numeric_limits<std::uint32_t>::max()) {
    fail("{}: has more windows of {} tokens than can be shuffled", path, shape.length);
  }
  DataSet data(std::move(file), shape);
  data.seed_ = seed;
  data.batches_ = std::max<std::int64_t>(1, windows / shape.size);
  if (seed) data.order_.resize(static_cast<std::size_t>(windows));
  return data;
}

std::int32_t DataSet::vocab_size() const {
  const auto* file = std::get_if<io::TokenFile>(&source_);
  return file != nullptr ? file->header().vocab_size : kGpt2Vocab;
}

std::int32_t DataSet::bos() const {
  const auto* file = std::get_if<io::TokenFile>(&source_);
  return file != nullptr ? file->header().separator : kGpt2EndOfText;
}

const std::string& DataSet::path() const {
  return std::visit([](const auto& source) -> const std::string& { return source.path(); },
                    source_);
}

std::int64_t DataSet::shuffled(std::int64_t n) {
  const auto windows = static_cast<std::int64_t>(order_.size());
  if (n / windows != pass_) {
    pass_ = n / windows;
    shuffle(*seed_, pass_, order_);
  }
  return order_[static_cast<std::size_t>(n % windows)];
}

// `row`, `first`: of the array, or 0 and the place in the file.
void DataSet::check_row(std::int64_t row, std::int64_t first,
                        std::span<const std::int32_t> ids) const {
  const auto place = [&](std::int64_t at) {
    return std::holds_alternative<io::ZarrArray>(source_)
               ? fmt::format("{}: row {}, column {}", path(), row, at)
               : fmt::format("{}: position {}", path(), at);
  };
  const std::int32_t vocab = vocab_size();
  const auto bad = std::find_if(ids.begin(), ids.end(), [&](auto id) { return id >= vocab; });
  if (bad != ids.end()) {
    fail("{}: id {} is not in the vocabulary of {}", place(first + (bad - ids.begin())), *bad,
         vocab);
  }
  if (std::all_of(ids.begin(), ids.end(), [](auto id) { return id == 0; })) {
    fail("{}: the {} ids from here on are all 0: the file is damaged", place(first), ids.size());
  }
}

void DataSet::read(std::int64_t index, ThreadPool& threads, std::span<std::int32_t> input_ids,
                   std::span<std::int32_t> labels) {
  const std::int64_t size = shape_.size;
  const std::int64_t length = shape_.length;
  if (index < 0 || (!repeats() && index >= batches_)) {
    fail("{}: there is no batch {}, only {}", path(), index, batches_);
  }
  const auto window = [&](std::int64_t b) {
    return labels.subspan(static_cast<std::size_t>(b * length), static_cast<std::size_t>(length));
  };
  if (const auto* array = std::get_if<io::ZarrArray>(&source_)) {
    const std::int64_t down = batches_ / (array->columns() / length);
    const std::int64_t row = index % down * size;
    const std::int64_t column = index / down * length;
    array->read(row, size, column, length, threads, labels);
    for (std::int64_t b = 0; b < size; ++b) check_row(row + b, column, window(b));
  } else {
    for (std::int64_t b = 0; b < size; ++b) {
      const std::int64_t n = index * size + b;
      const std::int64_t begin = (repeats() ? shuffled(n) : n) * length;
      std::get<io::TokenFile>(source_).read(begin, window(b));
      check_row(0, begin, window(b));
    }
  }
  for (std::int64_t b = 0; b < size; ++b) {
    const std::span<std::int32_t> ids = window(b);
    const auto to = input_ids.begin() + b * length;
    *to = bos();
    std::copy(ids.begin(), ids.end() - 1, to + 1);
  }
}

}  // namespace deltafox::train
