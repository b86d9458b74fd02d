// Checkpoints of one file and of several.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "io/io_support.h"
#include "io/safetensors.h"

namespace deltafox::io {
namespace {

using testing::ElementsAre;
using testing::StartsWith;

constexpr const char* kIndex = "model.safetensors.index.json";

// A file of U8 tensors [4] that hold `value`.
void write_shard(const std::string& path, const std::vector<std::string>& names,
                 const std::string& value) {
  std::vector<TensorDeclaration> tensors;
  for (const std::string& name : names) tensors.push_back({name, DType::kU8, {4}});
  SafetensorsWriter writer(path, tensors);
  for (const std::string& name : names) writer.write(name, as_bytes(value));
  writer.finish();
}

void write_index(const TempDir& dir, const std::string& weight_map) {
  write_file(dir / kIndex, "{\"metadata\":{\"total_size\":12},\"weight_map\":" + weight_map + "}");
}

std::string open_error(const TempDir& dir) {
  return error_of([&] { Checkpoint::open(dir.path()); });
}

std::string text_of(const ConstTensorView& view) {
  return {static_cast<const char*>(view.data), static_cast<std::size_t>(view.shape.size())};
}

TEST(Checkpoint, OfOneFile) {
  const TempDir dir;
  write_shard(dir / "model.safetensors", {"b", "a"}, "1234");
  write_file(dir / kIndex, "not read");
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  EXPECT_EQ(checkpoint.path(), dir.path());
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b"));
  EXPECT_EQ(text_of(checkpoint.view("a")), "1234");
  EXPECT_EQ(checkpoint.file_of("a"), dir / "model.safetensors");
  EXPECT_TRUE(checkpoint.contains("b"));
  EXPECT_FALSE(checkpoint.contains("c"));
  EXPECT_EQ(checkpoint.find("c"), nullptr);
  EXPECT_EQ(checkpoint.find("b")->bytes, 4U);
  const std::string missing = dir.path() + ": tensor 'c' is missing";
  EXPECT_EQ(error_of([&] { checkpoint.view("c"); }), missing);
  EXPECT_EQ(error_of([&] { checkpoint.file_of("c"); }), missing);
}

TEST(Checkpoint, OfSeveralFilesIsOneSetOfTensors) {
  const TempDir dir;
  write_shard(dir / "s1", {"a", "c"}, "1111");
  write_shard(dir / "s2", {"b"}, "2222");
  write_index(dir, R"({"a":"s1","b":"s2","c":"s1"})");
  Checkpoint opened = Checkpoint::open(dir.path());
  const Checkpoint checkpoint = std::move(opened);
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b", "c"));
  EXPECT_EQ(text_of(checkpoint.view("b")), "2222");
  EXPECT_EQ(text_of(checkpoint.view("c")), "1111");
  EXPECT_EQ(checkpoint.file_of("b"), dir / "s2");
}

TEST(Checkpoint, FollowsLinksAsTheHubCacheHasThem) {
  const TempDir blobs;
  const TempDir dir;
  write_shard(blobs / "blob", {"a"}, "1234");
  std::filesystem::create_symlink(blobs / "blob", dir / "model.safetensors");
  EXPECT_EQ(text_of(Checkpoint::open(dir.path()).view("a")), "1234");
}

TEST(Checkpoint, SaysThatThereIsNone) {
  const TempDir dir;
  EXPECT_EQ(open_error(dir), dir.path() + ": holds neither model.safetensors nor " + kIndex);
  EXPECT_EQ(error_of([&] { Checkpoint::open(dir / "no"); }), dir / "no" + ": is not a directory");
  const std::string long_name = dir / std::string(300, 'x');
  EXPECT_EQ(error_of([&] { Checkpoint::open(long_name); }), long_name + ": is not a directory");
}

TEST(Checkpoint, RefusesAMalformedIndex) {
  const TempDir dir;
  const std::string index = dir / kIndex;
  write_file(index, "{\"weight_map\":");
  EXPECT_THAT(open_error(dir), StartsWith(index + ": is not JSON: line 1, column 15: "));
  write_file(index, "[]");
  EXPECT_EQ(open_error(dir), index + ": must hold a JSON object");
  for (const char* weight_map : {"[]", "{}", "null"}) {
    write_index(dir, weight_map);
    EXPECT_EQ(open_error(dir),
              index + ": key 'weight_map': must be an object from tensor names to file names");
  }
  write_file(index, "{}");
  EXPECT_EQ(open_error(dir),
            index + ": key 'weight_map': must be an object from tensor names to file names");
}

TEST(Checkpoint, StaysInItsDirectory) {
  const TempDir dir;
  write_shard(dir / "outside", {"a"}, "1234");
  std::filesystem::create_directory(dir / "inside");
  for (const std::string& shard :
       {std::string("../outside"), dir / "outside", std::string(".."), std::string("."),
        std::string(), std::string("..\\\\outside"), std::string("a\\u0000b")}) {
    write_file(dir / "inside/model.safetensors.index.json",
               fmt::format(R"({{"weight_map":{{"a":"{}"}}}})", shard));
    EXPECT_EQ(error_of([&] { Checkpoint::open(dir / "inside"); }),
              dir / "inside/model.safetensors.index.json" +
                  ": tensor 'a': must be mapped to the name of a file beside the index")
        << shard;
  }
}

TEST(Checkpoint, NamesTheShardAndTensorAtFault) {
  const TempDir dir;
  write_shard(dir / "s1", {"a"}, "1111");
  write_shard(dir / "s2", {"b"}, "2222");
  write_index(dir, R"({"a":"s1","b":"s3"})");
  EXPECT_EQ(open_error(dir), dir / "s3" + ": cannot open: No such file or directory");
  write_index(dir, R"({"a":"s1","c":"s2"})");
  EXPECT_EQ(open_error(dir),
            dir / "s2" + ": tensor 'c' is missing, though " + kIndex + " lists it");
  write_index(dir, R"({"a":"s2","b":"s1"})");
  EXPECT_EQ(open_error(dir),
            dir / "s2" + ": tensor 'a' is missing, though " + kIndex + " lists it");
  write_index(dir, R"({"a":7})");
  EXPECT_EQ(open_error(dir),
            dir / kIndex + ": tensor 'a': must be mapped to the name of a file beside the index");
  write_shard(dir / "s2", {"a", "b"}, "2222");
  write_index(dir, R"({"a":"s1","b":"s2"})");
  EXPECT_EQ(open_error(dir), dir / "s2" + ": tensor 'a' is also in " + dir / "s1");
  write_file(dir / "s2", "short");
  EXPECT_EQ(open_error(dir), dir / "s2" + ": too short for a safetensors file: 5 bytes");
}

}  // namespace
}  // namespace deltafox::io
