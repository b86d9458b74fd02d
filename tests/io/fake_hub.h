// A hub on 127.0.0.1 for tests: serves one repository as huggingface.co does, records what it was
// asked, and misbehaves where a test's `intercept` says so. Plain sockets, because no HTTP server
// library breaks off, stalls or lies on request.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/sha.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace deltafox::test {

struct HubRequest {
  std::string method;
  std::string target;
  std::map<std::string, std::string> headers;  // names in lower case

  std::string header(const std::string& name) const {
    const auto found = headers.find(name);
    return found == headers.end() ? std::string() : found->second;
  }
  // "GET model.safetensors": the method and the file, or the whole target of an API request.
  std::string brief() const {
    const auto resolve = target.find("/resolve/");
    if (resolve == std::string::npos) return method + " " + target;
    return method + " " + target.substr(target.find('/', resolve + 9) + 1);
  }
};

struct HubReply {
  int status = 200;
  std::map<std::string, std::string> headers;  // Content-Length is that of the body if not given
  std::string body;
  std::optional<std::size_t> cut_after;  // close the connection after so many bytes of the body
  bool chunked = false;                  // no Content-Length
  bool stall = false;                    // after the headers and cut_after, say nothing more
};

inline std::string hex(const unsigned char* bytes, std::size_t count) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

inline std::string sha256(const std::string& data) {
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(), digest.data());
  return hex(digest.data(), digest.size());
}

inline std::string git_blob_id(const std::string& data) {
  const std::string blob = "blob " + std::to_string(data.size()) + std::string(1, '\0') + data;
  std::array<unsigned char, SHA_DIGEST_LENGTH> digest{};
  SHA1(reinterpret_cast<const unsigned char*>(blob.data()), blob.size(), digest.data());
  return hex(digest.data(), digest.size());
}

class FakeHub {
 public:
  FakeHub() {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(listener_, generic, length), 0);
    EXPECT_EQ(::listen(listener_, 64), 0);
    EXPECT_EQ(::getsockname(listener_, generic, &length), 0);
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { accept_all(); });
  }
  ~FakeHub() {
    stopping_ = true;
    ::shutdown(listener_, SHUT_RDWR);
    acceptor_.join();
    for (auto& worker : workers_) worker.join();
    ::close(listener_);
  }
  FakeHub(const FakeHub&) = delete;
  FakeHub& operator=(const FakeHub&) = delete;

  std::string url(const std::string& host = "127.0.0.1") const {
    return "http://" + host + ":" + std::to_string(port_);
  }

  // The repository.
  std::string id = "org/tiny";
  std::string revision = "main";
  std::string commit = std::string(39, '0') + "1";
  std::map<std::string, std::string> files;
  // Changes the reply to a request, or replaces it.
  std::function<void(const HubRequest&, HubReply&)> intercept;

  std::vector<HubRequest> requests() {
    const std::lock_guard lock(mutex_);
    return requests_;
  }
  std::vector<HubRequest> requests(const std::string& brief) {
    auto all = requests();
    std::erase_if(all, [&](const HubRequest& request) { return request.brief() != brief; });
    return all;
  }
  void forget_requests() {
    const std::lock_guard lock(mutex_);
    requests_.clear();
  }

  static bool is_lfs(const std::string& name) { return name.ends_with(".safetensors"); }
  std::string etag(const std::string& name) const {
    return is_lfs(name) ? sha256(files.at(name)) : git_blob_id(files.at(name));
  }

 private:
  void accept_all() {
    for (;;) {
      const int client = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) return;
      workers_.emplace_back([this, client] {
        serve(client);
        ::close(client);
      });
    }
  }

  void serve(int client) {
    std::string text;
    std::array<char, 4096> block{};
    while (text.find("\r\n\r\n") == std::string::npos) {
      const auto count = ::recv(client, block.data(), block.size(), 0);
      if (count <= 0) return;
      text.append(block.data(), static_cast<std::size_t>(count));
    }
    const HubRequest request = parse(text);
    {
      const std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    HubReply reply = answer(request);
    if (intercept) intercept(request, reply);
    send_reply(client, request, reply);
  }

  static HubRequest parse(const std::string& text) {
    HubRequest request;
    std::size_t line_end = text.find("\r\n");
    const std::string first = text.substr(0, line_end);
    request.method = first.substr(0, first.find(' '));
    request.target = first.substr(request.method.size() + 1);
    request.target.resize(request.target.find(' '));
    for (std::size_t at = line_end + 2; (line_end = text.find("\r\n", at)) > at;
         at = line_end + 2) {
      const std::string line = text.substr(at, line_end - at);
      const auto colon = line.find(": ");
      std::string name = line.substr(0, colon);
      std::transform(name.begin(), name.end(), name.begin(), ::tolower);
      request.headers[name] = line.substr(colon + 2);
    }
    return request;
  }

  // What the real hub answers.
  HubReply answer(const HubRequest& request) const {
    HubReply reply;
    std::string escaped = revision;
    for (std::size_t at = 0; (at = escaped.find('/', at)) != std::string::npos;)
      escaped.replace(at, 1, "%2F");
    if (request.target == "/api/models/" + id + "/revision/" + escaped ||
        request.target == "/api/models/" + id + "/revision/" + commit) {
      nlohmann::json listing = {{"id", id}, {"sha", commit}, {"siblings", nlohmann::json::array()}};
      for (const auto& [name, contents] : files)
        listing["siblings"].push_back({{"rfilename", name}});
      reply.headers["Content-Type"] = "application/json";
      reply.body = listing.dump();
      return reply;
    }
    const std::string prefix = "/" + id + "/resolve/" + commit + "/";
    const auto file = request.target.starts_with(prefix)
                          ? files.find(request.target.substr(prefix.size()))
                          : files.end();
    if (file == files.end()) {
      reply.status = 404;
      reply.headers["X-Error-Code"] =
          request.target.starts_with(prefix) ? "EntryNotFound" : "RepoNotFound";
      return reply;
    }
    reply.headers["X-Repo-Commit"] = commit;
    const std::string quoted = '"' + etag(file->first) + '"';
    if (is_lfs(file->first)) {
      reply.headers["X-Linked-Etag"] = quoted;
      reply.headers["X-Linked-Size"] = std::to_string(file->second.size());
    } else {
      reply.headers["ETag"] = "W/" + quoted;
    }
    serve_range(request, file->second, reply);
    return reply;
  }

  static void serve_range(const HubRequest& request, const std::string& contents, HubReply& reply) {
    reply.body = contents;
    const std::string range = request.header("range");
    if (range.empty()) return;
    const std::size_t first = std::stoul(range.substr(std::string("bytes=").size()));
    if (first >= contents.size()) {
      reply.status = 416;
      reply.body.clear();
      return;
    }
    reply.status = 206;
    reply.body = contents.substr(first);
    reply.headers["Content-Range"] = "bytes " + std::to_string(first) + "-" +
                                     std::to_string(contents.size() - 1) + "/" +
                                     std::to_string(contents.size());
  }

  void send_reply(int client, const HubRequest& request, const HubReply& reply) const {
    std::string head =
        "HTTP/1.1 " + std::to_string(reply.status) + " Status\r\nConnection: close\r\n";
    for (const auto& [name, value] : reply.headers) head += name + ": " + value + "\r\n";
    if (!reply.chunked && !reply.headers.contains("Content-Length"))
      head += "Content-Length: " + std::to_string(reply.body.size()) + "\r\n";
    head += "\r\n";
    std::string body;
    if (request.method != "HEAD")
      body = reply.body.substr(0, reply.cut_after.value_or(std::string::npos));
    send_all(client, head + body);
    while (reply.stall && !stopping_) {
      std::array<char, 1> byte{};  // until the client has had enough
      if (::recv(client, byte.data(), byte.size(), MSG_DONTWAIT) == 0) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  }

  static void send_all(int client, std::string_view data) {
    while (!data.empty()) {
      const auto count = ::send(client, data.data(), data.size(), MSG_NOSIGNAL);
      if (count <= 0) return;
      data.remove_prefix(static_cast<std::size_t>(count));
    }
  }

  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::thread acceptor_;
  std::vector<std::thread> workers_;  // grown by the acceptor only, joined after it
  std::mutex mutex_;
  std::vector<HubRequest> requests_;
};

}  // namespace deltafox::test
