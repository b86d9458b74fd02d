// Reading and writing safetensors files.
#include "io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/float_convert.h"
#include "deltafox/error.h"
#include "io/temp_dir.h"

namespace deltafox::io {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

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

TEST(Safetensors, WritesTheBytesOfTheReferenceImplementation) {
  for (const std::string& path : golden_files()) {
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
}

}  // namespace
}  // namespace deltafox::io
