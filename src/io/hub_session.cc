#include "io/hub_session.h"

#include <algorithm>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"
#include "io/hub_digest.h"
#include "io/hub_env.h"

namespace deltafox::hub {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kReportEvery{100};
constexpr milliseconds kMaxDelay{60 * 1000};

void require_space(const std::filesystem::path& directory, std::int64_t bytes,
                   const std::string& subject) {
  std::error_code error;
  const auto space = std::filesystem::space(directory, error);
  // A file system that cannot tell is tried; writing will show.
  if (!error && space.available < static_cast<std::uintmax_t>(bytes))
    fail("{}: needs {} bytes, and {} has only {} free", subject, bytes, directory.string(),
         space.available);
}

}  // namespace

// How long to wait after failures in a row, and when to give up.
class Session::Patience {
 public:
  explicit Patience(Session& session) : session_(session) {}

  // Something was gained since the last failure.
  void reset() { failures_ = 0; }

  // Waits before the next try; throws Error if there is none.
  void wait(const std::string& what, milliseconds retry_after) {
    const PullOptions& options = session_.options_;
    if (failures_ >= options.max_retries)
      fail("{}: {}, {} times in a row", session_.subject(), what, failures_ + 1);
    if (retry_after > options.max_retry_after)
      fail("{}: {}, and the server asks to wait {} s", session_.subject(), what,
           retry_after.count() / 1000);
    milliseconds delay = options.retry_delay;
    for (int i = 0; i < failures_ && delay < kMaxDelay; ++i) delay *= 2;
    ++failures_;
    const auto until = Clock::now() + std::max(std::min(delay, kMaxDelay), retry_after);
    while (Clock::now() < until) {
      session_.report(false);
      std::this_thread::sleep_for(std::min<Clock::duration>(
          kReportEvery, std::max(until - Clock::now(), Clock::duration())));
    }
  }

 private:
  Session& session_;
  int failures_ = 0;
};

Session::Session(std::string id, const PullOptions& options)
    : id_(std::move(id)),
      options_(options),
      endpoint_(endpoint()),
      token_(token()),
      http_({endpoint_, token_, options.connect_timeout, options.stall_timeout,
             [this] { report(false); }}) {}

// Tells the caller where the download stands, ten times a second or `now`.
void Session::report(bool now) {
  if (!options_.on_progress) return;
  const auto time = Clock::now();
  if (!now && time - last_report_ < kReportEvery) return;
  last_report_ = time;
  if (!options_.on_progress(progress_)) fail("{}: stopped; pull again to resume", subject());
}

void Session::begin_file(const std::string& name) {
  progress_ = {name, 0, 0};
}

std::string Session::subject() const {
  return progress_.file.empty() ? id_ : fmt::format("{}: {}", id_, printable(progress_.file));
}

std::string Session::file_url(const std::string& commit, const std::string& name) const {
  return fmt::format("{}/{}/resolve/{}/{}", endpoint_, id_, commit, percent_encode(name, true));
}

// Says why the server did not give what was asked.
std::string Session::refusal(const Response& response) const {
  if (response.status == 0 || !response.error.empty())
    return fmt::format("{}: {}", printable_url(response.url), response.error);
  std::string said = response.header("x-error-message");
  if (!said.empty()) said = fmt::format(" ({})", printable(said));
  switch (response.status) {
    case 401:
    case 403:
      return fmt::format(
          "access refused with {}{}: the repository is gated, private or not there; {}",
          response.status, said,
          token_.empty() ? "set HF_TOKEN to a token that may read it"
                         : "the token in use may not read it");
    case 404: {
      const std::string code = response.header("x-error-code");
      if (code == "RepoNotFound") return "repository not found" + said;
      if (code == "RevisionNotFound")
        return fmt::format("revision '{}' not found{}", options_.revision, said);
      if (!progress_.file.empty()) return "file not found" + said;
      return fmt::format("repository or revision '{}' not found{}", options_.revision, said);
    }
    default:
      return fmt::format("{} answered with status {}{}", printable_url(response.url),
                         response.status, said);
  }
}

// Sends a small request until it is answered with 200.
Response Session::ask(const Request& request) {
  Patience patience(*this);
  for (;;) {
    Response response = http_.send(request);
    reached_ = reached_ || response.status != 0;
    // A HEAD that describes its target is a redirect.
    const bool described = response.error.empty() && !response.header("x-linked-etag").empty() &&
                           response.status >= 300 && response.status < 400;
    if (response.ok() || described) return response;
    // Who never had a connection is told so at once; one that was lost may come back.
    if (!response.transient || (response.unreachable && !reached_))
      fail("{}: {}", subject(), refusal(response));
    patience.wait(refusal(response), response.retry_after);
  }
}

Listing Session::list() {
  begin_file({});
  const Response response = ask({Request::Method::kGet,
                                 fmt::format("{}/api/models/{}/revision/{}", endpoint_, id_,
                                             percent_encode(options_.revision, false)),
                                 0,
                                 {}});
  return parse_listing(response.body, id_);
}

FileInfo Session::describe(const std::string& commit, const std::string& name) {
  begin_file(name);
  const Response response = ask({Request::Method::kHead, file_url(commit, name), 0, {}});
  if (response.header("x-repo-commit") != commit)
    fail("{}: the server answers with commit '{}' for {} (X-Repo-Commit)", subject(),
         printable(response.header("x-repo-commit")), commit);
  const bool linked = !response.header("x-linked-etag").empty();
  FileInfo file{name, normalize_etag(response.header(linked ? "x-linked-etag" : "etag")), 0};
  if (!digest_kind(file.etag))
    fail("{}: the server's etag '{}' is neither a SHA-256 nor a git blob id", subject(),
         printable(file.etag));
  std::string size = response.header("x-linked-size");
  // The length of a redirect is not the file's.
  if (size.empty() && response.status == 200) size = response.header("content-length");
  const auto bytes = parse_size(size);
  if (!bytes) fail("{}: the server gives no size ('{}')", subject(), printable(size));
  file.size = *bytes;
  return file;
}

void Session::fetch(const std::string& commit, const FileInfo& file, const RepoCache& cache) {
  begin_file(file.name);
  progress_.total_bytes = file.size;
  cache.create_directories();
  const FileLock lock(cache.lock(file.etag), [this] { report(false); });
  const auto blob = cache.blob(file.etag);
  std::error_code error;
  // A blob of another size is damaged: its name promises the contents.
  if (static_cast<std::int64_t>(std::filesystem::file_size(blob, error)) == file.size && !error)
    return;

  PartialFile partial(cache.partial(file.etag));
  if (partial.size() > file.size) partial.clear();
  require_space(blob.parent_path(), file.size - partial.size(), subject());
  progress_.done_bytes = partial.size();
  report(true);
  download(file_url(commit, file.name), file, partial);

  const std::string digest =
      file_digest(partial.path().string(), *digest_kind(file.etag), [this] { report(false); });
  if (digest != file.etag) {
    partial.discard();
    fail("{}: expected the digest {}, got {}; the download is discarded", subject(), file.etag,
         digest);
  }
  report(true);
  partial.commit(blob);
}

// Appends to `partial` until it has the file's size.
void Session::download(const std::string& url, const FileInfo& file, PartialFile& partial) {
  const auto reject = [&](const std::string& why) {
    partial.discard();
    fail("{}: {}; the download is discarded", subject(), why);
  };
  // The partial file is named by its digest, so that what the server has now continues what it had
  // then; an If-Range would only compare with the etag of whatever host the redirects lead to.
  bool first_piece = true;
  const auto sink = [&](const Response& response, std::span<const char> bytes) {
    if (std::exchange(first_piece, false)) {
      std::optional<std::int64_t> total = parse_size(response.header("content-length"));
      if (response.status == 206) {
        const auto range = parse_content_range(response.header("content-range"));
        if (!range || range->first != partial.size())
          reject(fmt::format("asked for bytes from {}, the server sends '{}'", partial.size(),
                             printable(response.header("content-range"))));
        total = range->total;
      } else {
        partial.clear();  // the server ignores ranges, and begins anew
      }
      if (total && *total != file.size)
        reject(fmt::format("expected {} bytes, the server offers {}", file.size, *total));
    }
    if (static_cast<std::int64_t>(bytes.size()) > file.size - partial.size())
      reject(fmt::format("expected {} bytes, the server sends more", file.size));
    partial.append(bytes);
    progress_.done_bytes = partial.size();
  };

  Patience patience(*this);
  std::int64_t most = partial.size();
  while (partial.size() < file.size) {
    first_piece = true;
    const Response response = http_.send({Request::Method::kGet, url, partial.size(), sink});
    if (partial.size() == file.size) return;
    std::string what = refusal(response);
    if (response.ok()) {
      what = fmt::format("expected {} bytes, the server sent {}", file.size, partial.size());
    } else if (response.status == 416) {
      what =
          fmt::format("expected {} bytes, the server has none after {}", file.size, partial.size());
      partial.clear();
    } else if (!response.transient) {
      fail("{}: {}", subject(), what);
    }
    // Only what was never had before counts as gained, or a server that ignores ranges and drops
    // the connection would be asked forever.
    if (partial.size() > most) patience.reset();
    most = std::max(most, partial.size());
    patience.wait(what, response.retry_after);
  }
}

}  // namespace deltafox::hub
