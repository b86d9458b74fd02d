// tokenizer.json of the Hugging Face tokenizers library, as far as it describes GPT-2's byte-level
// BPE.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "io/vocabulary.h"

namespace deltafox {

struct TokenizerJson {
  bool add_prefix_space = false;
  // The token that its post-processor puts in front.
  std::optional<std::string> prepends;
  // The token for bytes that the vocabulary lacks.
  std::optional<std::string> unk;
};

// Reads tokens and merges into `builder`. Throws Error for any other kind of tokenizer, naming the
// setting that makes it one.
TokenizerJson read_tokenizer_json(std::string_view text, const std::string& file,
                                  VocabularyBuilder& builder);

}  // namespace deltafox
