// Answers of a hub: the list of files, and the headers. The first byte says which is read.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

#include "deltafox/error.h"
#include "io/hub_listing.h"
#include "io/hub_names.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace hub = deltafox::hub;
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 0) {
    try {
      const hub::Listing listing = hub::parse_listing(text, "fuzz");
      if (!hub::is_commit(listing.commit)) __builtin_trap();
      for (const auto& name : listing.files) {
        // A name that was let through stays below the directory it is appended to.
        const auto path = (std::filesystem::path("/snapshot") / name).lexically_normal();
        if (!path.string().starts_with("/snapshot/")) __builtin_trap();
      }
    } catch (const deltafox::Error&) {
    }
    return 0;
  }
  const std::string etag = hub::normalize_etag(text);
  if (hub::digest_kind(etag) && etag.find_first_of("/.") != std::string::npos) __builtin_trap();
  if (const auto range = hub::parse_content_range(text); range && range->first < 0)
    __builtin_trap();
  if (const auto bytes = hub::parse_size(text); bytes && *bytes < 0) __builtin_trap();
  if (hub::is_revision(text)) {
    const auto path = (std::filesystem::path("/refs") / text).lexically_normal();
    if (!path.string().starts_with("/refs/")) __builtin_trap();
  }
  if (hub::is_repo_id(text) && text.find("..") != std::string_view::npos) __builtin_trap();
  if (hub::printable(text).find('\n') != std::string::npos) __builtin_trap();
  return 0;
}
