// One pull of one repository: what the server is asked, what is retried, and what is believed.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "deltafox/hub.h"
#include "io/hub_cache.h"
#include "io/hub_http.h"
#include "io/hub_listing.h"
#include "io/hub_names.h"

namespace deltafox::hub {

// One file of a commit, as the server describes it.
struct FileInfo {
  std::string name;
  std::string etag;  // its digest, see digest_kind
  std::int64_t size = 0;
};

class Session {
 public:
  // Reads endpoint and token from the environment. `id` and options.revision are valid ones.
  Session(std::string id, const PullOptions& options);

  // The commit of the revision, and those of its files that a checkpoint needs.
  Listing list();
  FileInfo describe(const std::string& commit, const std::string& name);
  // Leaves the contents of a file in the cache's blobs.
  void fetch(const std::string& commit, const FileInfo& file, const RepoCache& cache);

 private:
  class Patience;

  Response ask(const Request& request);
  void download(const std::string& url, const FileInfo& file, PartialFile& partial);
  void begin_file(const std::string& name);
  void report(bool now);
  std::string subject() const;
  std::string file_url(const std::string& commit, const std::string& name) const;
  std::string refusal(const Response& response) const;

  std::string id_;
  PullOptions options_;
  std::string endpoint_;
  std::string token_;
  HttpClient http_;
  bool reached_ = false;  // the server has answered once
  Progress progress_;
  std::chrono::steady_clock::time_point last_report_;
};

}  // namespace deltafox::hub
