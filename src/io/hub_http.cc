#include "io/hub_http.h"

#include <curl/curl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <mutex>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "io/hub_names.h"

namespace deltafox::hub {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxRedirects = 10;
constexpr std::size_t kMaxHeaderBytes = std::size_t{64} << 10;
constexpr std::size_t kMaxBodyBytes = std::size_t{8} << 20;
constexpr long kBufferBytes = 256L << 10;

bool is_success(long status) {
  return status == 200 || status == 206;
}

bool is_transient_status(long status) {
  return status == 408 || status == 429 || status >= 500;
}

bool is_unreachable(CURLcode code) {
  return code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_CONNECT ||
         code == CURLE_COULDNT_RESOLVE_PROXY;
}

bool is_transient_error(CURLcode code) {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_PARTIAL_FILE:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
      return true;
    default:
      return false;
  }
}

// "scheme://host:port" in lower case; empty if `url` cannot be parsed.
std::string origin_of(const std::string& url) {
  const std::unique_ptr<CURLU, decltype(&curl_url_cleanup)> parsed(curl_url(), &curl_url_cleanup);
  if (curl_url_set(parsed.get(), CURLUPART_URL, url.c_str(), 0) != CURLUE_OK) return {};
  const auto part = [&](CURLUPart which) {
    char* text = nullptr;
    std::string copy;
    if (curl_url_get(parsed.get(), which, &text, CURLU_DEFAULT_PORT) == CURLUE_OK) copy = text;
    curl_free(text);
    return copy;
  };
  std::string origin =
      part(CURLUPART_SCHEME) + "://" + part(CURLUPART_HOST) + ":" + part(CURLUPART_PORT);
  std::transform(origin.begin(), origin.end(), origin.begin(), [](char c) {
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  });
  return origin;
}

// What the callbacks of one transfer share. They are called from C, so exceptions wait in `thrown`
// until libcurl has returned.
struct Transfer {
  CURL* curl = nullptr;
  const Request* request = nullptr;
  const HttpOptions* options = nullptr;
  Response response;
  std::size_t header_bytes = 0;
  Clock::time_point last_byte = Clock::now();
  bool stalled = false;
  std::exception_ptr thrown;

  template <typename Function>
  bool guarded(const Function& function) {
    try {
      function();
      return true;
    } catch (...) {
      thrown = std::current_exception();
      return false;
    }
  }

  void on_header(std::string_view line) {
    last_byte = Clock::now();
    header_bytes += line.size();
    if (header_bytes > kMaxHeaderBytes)
      fail("{}: the answer's headers are larger than {} bytes", printable_url(request->url),
           kMaxHeaderBytes);
    if (line.starts_with("HTTP/")) {  // a new answer, after an interim one or a proxy's
      response.headers.clear();
      return;
    }
    const std::size_t colon = line.find(':');
    if (colon == std::string_view::npos) return;
    std::string name(line.substr(0, colon));
    std::transform(name.begin(), name.end(), name.begin(), [](char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
    constexpr std::string_view kSpace = " \t\r\n";
    line.remove_prefix(colon + 1);
    const std::size_t begin = std::min(line.find_first_not_of(kSpace), line.size());
    line = line.substr(begin, line.find_last_not_of(kSpace) + 1 - begin);
    response.headers[name] = line;
  }

  void on_body(std::span<const char> bytes) {
    last_byte = Clock::now();
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &response.status);
    if (request->sink && is_success(response.status)) {
      request->sink(response, bytes);
      last_byte = Clock::now();  // time spent by the sink is not the server's
      return;
    }
    if (response.body.size() + bytes.size() > kMaxBodyBytes)
      fail("{}: the answer is larger than {} bytes", printable_url(request->url), kMaxBodyBytes);
    response.body.append(bytes.data(), bytes.size());
  }

  void on_progress() {
    options->tick();
    auto allowed = options->stall_timeout;
    if (header_bytes == 0) allowed += options->connect_timeout;  // libcurl watches the connecting
    stalled = Clock::now() - last_byte > allowed;
  }
};

// NOLINTBEGIN(bugprone-easily-swappable-parameters): libcurl's signatures
std::size_t header_callback(char* data, std::size_t size, std::size_t count, void* transfer) {
  auto& self = *static_cast<Transfer*>(transfer);
  return self.guarded([&] { self.on_header({data, size * count}); }) ? size * count : 0;
}

std::size_t body_callback(char* data, std::size_t size, std::size_t count, void* transfer) {
  auto& self = *static_cast<Transfer*>(transfer);
  return self.guarded([&] { self.on_body({data, size * count}); }) ? size * count : 0;
}

int progress_callback(void* transfer, curl_off_t /*dltotal*/, curl_off_t /*dlnow*/,
                      curl_off_t /*ultotal*/, curl_off_t /*ulnow*/) {
  auto& self = *static_cast<Transfer*>(transfer);
  return self.guarded([&] { self.on_progress(); }) && !self.stalled ? 0 : 1;
}
// NOLINTEND(bugprone-easily-swappable-parameters)

}  // namespace

struct HttpClient::Handle {
  Handle() {
    static std::once_flag once;
    std::call_once(once, [] { curl_global_init(CURL_GLOBAL_DEFAULT); });
    curl = curl_easy_init();
    if (curl == nullptr) fail("libcurl cannot be initialised");
  }
  ~Handle() { curl_easy_cleanup(curl); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  CURL* curl;
};

std::string Response::header(const std::string& name) const {
  const auto found = headers.find(name);
  return found == headers.end() ? std::string() : found->second;
}

HttpClient::HttpClient(HttpOptions options)
    : options_(std::move(options)), handle_(std::make_unique<Handle>()) {}
HttpClient::~HttpClient() = default;

Response HttpClient::send(const Request& request) {
  Request hop = request;
  for (int redirects = 0; redirects <= kMaxRedirects; ++redirects) {
    std::string redirect;
    Response response = send_once(hop, redirect);
    const bool describes_target =
        request.method == Request::Method::kHead && !response.header("x-linked-etag").empty();
    if (redirect.empty() || describes_target) return response;
    hop.url = redirect;
  }
  fail("{}: more than {} redirects", printable_url(request.url), kMaxRedirects);
}

Response HttpClient::send_once(const Request& request, std::string& redirect) {
  CURL* curl = handle_->curl;
  Transfer transfer;
  transfer.curl = curl;
  transfer.request = &request;
  transfer.options = &options_;
  transfer.response.url = request.url;
  std::array<char, CURL_ERROR_SIZE> message{};

  curl_slist* list = curl_slist_append(nullptr, "Accept-Encoding: identity");
  if (!options_.token.empty() && origin_of(request.url) == origin_of(options_.endpoint))
    list = curl_slist_append(list, ("Authorization: Bearer " + options_.token).c_str());
  const std::unique_ptr<curl_slist, decltype(&curl_slist_free_all)> headers(list,
                                                                            &curl_slist_free_all);

  curl_easy_reset(curl);  // keeps the connections
  curl_easy_setopt(curl, CURLOPT_URL, request.url.c_str());
  curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers.get());
  curl_easy_setopt(curl, CURLOPT_USERAGENT, "deltafox");
  curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
  // From https nothing may lead back to http.
  curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR,
                   options_.endpoint.starts_with("https:") ? "https" : "http,https");
  curl_easy_setopt(curl, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
  curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS,
                   static_cast<long>(options_.connect_timeout.count()));
  curl_easy_setopt(curl, CURLOPT_BUFFERSIZE, kBufferBytes);
  curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, message.data());
  curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, &header_callback);
  curl_easy_setopt(curl, CURLOPT_HEADERDATA, &transfer);
  curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, &body_callback);
  curl_easy_setopt(curl, CURLOPT_WRITEDATA, &transfer);
  curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
  curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, &progress_callback);
  curl_easy_setopt(curl, CURLOPT_XFERINFODATA, &transfer);
  if (request.method == Request::Method::kHead) curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);
  const std::string range = fmt::format("{}-", request.first_byte);
  if (request.first_byte > 0) curl_easy_setopt(curl, CURLOPT_RANGE, range.c_str());

  const CURLcode code = curl_easy_perform(curl);
  if (transfer.thrown) std::rethrow_exception(transfer.thrown);

  Response& response = transfer.response;
  curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &response.status);
  if (transfer.stalled) {
    response.error = "no data for too long";
    response.transient = true;
  } else if (code != CURLE_OK) {
    response.error = printable(message[0] != '\0' ? message.data() : curl_easy_strerror(code));
    response.unreachable = is_unreachable(code);
    response.transient = is_transient_error(code);
  } else {
    response.transient = is_transient_status(response.status);
    char* location = nullptr;
    curl_easy_getinfo(curl, CURLINFO_REDIRECT_URL, &location);
    if (location != nullptr) redirect = location;
  }
  curl_off_t retry_after = 0;
  curl_easy_getinfo(curl, CURLINFO_RETRY_AFTER, &retry_after);
  response.retry_after = std::chrono::seconds(retry_after);
  return std::move(response);
}

}  // namespace deltafox::hub
