// From texts to token files: what `deltafox data` does.
//
// A directory receives train.tokens, heldout.tokens, the tokenizer's files and data.json, which
// says what they were made of. The work is done in parts that are kept until all are there, so that
// a run that was interrupted goes on where it was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deltafox::io {

struct PrepareOptions {
  std::vector<std::string> inputs;  // files and directories (text_corpus.h)
  std::string output;               // a directory, made if there is none
  std::string field = "text";       // of JSON lines
  std::string tokenizer;            // a directory to take the tokenizer from, or
  std::int32_t vocab_size = 0;      // the size of a vocabulary to learn from the texts
  double heldout_share = 0;         // of the documents, which ones being drawn by their places
  int threads = 0;
  std::size_t part_bytes = std::size_t{32} << 20;  // of text: what an interruption loses at most
  // Bytes of text; may be empty.
  std::function<void(const std::string& label, std::int64_t done, std::int64_t total)> on_progress;
};

struct PreparedData {
  std::int64_t documents = 0;
  std::int64_t bytes = 0;  // of the inputs
  std::int64_t train_tokens = 0;
  std::int64_t heldout_tokens = 0;
  std::int32_t vocab_size = 0;
  std::int64_t resumed_bytes = 0;  // of them, found done
};

// Each document is followed by the tokenizer's end-of-text token. Throws Error naming the file and
// place of what is no text, or if the directory holds prepared data already.
PreparedData prepare_data(const PrepareOptions& options);

}  // namespace deltafox::io
