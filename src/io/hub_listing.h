// What the hub says a repository holds.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace deltafox::hub {

// The answer of /api/models/ID/revision/REVISION: the commit, and those of its files that a
// checkpoint needs.
struct Listing {
  std::string commit;
  std::vector<std::string> files;  // sorted, each once
};

// Reads the answer in time and memory linear in its length. Throws Error, beginning with `subject`,
// if the JSON is no such answer, a needed file has an unsafe name, or config.json or the weights
// are missing.
Listing parse_listing(std::string_view json, std::string_view subject);

}  // namespace deltafox::hub
