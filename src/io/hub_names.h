// The strings of the hub protocol: which are accepted, and how they are read.
//
// Everything here is a pure function over untrusted text. Names that pass may be used as paths
// below the cache and inside URLs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace deltafox::hub {

// "name" or "org/name", by the rules of Python's validate_repo_id, in ASCII.
bool is_repo_id(std::string_view text);

// A branch, tag, commit or refs/pr/N, by the rules of git-check-ref-format.
bool is_revision(std::string_view text);

// 40 lower-case hexadecimal digits.
bool is_commit(std::string_view text);

// A path that stays below the directory it is appended to, without control characters.
bool is_relative_path(std::string_view text);

// Does a checkpoint need this file? Weights (*.safetensors, at any depth), their index, the
// configuration, and the tokenizer.
bool is_checkpoint_file(std::string_view name);

// What an ETag header names: without W/ and quotes.
std::string normalize_etag(std::string_view header);

// How a file with this etag is checked, or nothing if the etag is not a digest.
enum class DigestKind : std::uint8_t {
  kSha256,   // 64 digits: SHA-256 of the bytes (files in LFS)
  kGitBlob,  // 40 digits: SHA-1 of "blob SIZE\0" and the bytes (all others)
};
std::optional<DigestKind> digest_kind(std::string_view etag);

// "bytes FIRST-LAST/TOTAL"; total is empty for "*".
struct ContentRange {
  std::int64_t first = 0;
  std::optional<std::int64_t> total;
};
std::optional<ContentRange> parse_content_range(std::string_view header);

// A number of bytes: digits only.
std::optional<std::int64_t> parse_size(std::string_view header);

// Percent-encoding for one part of a URL's path; '/' stays where `keep_slash`.
std::string percent_encode(std::string_view text, bool keep_slash);

// Foreign text for one line of a message: control and non-ASCII bytes become '?', long text is cut.
std::string printable(std::string_view text);

// The same for a URL, without its query: that of a signed one is a secret.
std::string printable_url(std::string_view url);

}  // namespace deltafox::hub
