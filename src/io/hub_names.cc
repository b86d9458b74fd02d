#include "io/hub_names.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

namespace deltafox::hub {
namespace {

constexpr std::size_t kMaxRepoName = 96;
constexpr std::size_t kMaxPath = 1024;
constexpr std::size_t kMaxPrinted = 200;

// The locale-free forms of <cctype>.
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_alnum(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
bool is_control(char c) {
  return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
}

bool is_hex(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); });
}

bool is_id_part(std::string_view part) {
  const auto is_word = [](char c) { return is_alnum(c) || c == '_'; };
  return !part.empty() && part.size() <= kMaxRepoName && is_word(part.front()) &&
         is_word(part.back()) && std::all_of(part.begin(), part.end(), [&](char c) {
           return is_word(c) || c == '-' || c == '.';
         });
}

// Calls `check` for each part between slashes; false as soon as one fails.
template <typename Check>
bool all_components(std::string_view path, const Check& check) {
  for (;;) {
    const std::size_t slash = path.find('/');
    if (!check(path.substr(0, slash))) return false;
    if (slash == std::string_view::npos) return true;
    path.remove_prefix(slash + 1);
  }
}

}  // namespace

bool is_repo_id(std::string_view text) {
  if (text.find("--") != std::string_view::npos || text.find("..") != std::string_view::npos ||
      text.ends_with(".git"))
    return false;
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos) return is_id_part(text);
  return is_id_part(text.substr(0, slash)) && is_id_part(text.substr(slash + 1));
}

bool is_revision(std::string_view text) {
  constexpr std::string_view kForbidden = " ~^:?*[\\";
  if (text.empty() || text.size() > kMaxPath || text.find("..") != std::string_view::npos ||
      text.find("@{") != std::string_view::npos)
    return false;
  if (std::any_of(text.begin(), text.end(), [&](char c) {
        return is_control(c) || kForbidden.find(c) != std::string_view::npos;
      }))
    return false;
  return all_components(text, [](std::string_view part) {
    return !part.empty() && part.front() != '.' && part.back() != '.' && !part.ends_with(".lock");
  });
}

bool is_commit(std::string_view text) {
  return text.size() == 40 && is_hex(text);
}

bool is_relative_path(std::string_view text) {
  if (text.size() > kMaxPath ||
      std::any_of(text.begin(), text.end(), [](char c) { return is_control(c) || c == '\\'; }))
    return false;
  return all_components(
      text, [](std::string_view part) { return !part.empty() && part != "." && part != ".."; });
}

bool is_checkpoint_file(std::string_view name) {
  constexpr std::array<std::string_view, 9> kNames = {"config.json",
                                                      "generation_config.json",
                                                      "model.safetensors.index.json",
                                                      "vocab.json",
                                                      "merges.txt",
                                                      "tokenizer.json",
                                                      "tokenizer_config.json",
                                                      "special_tokens_map.json",
                                                      "added_tokens.json"};
  return name.ends_with(".safetensors") ||
         std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

std::string normalize_etag(std::string_view header) {
  if (header.starts_with("W/")) header.remove_prefix(2);
  if (header.size() >= 2 && header.front() == '"' && header.back() == '"')
    header = header.substr(1, header.size() - 2);
  return std::string(header);
}

std::optional<DigestKind> digest_kind(std::string_view etag) {
  if (!is_hex(etag)) return std::nullopt;
  if (etag.size() == 64) return DigestKind::kSha256;
  if (etag.size() == 40) return DigestKind::kGitBlob;
  return std::nullopt;
}

std::optional<std::int64_t> parse_size(std::string_view header) {
  std::int64_t value = 0;
  if (header.empty() || !is_digit(header.front())) return std::nullopt;
  const char* end = header.data() + header.size();
  const auto [stop, error] = std::from_chars(header.data(), end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  return value;
}

std::optional<ContentRange> parse_content_range(std::string_view header) {
  constexpr std::string_view kUnit = "bytes ";
  if (!header.starts_with(kUnit)) return std::nullopt;
  header.remove_prefix(kUnit.size());
  const std::size_t dash = header.find('-');
  const std::size_t slash = header.find('/');
  if (dash == std::string_view::npos || slash == std::string_view::npos || dash > slash)
    return std::nullopt;
  const auto first = parse_size(header.substr(0, dash));
  const auto last = parse_size(header.substr(dash + 1, slash - dash - 1));
  if (!first || !last || *last < *first) return std::nullopt;
  ContentRange range{*first, std::nullopt};
  if (const auto total = header.substr(slash + 1); total != "*") {
    range.total = parse_size(total);
    if (!range.total) return std::nullopt;
  }
  return range;
}

std::string percent_encode(std::string_view text, bool keep_slash) {
  constexpr std::string_view kUnreserved = "-._~";
  std::string encoded;
  for (const char c : text) {
    if (is_alnum(c) || kUnreserved.find(c) != std::string_view::npos || (c == '/' && keep_slash))
      encoded += c;
    else
      encoded += fmt::format("%{:02X}", static_cast<unsigned char>(c));
  }
  return encoded;
}

std::string printable(std::string_view text) {
  std::string line(text.substr(0, kMaxPrinted));
  std::replace_if(
      line.begin(), line.end(),
      [](char c) { return is_control(c) || static_cast<unsigned char>(c) >= 0x80; }, '?');
  if (text.size() > kMaxPrinted) line += "...";
  return line;
}

std::string printable_url(std::string_view url) {
  return printable(url.substr(0, url.find('?')));
}

}  // namespace deltafox::hub
