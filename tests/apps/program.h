// Running the real program, and checking how it refuses.
#pragma once

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace deltafox::test {

using Arguments = std::vector<std::string>;

struct Surroundings {
  std::string input{};                               // what stdin holds
  std::optional<std::uint64_t> max_file_bytes{};     // a disk that is full: RLIMIT_FSIZE
  std::optional<std::string> output{};               // where stdout goes, instead of a pipe
  std::map<std::string, std::string> environment{};  // in addition
};

struct Result {
  int exit_code = -1;  // 128 + the signal that ended it
  std::string out;
  std::string err;

  nlohmann::json json() const { return nlohmann::json::parse(out); }
};

// The program while it runs, its stdout and stderr in pipes.
class Program {
 public:
  explicit Program(const Arguments& arguments, const Surroundings& surroundings = {}) {
    std::FILE* const input = std::tmpfile();
    if (input == nullptr || pipe(out_.data()) != 0 || pipe(err_.data()) != 0) {
      throw std::runtime_error("cannot make pipes");
    }
    std::fwrite(surroundings.input.data(), 1, surroundings.input.size(), input);
    std::rewind(input);
    std::vector<char*> argv{const_cast<char*>(DELTAFOX_BINARY)};
    for (const std::string& argument : arguments) {
      argv.push_back(const_cast<char*>(argument.c_str()));
    }
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) become(argv, fileno(input), surroundings);
    std::fclose(input);
    close(out_[1]);
    close(err_[1]);
    if (pid_ < 0) throw std::runtime_error("cannot fork");
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    if (pid_ > 0) {
      kill(SIGKILL);
      wait();
    }
    close_output();
    close(err_[0]);
  }

  void kill(int signal) const { ::kill(pid_, signal); }
  // As `head` does when it has seen enough.
  void close_output() {
    if (out_[0] >= 0) close(out_[0]);
    out_[0] = -1;
  }
  // Waits until stdout holds something.
  std::string read_some() const {
    std::string text(4096, '\0');
    const ssize_t count = read(out_[0], text.data(), text.size());
    text.resize(static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
    return text;
  }

  // Reads all that it writes, until it ends.
  Result finish() {
    Result result;
    std::array<pollfd, 2> polled{pollfd{out_[0], POLLIN, 0}, pollfd{err_[0], POLLIN, 0}};
    const std::array<std::string*, 2> texts{&result.out, &result.err};
    while (polled[0].fd >= 0 || polled[1].fd >= 0) {
      poll(polled.data(), polled.size(), -1);
      for (std::size_t i = 0; i < 2; ++i) {
        if (polled[i].fd < 0 || polled[i].revents == 0) continue;
        std::array<char, 1 << 16> piece;
        const ssize_t count = read(polled[i].fd, piece.data(), piece.size());
        if (count > 0) texts[i]->append(piece.data(), static_cast<std::size_t>(count));
        if (count == 0) polled[i].fd = -1;
      }
    }
    result.exit_code = wait();
    return result;
  }

 private:
  [[noreturn]] void become(const std::vector<char*>& argv, int input,
                           const Surroundings& surroundings) const {
    const int output = surroundings.output ? open(surroundings.output->c_str(), O_WRONLY) : out_[1];
    dup2(input, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    dup2(err_[1], STDERR_FILENO);
    for (const int fd : {out_[0], out_[1], err_[0], err_[1]}) close(fd);
    for (const auto& [name, value] : surroundings.environment) {
      setenv(name.c_str(), value.c_str(), 1);
    }
    if (surroundings.max_file_bytes) {
      const rlimit limit{*surroundings.max_file_bytes, *surroundings.max_file_bytes};
      setrlimit(RLIMIT_FSIZE, &limit);
    }
    execv(argv[0], argv.data());
    _exit(127);
  }

  int wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  }

  std::array<int, 2> out_{-1, -1};
  std::array<int, 2> err_{-1, -1};
  pid_t pid_ = -1;
};

// Runs deltafox with these arguments, without a shell, and waits for it.
inline Result run_program(const Arguments& arguments, const Surroundings& surroundings = {}) {
  return Program(arguments, surroundings).finish();
}

// Exit code 2, nothing on stdout, and one line on stderr that names each culprit.
inline void expect_refusal(const Result& result, const std::vector<std::string>& culprits) {
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, testing::StartsWith("deltafox: error: "));
  EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
  EXPECT_TRUE(result.err.ends_with('\n')) << result.err;
  for (const std::string& culprit : culprits) EXPECT_THAT(result.err, testing::HasSubstr(culprit));
}

// Exit code 0 and nothing on stderr.
inline void expect_success(const Result& result) {
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.err, "");
}

}  // namespace deltafox::test
