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

// The contents of a tokenizer's files; std::nullopt where there is no such file.
struct TokenizerFiles {
  std::optional<std::string> tokenizer_config;    // tokenizer_config.json
  std::optional<std::string> special_tokens_map;  // special_tokens_map.json
  std::optional<std::string> vocab;               // vocab.json
  std::optional<std::string> merges;              // merges.txt
  std::optional<std::string> tokenizer;           // tokenizer.json
};

class Tokenizer {
 public:
  // Reads a checkpoint directory: tokenizer_config.json and special_tokens_map.json where present,
  // and vocab.json + merges.txt or else tokenizer.json. Throws Error that names the file and entry
  // at fault.
  //
  // What the files do not say is as in GPT2Tokenizer: BOS and EOS are <|endoftext|> if the
  // vocabulary has it, and BOS is not prepended. A vocabulary may lack some of the 256 bytes: they
  // become unk_token where the files name one, and otherwise encode throws.
  static Tokenizer load(const std::string& directory);
  // The same from memory; `directory` only stands in front of the file names in errors.
  static Tokenizer from_files(const TokenizerFiles& files, const std::string& directory = ".");

  // Token ids of UTF-8 text. `add_special_tokens` prepends the BOS token where the directory's
  // add_bos_token says so. Special tokens written in the text become their ids. Throws Error (with
  // the byte offset) if the text is not UTF-8.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens = true) const;

  // Text of token ids, always valid UTF-8 (bytes that are not become U+FFFD, and so do escaped
  // surrogates without their other half). Throws Error for an id out of range.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special_tokens = false) const;

  // Overrides the directory's add_bos_token. Throws Error if there is no BOS token to add.
  void set_add_bos_token(bool add);
  bool add_bos_token() const;
  // True for the JSON-escaping variant.
  bool escapes_json() const;

  // One more than the highest id.
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

namespace detail {
// What the escapes read so far leave open.
struct UnescapeState {
  bool refused = false;         // JSON's rules refused the text; Python's apply
  bool in_name = false;         // inside \N{...}
  char16_t high_surrogate = 0;  // waits for its other half
};
}  // namespace detail

// Decodes ids as they come. A piece never ends inside a UTF-8 character, nor, in the JSON-escaping
// variant, inside an escape or between the halves of a surrogate pair; what is incomplete waits for
// the next push. The concatenation of all pieces and finish() is the text of the whole sequence.
//
// One exception: where JSON's rules refuse a text, decode reads all of it by Python's rules, but a
// stream only what follows the first refused byte (a raw quote or control character, an unknown or
// unfinished escape). Before it, a raw non-ASCII character and the escape \/ keep their JSON
// meaning; nothing else differs.
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
  detail::UnescapeState unescape_;
};

}  // namespace deltafox
