// Text to token ids and back: GPT-2's byte-level BPE, plain or over JSON-escaped text.
//
// The released checkpoints were trained on JSON-escaped text (the official JSONGPT2Tokenizer):
// encode is BPE of json.dumps(text)[1:-1], decode undoes the escapes. tokenizer_config.json tells
// which of the two a directory holds. A Tokenizer is immutable and may be shared by threads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace deltafox {

class Tokenizer {
 public:
  // Reads a checkpoint directory: tokenizer_config.json and special_tokens_map.json where present,
  // and vocab.json + merges.txt or else tokenizer.json. Throws Error that names the file and entry
  // at fault.
  static Tokenizer load(const std::string& directory);

  // Token ids of UTF-8 text. `add_special_tokens` prepends the BOS token where the directory's
  // add_bos_token says so. Special tokens written in the text become their ids. Throws Error (with
  // the byte offset) if the text is not UTF-8.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens = true) const;

  // Text of token ids, always valid UTF-8 (bytes that are not become U+FFFD). Throws Error for an
  // id out of range.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special_tokens = false) const;

  // Overrides the directory's add_bos_token.
  void set_add_bos_token(bool add);
  bool add_bos_token() const;
  // True for the JSON-escaping variant.
  bool escapes_json() const;

  std::int32_t vocab_size() const;
  std::optional<std::int32_t> bos_token_id() const;
  std::optional<std::int32_t> eos_token_id() const;
  bool is_special(std::int32_t id) const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl);
  std::shared_ptr<const Impl> impl_;
};

// Decodes ids as they come. A piece never ends inside a UTF-8 character, nor, in the JSON-escaping
// variant, inside an escape or between the halves of a surrogate pair; what is incomplete waits for
// the next push. The concatenation of all pieces and finish() is the text of the whole sequence.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = false);
  // Text that became certain with this id; may be empty.
  std::string push(std::int32_t id);
  // The rest, decoded as at the end of a text.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;
};

}  // namespace deltafox
