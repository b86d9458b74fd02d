// Checkpoints by hub id, through the cache that Python's huggingface_hub uses.
//
// Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deltafox::hub {

struct Progress {
  std::string file;
  std::int64_t done_bytes = 0;   // of this file, those resumed included
  std::int64_t total_bytes = 0;  // of this file; 0 while unknown
};

struct PullOptions {
  std::string revision = "main";  // branch, tag or commit
  // Called from the downloading thread, a few times a second; may be empty. Returning false stops
  // the download and leaves the partial file for a later resume.
  std::function<bool(const Progress&)> on_progress;
};

// Downloads what a checkpoint needs (config, weights, tokenizer) into the cache and returns the
// snapshot directory. Files that the cache holds are not fetched again; partial ones are resumed;
// SHA-256 (or git blob SHA-1) is checked before a file gets its name. Throws Error naming the id,
// the file and what the server said.
std::string pull(const std::string& id, const PullOptions& options = {});

// The directory of a checkpoint: `path_or_id` itself where that is a directory, else the snapshot
// that the cache holds for this id and revision. Never touches the network. Throws Error that says
// how to get the checkpoint if it is not there.
std::string resolve(const std::string& path_or_id, const std::string& revision = "main");

}  // namespace deltafox::hub
