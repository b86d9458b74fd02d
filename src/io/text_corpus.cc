#include "io/text_corpus.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "io/json.h"

namespace deltafox::io {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kChunkBytes = std::size_t{256} << 10;

bool is_lines(const std::string& path) {
  return path.ends_with(".jsonl");
}

// The files that an input stands for.
std::vector<std::string> files_of(const std::string& input) {
  if (!fs::is_directory(input)) return {input};
  std::vector<std::string> paths;
  for (const auto& entry : fs::recursive_directory_iterator(input)) {
    const std::string path = entry.path().string();
    if (entry.is_regular_file() && (path.ends_with(".txt") || is_lines(path))) {
      paths.push_back(path);
    }
  }
  std::sort(paths.begin(), paths.end());
  if (paths.empty()) fail("{}: holds no .txt or .jsonl files", input);
  return paths;
}

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// The first place to cut at or behind `at`.
std::size_t next_cut(std::string_view text, std::size_t at) {
  for (; at + 1 < text.size(); ++at) {
    const char before = text[at - 1];
    if (text[at] == ' ' && before > ' ' && before < 0x7F && is_letter(text[at + 1])) return at;
  }
  return text.size();
}

// Behind the end of the line that `at` is in.
std::size_t next_line(std::string_view text, std::size_t at) {
  const std::size_t newline = text.find('\n', at);
  return newline == std::string_view::npos ? text.size() : newline + 1;
}

}  // namespace

TextCorpus::TextCorpus(const std::vector<std::string>& inputs, std::string field)
    : field_(std::move(field)) {
  for (const std::string& input : inputs) {
    for (std::string& path : files_of(input)) {
      files_.emplace_back(path);
      paths_.push_back(std::move(path));
      cut(files_.size() - 1);
    }
  }
  if (chunks_.empty()) fail("there is no text to read");
}

std::string_view TextCorpus::contents(std::size_t file) const {
  const std::span<const std::byte> bytes = files_[file].bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void TextCorpus::cut(std::size_t file) {
  const std::string_view text = contents(file);
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t target = begin + kChunkBytes;
    const std::size_t end = target >= text.size()    ? text.size()
                            : is_lines(paths_[file]) ? next_line(text, target)
                                                     : next_cut(text, target);
    chunks_.push_back({file, begin, end});
    begin = end;
  }
}

std::size_t TextCorpus::bytes() const {
  std::size_t total = 0;
  for (std::size_t file = 0; file < files_.size(); ++file) total += file_bytes(file);
  return total;
}

void TextCorpus::for_each(const Chunk& chunk, const std::function<void(const Text&)>& visit) const {
  if (is_lines(paths_[chunk.file])) return visit_lines(chunk, visit);
  const std::string_view text = contents(chunk.file);
  try {
    visit({.text = text.substr(chunk.begin, chunk.end - chunk.begin),
           .file = chunk.file,
           .document = 0,
           .ends = chunk.end == text.size()});
  } catch (const Error& error) {
    fail("{}: from byte {}: {}", paths_[chunk.file], chunk.begin, error.what());
  }
}

void TextCorpus::visit_lines(const Chunk& chunk,
                             const std::function<void(const Text&)>& visit) const {
  const std::string_view text = contents(chunk.file);
  for (std::size_t begin = chunk.begin; begin < chunk.end;) {
    const std::size_t end = next_line(text, begin);
    const std::string_view line = text.substr(begin, end - begin);
    if (line.find_first_not_of(" \t\r\n") != std::string_view::npos) {
      try {
        const nlohmann::json value = parse_json(line, "JSON", JsonDialect::kPython);
        const auto found = value.is_object() ? value.find(field_) : value.end();
        if (!value.is_object() || found == value.end() || !found->is_string()) {
          fail("has no text under '{}'", field_);
        }
        visit({.text = found->get_ref<const std::string&>(),
               .file = chunk.file,
               .document = begin,
               .ends = true});
      } catch (const Error& error) {
        const auto number =
            std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(begin), '\n') + 1;
        fail("{}: line {}: {}", paths_[chunk.file], number, error.what());
      }
    }
    begin = end;
  }
}

}  // namespace deltafox::io
