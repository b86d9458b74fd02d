// The two verbs of deltafox/hub.h. A pull fetches every blob before it names any in the snapshot,
// links config.json last, and then writes the ref: whoever finds a snapshot with a config.json
// finds all of it.
#include "deltafox/hub.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <system_error>

#include "core/error.h"
#include "io/hub_cache.h"
#include "io/hub_env.h"
#include "io/hub_names.h"
#include "io/hub_session.h"

namespace deltafox::hub {
namespace {

constexpr const char* kConfig = "config.json";

void require_revision(const std::string& id, const std::string& revision) {
  if (!is_revision(revision))
    fail("{}: '{}' is not the name of a branch, tag or commit", id, printable(revision));
}

// The complete snapshot that the cache holds, or an empty path.
std::filesystem::path cached_snapshot(const RepoCache& cache, const std::string& revision) {
  const auto commit = cache.find_commit(revision);
  return commit && cache.has(*commit, kConfig) ? cache.snapshot(*commit) : std::filesystem::path();
}

std::string at_revision(const std::string& revision) {
  return revision == "main" ? std::string() : " at revision " + revision;
}

}  // namespace

std::string pull(const std::string& id, const PullOptions& options) {
  if (!is_repo_id(id)) fail("'{}' is not a hub id (ORG/NAME)", printable(id));
  require_revision(id, options.revision);
  if (options.connect_timeout.count() <= 0 || options.stall_timeout.count() <= 0)
    fail("{}: connect_timeout and stall_timeout must be positive", id);
  const auto directory = cache_directory();
  const RepoCache cache(directory, id);
  if (is_offline()) {
    const auto snapshot = cached_snapshot(cache, options.revision);
    if (snapshot.empty())
      fail("{}{}: not in the cache {}, and HF_HUB_OFFLINE forbids fetching it", id,
           at_revision(options.revision), directory.string());
    return snapshot.string();
  }

  Session session(id, options);
  const Listing listing = session.list();
  std::map<std::string, std::string> etags;
  for (const auto& name : listing.files) {
    if (cache.has(listing.commit, name)) continue;
    const FileInfo file = session.describe(listing.commit, name);
    session.fetch(listing.commit, file, cache);
    etags.emplace(name, file.etag);
  }
  for (const auto& [name, etag] : etags)
    if (name != kConfig) cache.link(listing.commit, name, etag);
  if (const auto config = etags.find(kConfig); config != etags.end())
    cache.link(listing.commit, kConfig, config->second);
  cache.write_ref(options.revision, listing.commit);
  return cache.snapshot(listing.commit).string();
}

std::string resolve(const std::string& path_or_id, const std::string& revision) {
  std::error_code error;
  const auto status = std::filesystem::status(path_or_id, error);
  if (std::filesystem::is_directory(status)) return path_or_id;
  if (std::filesystem::exists(status))
    fail("{}: is a file, not a checkpoint directory", path_or_id);
  if (!is_repo_id(path_or_id))
    fail("'{}' is neither a directory nor a hub id (ORG/NAME)", printable(path_or_id));
  require_revision(path_or_id, revision);
  const auto directory = cache_directory();
  const auto snapshot = cached_snapshot(RepoCache(directory, path_or_id), revision);
  if (snapshot.empty())
    fail("{}{}: no such directory, and not in the cache {}; get it with: deltafox pull {}{}",
         path_or_id, at_revision(revision), directory.string(), path_or_id,
         revision == "main" ? std::string() : " --revision " + revision);
  return snapshot.string();
}

}  // namespace deltafox::hub
