// Checkpoints by hub id, through the cache that Python's huggingface_hub uses.
//
// Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_OFFLINE, and the
// proxy variables of libcurl.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace deltafox::hub {

struct Progress {
  std::string file;              // empty while the list of files is fetched
  std::int64_t done_bytes = 0;   // of this file, those resumed included
  std::int64_t total_bytes = 0;  // of this file; 0 while unknown
};

struct PullOptions {
  std::string revision = "main";  // branch, tag or commit
  // Called from the downloading thread, a few times a second; may be empty. Returning false stops
  // the download and leaves the partial file for a later resume.
  std::function<bool(const Progress&)> on_progress;

  // Dropped connections, stalls, 408, 429 and 5xx are tried again: at most `max_retries` times in a
  // row without a byte gained, after retry_delay, 2 retry_delay, 4 retry_delay, ..., no more than a
  // minute each. A Retry-After is obeyed; one beyond max_retry_after is an Error.
  int max_retries = 5;
  std::chrono::milliseconds retry_delay{1000};
  std::chrono::milliseconds max_retry_after{10 * 60 * 1000};
  std::chrono::milliseconds connect_timeout{10 * 1000};
  std::chrono::milliseconds stall_timeout{30 * 1000};  // without a byte from the server
};

// Downloads what a checkpoint needs (config.json, *.safetensors, tokenizer) into the cache and
// returns the snapshot directory. Files that the cache holds are not fetched again; partial ones
// are resumed; SHA-256 (or git blob SHA-1) is checked before a file gets its name, and the snapshot
// is named only when all files are there. Several processes may pull the same id at once. With
// HF_HUB_OFFLINE only looks into the cache. Throws Error naming the id, the file and what the
// server said.
std::string pull(const std::string& id, const PullOptions& options = {});

// The directory of a checkpoint: `path_or_id` itself where that is a directory, else the snapshot
// that the cache holds for this id and revision. Never touches the network. Throws Error that says
// how to get the checkpoint if it is not there.
std::string resolve(const std::string& path_or_id, const std::string& revision = "main");

}  // namespace deltafox::hub
