// The environment variables of Python's huggingface_hub. An empty variable counts as unset.
#pragma once

#include <filesystem>
#include <string>

namespace deltafox::hub {

// $HF_HUB_CACHE, else $HUGGINGFACE_HUB_CACHE, else $HF_HOME/hub, where $HF_HOME defaults to
// $XDG_CACHE_HOME/huggingface, else ~/.cache/huggingface. "~" and "$NAME" inside them are expanded.
// Throws Error if a home directory is needed and there is none.
std::filesystem::path cache_directory();

// $HF_ENDPOINT, else https://huggingface.co; no slash at the end. Throws Error if it is no http(s)
// URL.
std::string endpoint();

// $HF_TOKEN, else the first line of $HF_TOKEN_PATH or $HF_HOME/token; empty if there is none.
// Throws Error if it could not be sent in a header.
std::string token();

// $HF_HUB_OFFLINE is 1, true, yes or on.
bool is_offline();

}  // namespace deltafox::hub
