// Digests of files, as the hub names its blobs.
#pragma once

#include <functional>
#include <string>

#include "io/hub_names.h"

namespace deltafox::hub {

// The digest of a file, in lower-case hexadecimal. `tick` is called between blocks and may throw.
// Throws Error if the file cannot be read.
std::string file_digest(const std::string& path, DigestKind kind,
                        const std::function<void()>& tick);

}  // namespace deltafox::hub
