// Checkpoints to run the program on, whole and damaged ones, and safetensors files.
#pragma once

#include <cstring>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "deltafox/dtype.h"
#include "io/safetensors.h"
#include "io/utf8.h"
#include "support/temporary.h"

namespace deltafox::test {

inline std::string golden_directory(const std::string& name) {
  return std::string(DELTAFOX_TEST_DATA) + "/golden/" + name;
}

// A copy of a golden checkpoint, to be damaged.
class CheckpointCopy {
 public:
  explicit CheckpointCopy(const std::string& name = "delta_net-tiny") {
    for (const char* file : {"config.json", "model.safetensors"}) {
      std::filesystem::copy_file(golden_directory(name) + "/" + file, directory_.path(file));
    }
  }

  std::string path() const { return directory_.path(); }
  std::string path(const std::string& name) const { return directory_.path(name); }
  void write(const std::string& name, const std::string& contents) const {
    directory_.write(name, contents);
  }

  void edit_config(const std::function<void(nlohmann::json&)>& edit) const {
    auto config = nlohmann::json::parse(read_file(path("config.json")));
    edit(config);
    write("config.json", config.dump());
  }
  // Changes the header of the weights; the data stays as it is.
  void edit_header(const std::function<void(nlohmann::json&)>& edit) const {
    const std::string file = read_file(path("model.safetensors"));
    std::uint64_t length = 0;
    std::memcpy(&length, file.data(), sizeof length);
    auto header = nlohmann::json::parse(file.substr(sizeof length, length));
    edit(header);
    const std::string text = header.dump();
    write("model.safetensors",
          with_length(text.size(), text) + file.substr(sizeof length + length));
  }
  static std::string with_length(std::uint64_t length, const std::string& rest) {
    std::string prefix(sizeof length, '\0');
    std::memcpy(prefix.data(), &length, sizeof length);
    return prefix + rest;
  }

  // A tokenizer whose ids are the bytes of UTF-8; 255, which is none, is <|endoftext|>.
  void add_byte_tokenizer() const {
    nlohmann::json vocabulary;
    char32_t next = 256;
    for (char32_t byte = 0; byte < 255; ++byte) {
      const bool visible = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
      std::string token;
      utf8::append(visible ? byte : next++, token);
      vocabulary[token] = static_cast<int>(byte);
    }
    vocabulary["<|endoftext|>"] = 255;
    write("vocab.json", vocabulary.dump());
    write("merges.txt", "#version: 0.2\n");
  }

 private:
  TemporaryDirectory directory_;
};

// A tensor [rows, columns] to write.
struct IntegerTensor {
  std::string name;
  DType dtype;  // kI64, or one of four bytes
  std::int64_t rows;
  std::vector<std::int32_t> values;
};

inline void write_integers(const std::string& path, const std::vector<IntegerTensor>& tensors) {
  std::vector<io::TensorDeclaration> declarations;
  for (const IntegerTensor& tensor : tensors) {
    const std::int64_t size = std::ssize(tensor.values);
    declarations.push_back({tensor.name, tensor.dtype, {tensor.rows, size / tensor.rows}});
  }
  io::SafetensorsWriter writer(path, declarations);
  for (const IntegerTensor& tensor : tensors) {
    if (size_of(tensor.dtype) == sizeof(std::int32_t)) {
      writer.write(tensor.name, std::as_bytes(std::span(tensor.values)));
    } else {
      const std::vector<std::int64_t> wide(tensor.values.begin(), tensor.values.end());
      writer.write(tensor.name, std::as_bytes(std::span(wide)));
    }
  }
  writer.finish();
}

inline std::vector<float> read_floats(const std::string& path, const std::string& name) {
  const auto file = io::SafetensorsFile::open(path);
  const ConstTensorView view = file.view(name);
  return {view.f32(), view.f32() + view.shape.size()};
}

}  // namespace deltafox::test
