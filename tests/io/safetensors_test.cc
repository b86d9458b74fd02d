// Reading and writing safetensors files.
#include "io/safetensors.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "core/float_convert.h"
#include "deltafox/error.h"
#include "io/io_support.h"

namespace deltafox::io {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Pair;

// A file of this header and these data.
std::string file_of(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string file(sizeof length, '\0');
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + data;
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors(as_bytes(file), "x");
}

std::string parse_error(const std::string& header, std::size_t data_bytes) {
  const std::string file = file_of(header, std::string(data_bytes, 'd'));
  return error_of([&] { parse(file); });
}

// The header entry of one tensor.
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape,
                     offsets);
}

std::string braces(const std::string& members) {
  return fmt::format("{{{}}}", members);
}

std::vector<std::string> golden_files() {
  std::vector<std::string> paths;
  for (const auto& entry : fs::recursive_directory_iterator(DELTAFOX_TEST_DATA "/golden")) {
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  }
  return paths;
}

TEST(Safetensors, EveryGoldenFileIsRead) {
  const std::vector<std::string> paths = golden_files();
  ASSERT_GE(paths.size(), 23U);
  for (const std::string& path : paths) {
    const SafetensorsFile file = SafetensorsFile::open(path);
    EXPECT_FALSE(file.tensors().empty()) << path;
    for (const TensorEntry& tensor : file.tensors()) {
      const ConstTensorView view = file.view(tensor.name);
      EXPECT_EQ(view.data, tensor.data);
      EXPECT_EQ(static_cast<std::size_t>(view.shape.size()) * size_of(view.dtype), tensor.bytes);
    }
  }
}

TEST(Safetensors, ReadsEveryKindOfEntry) {
  const std::string file = file_of("{\"__metadata__\":{\"format\":\"pt\",\"a\":\"b\"}," +
                                       entry("w", "BF16", "[2,3]", "[8,20]") + "," +
                                       entry("scalar", "I64", "[]", "[0,8]") + "," +
                                       entry("none", "F32", "[0,5]", "[20,20]") + "," +
                                       entry("f8", "F8_E4M3", "[1,1,1,1,1,2]", "[20,22]") + "}   ",
                                   std::string(22, 'd'));
  const SafetensorsHeader header = parse(file);
  EXPECT_THAT(header.metadata, ElementsAre(Pair("a", "b"), Pair("format", "pt")));
  ASSERT_EQ(header.tensors.size(), 4U);
  const TensorEntry& f8 = header.tensors[0];
  EXPECT_EQ(f8.name, "f8");
  EXPECT_EQ(f8.dtype_name, "F8_E4M3");
  EXPECT_FALSE(f8.dtype);
  EXPECT_THAT(f8.shape, ElementsAre(1, 1, 1, 1, 1, 2));
  EXPECT_EQ(header.tensors[1].name, "none");
  EXPECT_EQ(header.tensors[1].bytes, 0U);
  const TensorEntry& scalar = header.tensors[2];
  EXPECT_EQ(scalar.dtype, DType::kI64);
  EXPECT_THAT(scalar.shape, IsEmpty());
  EXPECT_EQ(scalar.bytes, 8U);
  const TensorEntry& w = header.tensors[3];
  EXPECT_EQ(w.dtype, DType::kBF16);
  EXPECT_THAT(w.shape, ElementsAre(2, 3));
  EXPECT_EQ(w.data - scalar.data, 8);
  EXPECT_EQ(w.bytes, 12U);
}

TEST(Safetensors, MayHoldNoTensor) {
  EXPECT_THAT(parse(file_of("{}", "")).tensors, IsEmpty());
}

TEST(Safetensors, RefusesWhatIsNotSuchAFile) {
  const auto read = [](const std::string& file) { return error_of([&] { parse(file); }); };
  EXPECT_EQ(read(""), "x: too short for a safetensors file: 0 bytes");
  EXPECT_EQ(read("1234567"), "x: too short for a safetensors file: 7 bytes");
  EXPECT_EQ(read(std::string(8, '\0')), "x: header is not a JSON object");
  const std::uint64_t huge = std::uint64_t{1} << 60;
  std::string file = file_of("{}", "");
  std::memcpy(file.data(), &huge, sizeof huge);
  EXPECT_EQ(read(file),
            "x: not a safetensors file, or truncated: header of 1152921504606846976 "
            "bytes in a file of 10");
  file = file_of("{}", "");
  file.pop_back();
  EXPECT_EQ(read(file),
            "x: not a safetensors file, or truncated: header of 2 bytes in a file of 9");
}

TEST(Safetensors, RefusesAHeaderLongerThanTheFormatAllows) {
  const std::string file = file_of("{}" + std::string(99'999'999, ' '), "");
  EXPECT_EQ(error_of([&] { parse(file); }),
            "x: not a safetensors file, or truncated: header of 100000001 bytes in a file of "
            "100000009");
}

TEST(Safetensors, RefusesMalformedHeaders) {
  const std::string a = entry("a", "U8", "[4]", "[0,4]");
  for (const auto& [header, message] : std::vector<std::pair<std::string, std::string>>{
           {"[]", "x: header is not a JSON object"},
           {"  {}", "x: header is not a JSON object"},
           {"{", "x: header: is not JSON: line 1, column 2: "},
           {"{} x", "x: header: is not JSON: line 1, column 4: "},
           {braces(a + "," + a), "x: header: key 'a' occurs twice"},
           {"{\"a\":[]}", "x: tensor 'a': its entry must be an object"},
           {"{\"a\":{}}", "x: tensor 'a': dtype is missing"},
           {R"({"a":{"dtype":5}})", "x: tensor 'a': dtype must be a string"},
           {R"({"a":{"dtype":"U8"}})", "x: tensor 'a': shape is missing"},
           {R"({"a":{"dtype":"U8","shape":4}})", "x: tensor 'a': shape must be a list"},
           {R"({"a":{"dtype":"U8","shape":[4]}})", "x: tensor 'a': data_offsets is missing"},
           {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":{}}})",
            "x: tensor 'a': data_offsets must be a list"},
           {braces(entry("a", "F33", "[4]", "[0,4]")), "x: tensor 'a': dtype 'F33' is unknown"},
           {braces(entry("a", "U8", "[-4]", "[0,4]")),
            "x: tensor 'a': shape must hold integers from 0 to 2^63-1"},
           {braces(entry("a", "U8", "[4.0]", "[0,4]")),
            "x: tensor 'a': shape must hold integers from 0 to 2^63-1"},
           {braces(entry("a", "U8", "[true]", "[0,4]")),
            "x: tensor 'a': shape must hold integers from 0 to 2^63-1"},
           {braces(entry("a", "U8", "[0,9223372036854775808]", "[0,4]")),
            "x: tensor 'a': shape must hold integers from 0 to 2^63-1"},
           {braces(entry("a", "U8", "[4294967296,4294967296]", "[0,4]")),
            "x: tensor 'a': its shape overflows"},
           {braces(entry("a", "F64", "[2305843009213693952]", "[0,4]")),
            "x: tensor 'a': its shape overflows"},
           {braces(entry("a", "U8", "[4]", "[0]")), "x: tensor 'a': data_offsets must be a pair"},
           {braces(entry("a", "U8", "[4]", "[0,4,4]")),
            "x: tensor 'a': data_offsets must be a pair"},
           {braces(entry("a", "U8", "[4]", "[-4,0]")),
            "x: tensor 'a': data_offsets must hold integers from 0 to 2^63-1"},
           {braces(entry("a", "U8", "[4]", "[4,0]")),
            "x: tensor 'a': data_offsets [4, 0] are not within the 4 bytes of data"},
           {braces(entry("a", "U8", "[5]", "[0,5]")),
            "x: tensor 'a': data_offsets [0, 5] are not within the 4 bytes of data"},
           {braces(entry("a", "U8", "[3]", "[0,4]")),
            "x: tensor 'a': data_offsets span 4 bytes, but its shape and dtype need 3"},
           {braces(entry("a", "F32", "[4]", "[0,4]")),
            "x: tensor 'a': data_offsets span 4 bytes, but its shape and dtype need 16"},
           {braces(entry("a", "U8", "[3]", "[0,3]") + "," + entry("b", "U8", "[2]", "[2,4]")),
            "x: tensor 'b': its data overlaps that of another tensor"},
           {braces(a + "," + entry("b", "U8", "[4]", "[0,4]")),
            ": its data overlaps that of another tensor"},
           {braces(entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "U8", "[2]", "[2,4]")),
            "x: tensor 'b': its data begins after a gap"},
           {braces(entry("a", "U8", "[3]", "[1,4]")), "x: tensor 'a': its data begins after a gap"},
           {braces(entry("a", "U8", "[3]", "[0,3]")), "x: 1 bytes at the end belong to no tensor"},
           {"{}", "x: 4 bytes at the end belong to no tensor"},
           {"{\"__metadata__\":[]," + a + "}", "x: __metadata__ must be an object"},
           {"{\"__metadata__\":{\"k\":1}," + a + "}", "x: __metadata__ key 'k' must be a string"},
           {"{\"a\\nb\":1}", "x: tensor 'a\\x0ab': its entry must be an object"},
       }) {
    EXPECT_THAT(parse_error(header, 4), HasSubstr(message)) << header;
  }
  EXPECT_EQ(parse_error(braces(a), 4), "no error");
}

TEST(SafetensorsFile, NamesWhatItCannotGive) {
  const TempDir dir;
  const std::string path = dir / "a.safetensors";
  write_file(path, file_of(braces(entry("wide", "F64", "[1]", "[0,8]") + "," +
                                  entry("deep", "U8", "[1,1,1,1,1]", "[8,9]")),
                           std::string(9, 'd')));
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_TRUE(file.contains("wide"));
  EXPECT_EQ(file.find("wid"), nullptr);
  EXPECT_EQ(error_of([&] { file.view("wide"); }),
            path + ": tensor 'wide': dtype F64 is not supported");
  EXPECT_EQ(error_of([&] { file.view("deep"); }),
            path + ": tensor 'deep': 5 dimensions, at most 4 are supported");
  EXPECT_EQ(error_of([&] { file.view("none"); }), path + ": tensor 'none' is missing");
  EXPECT_EQ(error_of([&] { SafetensorsFile::open(dir / "b"); }),
            dir / "b" + ": cannot open: No such file or directory");
  write_file(dir / "b", "");
  EXPECT_EQ(error_of([&] { SafetensorsFile::open(dir / "b"); }),
            dir / "b" + ": too short for a safetensors file: 0 bytes");
}

TEST(SafetensorsFile, AlignsWhatTheFileDoesNot) {
  const TempDir dir;
  const std::string values = "\x01\x02\x03\x04\x05\x06\x07\x08";
  for (std::size_t padding = 0; padding < 8; ++padding) {
    const std::string header =
        braces(entry("a", "U8", "[1]", "[0,1]") + "," + entry("b", "F32", "[2]", "[1,9]")) +
        std::string(padding, ' ');
    write_file(dir / "a", file_of(header, "x" + values));
    const SafetensorsFile file = SafetensorsFile::open(dir / "a");
    const ConstTensorView view = file.view("b");
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % sizeof(float), 0U);
    EXPECT_EQ(bytes_of(view), values);
  }
}

TEST(SafetensorsFile, ViewsSurviveAMove) {
  const TempDir dir;
  write_file(dir / "a", file_of(braces(entry("a", "U8", "[3]", "[0,3]")), "fox"));
  SafetensorsFile file = SafetensorsFile::open(dir / "a");
  const ConstTensorView view = file.view("a");
  const SafetensorsFile moved = std::move(file);
  EXPECT_EQ(bytes_of(view), "fox");
  EXPECT_EQ(moved.view("a").data, view.data);
}

}  // namespace
}  // namespace deltafox::io
