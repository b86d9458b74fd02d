#include "io/hub_env.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <string_view>

#include "core/error.h"
#include "io/hub_names.h"

namespace deltafox::hub {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

std::string home() {
  std::string directory = variable("HOME");
  if (directory.empty()) fail("HOME is not set: set HF_HOME to say where checkpoints are kept");
  return directory;
}

// As Python's expandvars(expanduser(path)): the cache must be found where Python finds it.
std::string expand(const std::string& path) {
  std::string expanded;
  std::size_t i = 0;
  if (path == "~" || path.starts_with("~/")) {
    expanded = home();
    i = 1;
  }
  while (i < path.size()) {
    if (path[i] != '$') {
      expanded += path[i++];
      continue;
    }
    const bool braces = i + 1 < path.size() && path[i + 1] == '{';
    const std::size_t begin = i + (braces ? 2 : 1);
    std::size_t end = begin;
    while (end < path.size() &&
           (std::isalnum(static_cast<unsigned char>(path[end])) != 0 || path[end] == '_'))
      ++end;
    const bool closed = !braces || (end < path.size() && path[end] == '}');
    const std::size_t next = end + (braces && closed ? 1 : 0);
    const char* value = closed ? std::getenv(path.substr(begin, end - begin).c_str()) : nullptr;
    expanded += value != nullptr ? std::string(value) : path.substr(i, next - i);
    i = next;
  }
  return expanded;
}

std::filesystem::path hf_home() {
  if (const std::string set = variable("HF_HOME"); !set.empty()) return expand(set);
  if (const std::string xdg = variable("XDG_CACHE_HOME"); !xdg.empty())
    return std::filesystem::path(expand(xdg)) / "huggingface";
  return std::filesystem::path(home()) / ".cache" / "huggingface";
}

std::string trimmed(const std::string& text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

}  // namespace

std::filesystem::path cache_directory() {
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"})
    if (const std::string set = variable(name); !set.empty()) return expand(set);
  return hf_home() / "hub";
}

std::string endpoint() {
  std::string url = variable("HF_ENDPOINT");
  if (url.empty()) return "https://huggingface.co";
  while (url.ends_with('/')) url.pop_back();
  if (!url.starts_with("http://") && !url.starts_with("https://"))
    fail("HF_ENDPOINT: '{}' is not a URL that begins with http:// or https://", printable(url));
  return url;
}

std::string token() {
  std::string origin = "HF_TOKEN";
  std::string text = trimmed(variable("HF_TOKEN"));
  if (text.empty()) {
    const std::string set = variable("HF_TOKEN_PATH");
    // Without any home directory there is no token file either, and none may be needed.
    if (set.empty() && variable("HF_HOME").empty() && variable("XDG_CACHE_HOME").empty() &&
        variable("HOME").empty())
      return {};
    const auto path = set.empty() ? hf_home() / "token" : std::filesystem::path(expand(set));
    origin = path.string();
    std::ifstream file(path);
    std::string line;
    if (file && std::getline(file, line)) text = trimmed(line);
  }
  if (std::any_of(text.begin(), text.end(), [](char c) { return c < '!' || c > '~'; }))
    fail("{}: the token holds characters that a token cannot have", origin);
  return text;
}

bool is_offline() {
  std::string value = variable("HF_HUB_OFFLINE");
  std::transform(value.begin(), value.end(), value.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  constexpr std::array<std::string_view, 4> kTrue = {"1", "true", "yes", "on"};
  return std::find(kTrue.begin(), kTrue.end(), value) != kTrue.end();
}

}  // namespace deltafox::hub
