// Tokenizer::load and from_files: from a directory's files to a TokenizerModel.

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "io/json_reader.h"
#include "io/tokenizer_config.h"
#include "io/tokenizer_impl.h"
#include "io/tokenizer_json.h"
#include "io/utf8.h"

namespace deltafox {
namespace {

constexpr const char* kEndOfText = "<|endoftext|>";
// Far above any real vocabulary; keeps a mistaken file from filling the memory.
constexpr std::uintmax_t kMaxFileSize = std::uintmax_t{256} << 20;

std::optional<std::string> read_if_present(const std::string& directory, const char* name) {
  const std::string path = file_in(directory, name);
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) return std::nullopt;
  if (status.type() != std::filesystem::file_type::regular) fail("{}: not a regular file", path);
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail("{}: {}", path, error.message());
  if (size > kMaxFileSize) fail("{}: {} bytes are too many for a tokenizer file", path, size);
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("{}: {}", path, std::strerror(errno));
  std::string contents(size, '\0');
  in.read(contents.data(), static_cast<std::streamsize>(size));
  if (static_cast<std::uintmax_t>(in.gcount()) != size) fail("{}: cannot be read", path);
  return contents;
}

void read_vocab(std::string_view text, const std::string& file, VocabularyBuilder& builder) {
  constexpr std::size_t kBytesOfAMember = 20;  // "name": id, as GPT-2's are
  constexpr std::size_t kMostReserved = std::size_t{1} << 18;
  builder.reserve(std::min(text.size() / kBytesOfAMember, kMostReserved));
  JsonReader reader(text, file);
  std::string token;
  reader.enter('{');
  while (reader.next_member(token)) builder.add_token(token, reader.read_integer());
  reader.finish();
}

// One "left right" a line; the first line may be "#version: ...".
void read_merges(std::string_view text, const std::string& file, VocabularyBuilder& builder) {
  std::uint32_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
    if (utf8::first_invalid(line) != std::string_view::npos) {
      fail("{}: line {}: not UTF-8", file, number);
    }
    const std::size_t space = line.find(' ');
    if (space == 0 || space >= line.size() - 1 ||
        line.find(' ', space + 1) != std::string_view::npos) {
      fail("{}: line {}: expected two tokens with a space between them", file, number);
    }
    builder.add_merge(line.substr(0, space), line.substr(space + 1), number);
  }
}

// Gives a token its role; std::nullopt where the files say that there is none.
std::optional<std::int32_t> assign(const TokenizerConfig::Role& role, const char* key,
                                   VocabularyBuilder& builder) {
  if (role.content.empty()) return std::nullopt;
  const std::optional<std::int32_t> id = builder.id_of(role.content);
  if (!id) {
    fail("{}: {} {} is not in the vocabulary", role.file, key, quote_name(role.content));
  }
  builder.add_special(role.content, *id, true, role.file);
  return id;
}

class ModelLoader {
 public:
  ModelLoader(const TokenizerFiles& files, const std::string& directory)
      : files_(files),
        directory_(directory),
        config_(parse_tokenizer_config(files, directory)),
        from_vocab_(files.vocab && files.merges),
        file_(file_in(directory, from_vocab_ ? "vocab.json" : "tokenizer.json")),
        builder_(file_) {}

  // The model, and whether BOS is prepended.
  std::pair<std::shared_ptr<const TokenizerModel>, bool> load() {
    const TokenizerJson fast = read_tokens();
    for (const TokenizerConfig::AddedToken& token : config_.added_tokens) {
      builder_.add_special(token.content, token.id, token.special, config_.file);
    }
    auto model = std::make_shared<TokenizerModel>();
    assign_roles(fast, *model);
    model->escapes_json = config_.escapes_json;
    model->add_prefix_space = config_.add_prefix_space.value_or(fast.add_prefix_space);
    const bool add_bos = adds_bos(fast, *model);
    model->vocabulary = from_vocab_ ? builder_.build(file_in(directory_, "merges.txt"), "line")
                                    : builder_.build(file_, "merge");
    return {std::move(model), add_bos};
  }

 private:
  TokenizerJson read_tokens() {
    if (from_vocab_) {
      read_vocab(*files_.vocab, file_, builder_);
      read_merges(*files_.merges, file_in(directory_, "merges.txt"), builder_);
      return {};
    }
    if (!files_.tokenizer) {
      fail("{}: there is neither vocab.json with merges.txt nor tokenizer.json", directory_);
    }
    return read_tokenizer_json(*files_.tokenizer, file_, builder_);
  }

  void assign_roles(const TokenizerJson& fast, TokenizerModel& model) {
    const auto or_default = [&](const std::optional<TokenizerConfig::Role>& role) {
      if (role) return *role;
      const bool known = builder_.id_of(kEndOfText).has_value();
      return TokenizerConfig::Role{known ? kEndOfText : "", file_};
    };
    model.bos = assign(or_default(config_.bos), "bos_token", builder_);
    model.eos = assign(or_default(config_.eos), "eos_token", builder_);
    // An assumed unk_token would put <|endoftext|> inside a text: only a named one stands for
    // bytes.
    if (config_.unk) model.unk = assign(*config_.unk, "unk_token", builder_);
    if (!from_vocab_) {
      model.unk = fast.unk ? assign({*fast.unk, file_}, "unk_token", builder_) : std::nullopt;
    }
    for (const TokenizerConfig::Role& role : config_.others) {
      assign(role, "special token", builder_);
    }
  }

  bool adds_bos(const TokenizerJson& fast, const TokenizerModel& model) const {
    if (fast.prepends && builder_.id_of(*fast.prepends) != model.bos) {
      fail("{}: post_processor prepends {}, which is not bos_token", file_,
           quote_name(*fast.prepends));
    }
    const bool add = config_.add_bos_token.value_or(fast.prepends.has_value());
    if (add && !model.bos) {
      fail("{}: add_bos_token is true, but there is no bos_token", config_.file);
    }
    return add;
  }

  const TokenizerFiles& files_;
  const std::string& directory_;
  TokenizerConfig config_;
  bool from_vocab_;
  std::string file_;
  VocabularyBuilder builder_;
};

}  // namespace

Tokenizer Tokenizer::from_files(const TokenizerFiles& files, const std::string& directory) {
  const auto [model, add_bos] = ModelLoader(files, directory).load();
  return Tokenizer(std::make_shared<const Impl>(Impl{model, add_bos}));
}

Tokenizer Tokenizer::load(const std::string& directory) {
  if (!std::filesystem::is_directory(directory)) fail("{}: no such directory", directory);
  TokenizerFiles files;
  files.tokenizer_config = read_if_present(directory, "tokenizer_config.json");
  files.special_tokens_map = read_if_present(directory, "special_tokens_map.json");
  files.vocab = read_if_present(directory, "vocab.json");
  files.merges = read_if_present(directory, "merges.txt");
  if (!files.vocab || !files.merges) files.tokenizer = read_if_present(directory, "tokenizer.json");
  return from_files(files, directory);
}

}  // namespace deltafox
