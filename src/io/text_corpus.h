// Texts to tokenize: plain text files, each a document, and JSON lines, of which each is one.
//
// A corpus is cut into chunks of some 256 KiB that can be tokenized apart: between lines of JSON,
// and within a text in front of a single space between a letter and what is no space, where every
// pre-tokenizer of GPT-2's kind cuts as well. So the ids do not depend on the cuts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "io/file.h"

namespace deltafox::io {

class TextCorpus {
 public:
  // A part of one file.
  struct Chunk {
    std::size_t file = 0;
    std::size_t begin = 0;  // bytes
    std::size_t end = 0;
  };
  // A document or a part of one.
  struct Text {
    std::string_view text;
    std::size_t file = 0;
    std::size_t document = 0;  // where the document begins in the file
    bool ends = true;          // the document ends with this part
  };

  // `inputs`: files, and directories that are searched for .txt and .jsonl; a file is JSON lines if
  // its name ends in .jsonl. `field`: of a line's object, the text. Throws Error if there is none.
  TextCorpus(const std::vector<std::string>& inputs, std::string field);

  const std::vector<std::string>& paths() const { return paths_; }
  std::size_t bytes() const;
  std::size_t file_bytes(std::size_t file) const { return files_[file].bytes().size(); }
  const std::vector<Chunk>& chunks() const { return chunks_; }

  // Hands the texts of a chunk to `visit`. Throws Error that names the file and line of what is no
  // JSON, and of what `visit` refuses. May be called from several threads.
  void for_each(const Chunk& chunk, const std::function<void(const Text&)>& visit) const;

 private:
  std::string_view contents(std::size_t file) const;
  void cut(std::size_t file);
  void visit_lines(const Chunk& chunk, const std::function<void(const Text&)>& visit) const;

  std::string field_;
  std::vector<std::string> paths_;
  std::vector<MappedFile> files_;
  std::vector<Chunk> chunks_;
};

}  // namespace deltafox::io
