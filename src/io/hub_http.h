// HTTP(S) over libcurl, for one thread: redirects, headers, and bounds on what a server may send.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace deltafox::hub {

struct HttpOptions {
  std::string endpoint;  // URL; the token goes to its scheme, host and port only
  std::string token;     // empty: none
  std::chrono::milliseconds connect_timeout{};
  std::chrono::milliseconds stall_timeout{};
  // Called several times a second while data flows, once a second while none does. May throw.
  std::function<void()> tick;
};

struct Response {
  long status = 0;                             // 0: no answer; `error` says why
  std::string url;                             // after redirects
  std::map<std::string, std::string> headers;  // names in lower case, the last of equal ones
  std::string body;                            // if no sink took it
  std::string error;                           // why the answer is missing or incomplete
  bool unreachable = false;                    // no connection was made
  bool transient = false;                      // worth another try
  std::chrono::seconds retry_after{0};

  bool ok() const { return error.empty() && (status == 200 || status == 206); }
  std::string header(const std::string& name) const;  // empty if absent
};

struct Request {
  enum class Method { kHead, kGet };
  Method method = Method::kGet;
  std::string url;
  std::int64_t first_byte = 0;  // more than 0: ask for the bytes from there on
  // Takes the body of a 200 or 206 as it comes; may throw. Without it the body goes to
  // Response::body.
  std::function<void(const Response&, std::span<const char>)> sink;
};

class HttpClient {
 public:
  explicit HttpClient(HttpOptions options);
  ~HttpClient();
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  // Sends the request and follows redirects; a HEAD stops at the first answer that describes the
  // file it leads to (X-Linked-ETag). What the network or the server does wrong is in the Response;
  // Error is thrown for an answer that is too large, a bad redirect, and what sink and tick throw.
  Response send(const Request& request);

 private:
  struct Handle;
  Response send_once(const Request& request, std::string& redirect);

  HttpOptions options_;
  std::unique_ptr<Handle> handle_;
};

}  // namespace deltafox::hub
