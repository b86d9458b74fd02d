#include "deltafox/tokenizer.h"

#include <utility>

#include "core/error.h"
#include "io/json_escape.h"
#include "io/tokenizer_impl.h"
#include "io/utf8.h"

namespace deltafox {
namespace {

const Vocabulary::Token& checked_token(const Vocabulary& vocabulary, std::int32_t id) {
  if (id < 0 || static_cast<std::size_t>(id) >= vocabulary.tokens.size()) {
    fail("token id {} is out of range, the vocabulary has {} ids", id, vocabulary.tokens.size());
  }
  const Vocabulary::Token& token = vocabulary.tokens[static_cast<std::size_t>(id)];
  if (!token.exists) fail("no token has id {}", id);
  return token;
}

// Replaces or refuses what the vocabulary has no token for.
void fill_missing(std::string_view text, const TokenizerModel& model, std::int32_t* begin,
                  std::int32_t* end) {
  for (std::int32_t* id = begin; id != end; ++id) {
    if (*id != Bpe::kNoToken) continue;
    if (model.unk) {
      *id = *model.unk;
      continue;
    }
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      if (model.vocabulary.bpe.byte_token(byte) == Bpe::kNoToken) {
        fail("the vocabulary has no token for byte 0x{:02X}, and there is no unk_token", byte);
      }
    }
  }
}

// Byte-pair encoding of text without special tokens.
void encode_plain(std::string_view text, const TokenizerModel& model,
                  std::vector<std::int32_t>& ids) {
  const std::size_t before = ids.size();
  model.vocabulary.bpe.encode(text, ids);
  if (model.vocabulary.missing_byte) {
    fill_missing(text, model, ids.data() + before, ids.data() + ids.size());
  }
}

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const TokenizerModel& model = *impl_->model;
  const std::size_t bad = utf8::first_invalid(text);
  if (bad != std::string_view::npos) fail("the text is not UTF-8 at byte {}", bad);

  std::string prepared;
  if (model.escapes_json) {
    // The official class puts its space before every text and then escapes.
    prepared = escape_json(text);
    if (model.add_prefix_space) prepared.insert(prepared.begin(), ' ');
    text = prepared;
  }
  std::vector<std::int32_t> ids;
  ids.reserve(text.size() / 4 + 16);
  if (add_special_tokens && impl_->add_bos) ids.push_back(model.bos.value());
  std::string spaced;
  for (std::size_t at = 0; at < text.size();) {
    const auto match = model.vocabulary.split_first.find(text, at);
    std::string_view part = text.substr(at, match ? match->begin - at : std::string_view::npos);
    if (!part.empty()) {
      // The tokenizers library puts its space before every stretch that has none.
      if (model.add_prefix_space && !model.escapes_json && part[0] != ' ') {
        spaced.assign(1, ' ').append(part);
        part = spaced;
      }
      encode_plain(part, model, ids);
    }
    if (!match) break;
    ids.push_back(match->token);
    at = match->end;
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const {
  const TokenizerModel& model = *impl_->model;
  std::string bytes;
  bytes.reserve(4 * ids.size());
  for (const std::int32_t id : ids) {
    const Vocabulary::Token& token = checked_token(model.vocabulary, id);
    if (!(skip_special_tokens && token.special)) bytes += model.vocabulary.bytes_of(token);
  }
  if (utf8::first_invalid(bytes) != std::string::npos) bytes = utf8::replace_invalid(bytes);
  return model.escapes_json ? unescape_all(bytes) : bytes;
}

void Tokenizer::set_add_bos_token(bool add) {
  if (add && !impl_->model->bos) fail("add_bos_token: the tokenizer has no BOS token");
  impl_ = std::make_shared<const Impl>(Impl{impl_->model, add});
}

bool Tokenizer::add_bos_token() const {
  return impl_->add_bos;
}
bool Tokenizer::escapes_json() const {
  return impl_->model->escapes_json;
}

std::int32_t Tokenizer::vocab_size() const {
  return static_cast<std::int32_t>(impl_->model->vocabulary.tokens.size());
}

std::optional<std::int32_t> Tokenizer::bos_token_id() const {
  return impl_->model->bos;
}
std::optional<std::int32_t> Tokenizer::eos_token_id() const {
  return impl_->model->eos;
}

bool Tokenizer::is_special(std::int32_t id) const {
  return id >= 0 && id < vocab_size() &&
         impl_->model->vocabulary.tokens[static_cast<std::size_t>(id)].special;
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

std::string StreamDecoder::push(std::int32_t id) {
  const TokenizerModel& model = *tokenizer_.impl_->model;
  const Vocabulary::Token& token = checked_token(model.vocabulary, id);
  if (skip_special_tokens_ && token.special) return {};
  pending_ += model.vocabulary.bytes_of(token);
  const std::size_t tail = utf8::incomplete_tail(pending_);
  const std::string_view certain = std::string_view(pending_).substr(0, pending_.size() - tail);
  std::string text = utf8::replace_invalid(certain);
  if (!model.escapes_json) {
    pending_.erase(0, certain.size());
    return text;
  }
  std::string piece;
  const std::size_t used = unescape(text, false, unescape_, piece);
  pending_ = text.substr(used) + pending_.substr(certain.size());
  return piece;
}

std::string StreamDecoder::finish() {
  std::string text = utf8::replace_invalid(pending_);
  pending_.clear();
  if (!tokenizer_.escapes_json()) return text;
  std::string piece;
  unescape(text, true, unescape_, piece);
  unescape_ = {};
  return piece;
}

}  // namespace deltafox
