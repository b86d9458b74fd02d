// Writing safetensors files piece by piece.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "io/io_support.h"
#include "io/safetensors.h"

namespace deltafox::io {
namespace {

using testing::ElementsAre;
using testing::EndsWith;
using testing::Pair;

TEST(SafetensorsWriter, WritesTheBytesOfTheReferenceImplementation) {
  int files = 0;
  for (const auto& entry :
       std::filesystem::recursive_directory_iterator(DELTAFOX_TEST_DATA "/golden")) {
    const std::string path = entry.path();
    if (entry.path().extension() != ".safetensors") continue;
    ++files;
    const SafetensorsFile file = SafetensorsFile::open(path);
    std::vector<TensorDeclaration> tensors;
    for (const TensorEntry& tensor : file.tensors()) {
      tensors.push_back({tensor.name, *tensor.dtype, file.view(tensor.name).shape});
    }
    const TempDir dir;
    const std::string copy = dir / "copy.safetensors";
    SafetensorsWriter writer(copy, tensors, file.metadata());
    for (const TensorEntry& tensor : file.tensors()) {
      writer.write(tensor.name, {tensor.data, tensor.bytes});
    }
    writer.finish();
    EXPECT_TRUE(read_file(copy) == read_file(path)) << path;
  }
  EXPECT_EQ(files, 23);
}

TEST(SafetensorsWriter, TakesPiecesInAnyOrder) {
  const TempDir dir;
  const std::string path = dir / "a";
  SafetensorsWriter writer(path, {{"logits", DType::kU8, {2, 3}}, {"ids", DType::kI32, {1}}},
                           {{"who", "\"fox\"\n🦊"}});
  writer.write_at("logits", 4, as_bytes("ef"));
  writer.write("logits", as_bytes("ab"));
  writer.write("ids", as_bytes("1"));
  writer.write("logits", as_bytes(""));
  writer.write("logits", as_bytes("cd"));
  writer.write("ids", as_bytes("234"));
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.finish();
  EXPECT_EQ(dir.entries(), 1U);
  const SafetensorsFile file = SafetensorsFile::open(path);
  EXPECT_EQ(bytes_of(file.view("logits")), "abcdef");
  EXPECT_EQ(file.view("logits").shape, (Shape{2, 3}));
  EXPECT_EQ(bytes_of(file.view("ids")), "1234");
  EXPECT_THAT(file.metadata(), ElementsAre(Pair("who", "\"fox\"\n🦊")));
}

TEST(SafetensorsWriter, OrdersByDTypeThenNameAndAlignsTheData) {
  const TempDir dir;
  SafetensorsWriter writer(dir / "a", {{"u", DType::kU8, {3}},
                                       {"b", DType::kF16, {1}},
                                       {"a", DType::kF16, {1}},
                                       {"bf", DType::kBF16, {1}},
                                       {"f", DType::kF32, {}},
                                       {"i", DType::kI32, {1}},
                                       {"l", DType::kI64, {1}},
                                       {"empty", DType::kF32, {0}}});
  const std::vector<std::pair<std::string, std::size_t>> order{
      {"l", 8}, {"empty", 0}, {"f", 4}, {"i", 4}, {"bf", 2}, {"a", 2}, {"b", 2}, {"u", 3}};
  for (const auto& [name, bytes] : order) writer.write(name, as_bytes(std::string(bytes, 'd')));
  writer.finish();
  const SafetensorsFile file = SafetensorsFile::open(dir / "a");
  const std::byte* at = file.find("l")->data;
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(at) % 8, 0U);
  for (const auto& [name, bytes] : order) {
    EXPECT_EQ(file.find(name)->data, at) << name;
    at += bytes;
  }
}

TEST(SafetensorsWriter, MayHoldNoTensor) {
  const TempDir dir;
  SafetensorsWriter(dir / "a", {}).finish();
  EXPECT_EQ(read_file(dir / "a"), std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
}

TEST(SafetensorsWriter, RefusesWhatWasNotDeclared) {
  const TempDir dir;
  SafetensorsWriter writer(dir / "a", {{"t", DType::kU8, {4}}});
  const std::string start = dir / "a" + ": tensor ";
  EXPECT_EQ(error_of([&] { writer.write("s", as_bytes("x")); }), start + "'s' was not declared");
  EXPECT_EQ(error_of([&] { writer.write("t", as_bytes("12345")); }),
            start + "'t': 5 bytes at 0 are beyond its end or written already");
  writer.write("t", as_bytes("12"));
  EXPECT_EQ(error_of([&] { writer.write_at("t", 1, as_bytes("x")); }),
            start + "'t': 1 bytes at 1 are beyond its end or written already");
  EXPECT_EQ(error_of([&] { writer.write_at("t", 4, as_bytes("x")); }),
            start + "'t': 1 bytes at 4 are beyond its end or written already");
  EXPECT_EQ(error_of([&] { writer.write_at("t", ~std::uint64_t{0}, as_bytes("xx")); }),
            start + "'t': 2 bytes at 18446744073709551615 are beyond its end or written already");
  EXPECT_EQ(error_of([&] { writer.finish(); }), start + "'t': bytes from 2 on were not written");
  writer.write("t", as_bytes("34"));
  EXPECT_EQ(error_of([&] { writer.write("t", as_bytes("x")); }),
            start + "'t': 1 bytes at 0 are beyond its end or written already");
  writer.finish();
  EXPECT_THAT(read_file(dir / "a"), EndsWith("1234"));
}

TEST(SafetensorsWriter, RefusesNamesThatCollide) {
  const TempDir dir;
  for (const char* name : {"t", "__metadata__"}) {
    EXPECT_EQ(error_of([&] {
                SafetensorsWriter(dir / "a", {{"t", DType::kU8, {1}}, {name, DType::kU8, {2}}});
              }),
              dir / "a" + ": tensor '" + name + "': the name is taken");
  }
  EXPECT_EQ(dir.entries(), 0U);
}

TEST(SafetensorsWriter, LeavesNothingBehindWhenItFails) {
  const TempDir dir;
  {
    SafetensorsWriter writer(dir / "a", {{"t", DType::kU8, {4}}});
    writer.write("t", as_bytes("12"));
    EXPECT_EQ(dir.entries(), 1U);
  }
  EXPECT_EQ(dir.entries(), 0U);
  const FileSizeLimit limit(4096);
  EXPECT_EQ(error_of([&] {
              SafetensorsWriter(dir / "a", {{"t", DType::kF32, {1024}}});
            }),
            dir / "a" + ": cannot reserve 4168 bytes: File too large");
  EXPECT_EQ(dir.entries(), 0U);
  EXPECT_EQ(error_of([&] { SafetensorsWriter("/dev/full", {}); }),
            "/dev/full: cannot write: No space left on device");
}

}  // namespace
}  // namespace deltafox::io
