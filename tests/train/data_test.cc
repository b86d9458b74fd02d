// Data sets: zarr arrays, token files, and the order of their windows.
#include "train/data.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "support/errors.h"
#include "support/temporary.h"

namespace deltafox::test {
namespace {

namespace fs = std::filesystem;
using train::BatchShape;
using train::DataSet;

const std::string kZarr = std::string(DELTAFOX_TEST_DATA) + "/zarr/";

struct Read {
  std::vector<std::int32_t> input_ids, labels;
};

Read read(DataSet& data, std::int64_t batch) {
  ThreadPool threads(2);
  const auto size = static_cast<std::size_t>(data.shape().tokens());
  Read result{std::vector<std::int32_t>(size), std::vector<std::int32_t>(size)};
  data.read(batch, threads, result.input_ids, result.labels);
  return result;
}

std::vector<std::int32_t> flat(const nlohmann::json& rows) {
  std::vector<std::int32_t> ids;
  for (const auto& row : rows) {
    for (const auto& id : row) ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

class Order : public testing::TestWithParam<const char*> {};

TEST_P(Order, IsThatOfTheOfficialLoader) {
  const auto order = nlohmann::json::parse(read_file(kZarr + "order.json"));
  for (const char* split : {"train", "heldout"}) {
    const auto& expected = order.at(split);
    const BatchShape shape{expected.at("size"), expected.at("length")};
    std::optional<std::int64_t> total;
    if (std::string(split) == "heldout") total = 64;
    DataSet data = DataSet::long_crawl(kZarr + GetParam(), shape, total);
    ASSERT_EQ(data.batches(), std::ssize(expected.at("batches")));
    for (std::int64_t b = 0; b < data.batches(); ++b) {
      const Read got = read(data, b);
      const auto& batch = expected.at("batches").at(static_cast<std::size_t>(b));
      EXPECT_EQ(got.input_ids, flat(batch.at("input_ids"))) << split << " batch " << b;
      EXPECT_EQ(got.labels, flat(batch.at("labels"))) << split << " batch " << b;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zarr, Order,
                         testing::Values("blosc.zarr", "blosc_zstd.zarr", "zstd.zarr", "zlib.zarr",
                                         "gzip.zarr", "none.zarr"));

class DamagedZarr : public testing::Test {
 protected:
  // An array of 4 x 4 ids in chunks of 2 x 4.
  DamagedZarr() {
    write_metadata(R"("<u2")");
    write_chunk("0.0", {1, 2, 3, 4, 5, 6, 7, 8});
    write_chunk("1.0", {1, 2, 3, 4, 5, 6, 7, 8});
  }
  void write_metadata(const std::string& dtype) const {
    directory_.write(".zarray",
                     R"({"zarr_format": 2, "shape": [4, 4], "chunks": [2, 4], "dtype": )" + dtype +
                         R"(, "order": "C", "compressor": null, "filters": null,
                                    "fill_value": 0})");
  }
  void write_chunk(const std::string& name, const std::vector<std::uint16_t>& ids) const {
    directory_.write(name, {reinterpret_cast<const char*>(ids.data()), 2 * ids.size()});
  }
  std::string error() const {
    return error_of([&] {
      DataSet data = DataSet::long_crawl(directory_.path(), {4, 4});
      read(data, 0);
    });
  }

  TemporaryDirectory directory_;
};

TEST_F(DamagedZarr, NamesTheMissingChunk) {
  fs::remove(directory_.path("1.0"));
  EXPECT_THAT(error(), testing::StartsWith(directory_.path("1.0") + ": "));
}

TEST_F(DamagedZarr, NamesTheShortChunk) {
  write_chunk("1.0", {1, 2, 3});
  EXPECT_THAT(error(), testing::StartsWith(directory_.path("1.0") + ": holds 6 bytes"));
}

TEST_F(DamagedZarr, NamesTheRowOfZeros) {
  write_chunk("1.0", {1, 2, 3, 4, 0, 0, 0, 0});
  EXPECT_THAT(error(), testing::HasSubstr("row 3, column 0: the 4 ids from here on are all 0"));
}

TEST_F(DamagedZarr, NamesTheIdBeyondTheVocabulary) {
  write_chunk("0.0", {1, 2, 3, 4, 5, 6, 50257, 8});
  EXPECT_THAT(error(), testing::HasSubstr("row 1, column 2: id 50257"));
}

TEST_F(DamagedZarr, NamesTheKeyThatIsWrong) {
  write_metadata(R"("<f4")");
  EXPECT_THAT(error(), testing::AllOf(testing::HasSubstr(".zarray"), testing::HasSubstr("dtype")));
}

TEST(DamagedChunk, OfAnyCompressorIsRefused) {
  for (const char* name : {"blosc.zarr", "zstd.zarr", "zlib.zarr", "gzip.zarr"}) {
    const TemporaryDirectory directory;
    fs::copy(kZarr + name, directory.path(), fs::copy_options::recursive);
    const std::string chunk = directory.path(fs::exists(directory.path("0.0")) ? "0.0" : "0/0");
    std::string bytes = read_file(chunk);
    bytes.resize(bytes.size() - 3);
    std::ofstream(chunk, std::ios::binary) << bytes;
    EXPECT_THAT(error_of([&] {
                  DataSet data = DataSet::long_crawl(directory.path(), {7, 16});
                  read(data, 0);
                }),
                testing::StartsWith(chunk + ": "));
  }
}

class Tokens : public testing::Test {
 protected:
  void write(std::int32_t vocab, const std::vector<std::int32_t>& ids) const {
    io::TokenFileWriter writer(path_, vocab, vocab - 1);
    writer.append(std::span(ids).first(ids.size() / 2));
    writer.append(std::span(ids).subspan(ids.size() / 2));
    writer.finish(1);
  }
  static std::vector<std::int32_t> counting(std::int32_t count) {
    std::vector<std::int32_t> ids;
    for (std::int32_t i = 0; i < count; ++i) ids.push_back(i + 1);
    return ids;
  }

  TemporaryDirectory directory_;
  std::string path_ = directory_.path("train.tokens");
};

TEST_F(Tokens, AreReadAsWritten) {
  for (const std::int32_t vocab : {300, 100'000}) {
    write(vocab, counting(20));
    const io::TokenFile file = io::TokenFile::open(path_);
    EXPECT_EQ(file.size(), 20);
    EXPECT_EQ(file.header().vocab_size, vocab);
    std::vector<std::int32_t> ids(20);
    file.read(0, ids);
    EXPECT_EQ(ids, counting(20));
  }
}

TEST_F(Tokens, WithoutASeedComeInOrder) {
  write(300, counting(20));
  DataSet data = DataSet::tokens(path_, {2, 3}, std::nullopt);
  EXPECT_EQ(data.batches(), 3);
  EXPECT_EQ(read(data, 1).labels, (std::vector<std::int32_t>{7, 8, 9, 10, 11, 12}));
  EXPECT_EQ(read(data, 1).input_ids, (std::vector<std::int32_t>{299, 7, 8, 299, 10, 11}));
  EXPECT_THAT(error_of([&] { read(data, 3); }), testing::HasSubstr("there is no batch 3"));
}

TEST_F(Tokens, WithASeedEveryPassHasEveryWindowOnce) {
  write(300, counting(30));
  DataSet data = DataSet::tokens(path_, {2, 3}, 1);
  std::vector<std::vector<std::int32_t>> passes;
  for (std::int64_t pass = 0; pass < 3; ++pass) {
    std::vector<std::int32_t> starts;
    for (std::int64_t b = 0; b < 5; ++b) {
      const Read batch = read(data, pass * 5 + b);
      starts.push_back(batch.labels[0]);
      starts.push_back(batch.labels[3]);
    }
    EXPECT_EQ(std::set(starts.begin(), starts.end()).size(), 10U);
    passes.push_back(starts);
  }
  EXPECT_NE(passes[0], passes[1]);
  EXPECT_NE(passes[1], passes[2]);
  DataSet again = DataSet::tokens(path_, {2, 3}, 1);
  EXPECT_EQ(read(again, 12).labels, read(data, 12).labels);
}

TEST_F(Tokens, OfADamagedFileAreRefused) {
  write(300, counting(20));
  std::string bytes = read_file(path_);
  bytes[64 + 2 * 7 + 1] = 2;  // id 8 becomes 520
  directory_.write("train.tokens", bytes);
  DataSet data = DataSet::tokens(path_, {2, 10}, std::nullopt);
  EXPECT_THAT(error_of([&] { read(data, 0); }),
              testing::HasSubstr("train.tokens: id 520 at position 7"));
  bytes.pop_back();
  directory_.write("train.tokens", bytes);
  EXPECT_THAT(error_of([&] { io::TokenFile::open(path_); }),
              testing::HasSubstr("train.tokens: is 103 bytes long"));
}

TEST_F(Tokens, OfNothingButZerosAreRefused) {
  std::vector<std::int32_t> ids = counting(20);
  std::fill(ids.begin() + 10, ids.end(), 0);
  write(300, ids);
  DataSet data = DataSet::tokens(path_, {1, 5}, std::nullopt);
  EXPECT_THAT(error_of([&] { read(data, 2); }),
              testing::HasSubstr("position 10: the 5 ids from here on are all 0"));
}

}  // namespace
}  // namespace deltafox::test
