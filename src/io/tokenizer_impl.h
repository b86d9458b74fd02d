// What a Tokenizer holds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "deltafox/tokenizer.h"
#include "io/vocabulary.h"

namespace deltafox {

struct TokenizerModel {
  Vocabulary vocabulary;
  bool escapes_json = false;
  bool add_prefix_space = false;
  std::optional<std::int32_t> bos;
  std::optional<std::int32_t> eos;
  // For bytes that the vocabulary lacks.
  std::optional<std::int32_t> unk;
};

struct Tokenizer::Impl {
  std::shared_ptr<const TokenizerModel> model;
  bool add_bos = false;
};

}  // namespace deltafox
