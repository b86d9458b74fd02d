#include "terminal.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <system_error>

#include "core/error.h"

namespace deltafox::app {

bool stdout_is_terminal() {
  return isatty(STDOUT_FILENO) == 1;
}

bool stderr_is_terminal() {
  return isatty(STDERR_FILENO) == 1;
}

void write_stdout(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(STDOUT_FILENO, text.data(), text.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      if (errno == EPIPE) throw BrokenPipe{};
      fail("stdout: cannot write: {}", std::generic_category().message(errno));
    }
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

void print_json(const nlohmann::ordered_json& value, int indent) {
  write_stdout(value.dump(indent, ' ', false, nlohmann::ordered_json::error_handler_t::replace) +
               "\n");
}

std::string json_line(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

void note(std::string_view text) {
  fmt::print(stderr, "deltafox: note: {}\n", one_line(text));
}

std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F) {
      line += fmt::format("\\x{:02x}", byte);
    } else {
      line += c;
    }
  }
  return line;
}

std::string format_bytes(double bytes) {
  constexpr std::array kUnits{"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < kUnits.size(); ++unit) bytes /= 1024;
  return unit == 0 ? fmt::format("{:.0f} B", bytes)
                   : fmt::format("{:.{}f} {}", bytes, bytes < 10 ? 2 : 1, kUnits[unit]);
}

std::string format_count(std::int64_t count) {
  const std::string digits = std::to_string(count);
  std::string text;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string format_duration(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::ceil(std::clamp(seconds, 0.0, 1e9)));
  const std::int64_t minutes = whole / 60;
  return minutes < 60 ? fmt::format("{}:{:02}", minutes, whole % 60)
                      : fmt::format("{}:{:02}:{:02}", minutes / 60, minutes % 60, whole % 60);
}

std::string ProgressBar::amount(double value) const {
  return unit_ == Unit::kBytes ? format_bytes(value)
                               : format_count(static_cast<std::int64_t>(value)) + " tokens";
}

void ProgressBar::update(const std::string& label, std::int64_t done, std::int64_t total) {
  static const bool terminal = stderr_is_terminal();
  if (!terminal) return;
  const Clock::time_point now = Clock::now();
  if (label != label_ || !shown_) {
    label_ = label;
    first_done_ = done;
    begin_ = now;
  } else if (now - drawn_ < std::chrono::milliseconds(100) && done < total) {
    return;
  }
  drawn_ = now;
  shown_ = true;

  const double seconds = std::chrono::duration<double>(now - begin_).count();
  const double rate = seconds > 0.2 ? static_cast<double>(done - first_done_) / seconds : 0;
  std::string line = one_line(label);
  if (total > 0) {
    constexpr int kWidth = 24;
    const double share = std::clamp(static_cast<double>(done) / static_cast<double>(total), 0., 1.);
    const int filled = static_cast<int>(share * kWidth);
    line += fmt::format(" [{:#<{}}{:.<{}}] {:3.0f}% of {}", "", filled, "", kWidth - filled,
                        share * 100, amount(static_cast<double>(total)));
  } else {
    line += fmt::format(" {}", amount(static_cast<double>(done)));
  }
  if (rate > 0) {
    line += fmt::format("  {}/s", amount(rate));
    if (total > done) {
      line += fmt::format("  ETA {}", format_duration(static_cast<double>(total - done) / rate));
    }
  }
  struct winsize window {};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 0) {
    line.resize(std::min<std::size_t>(line.size(), window.ws_col - 1U));
  }
  fmt::print(stderr, "\r\x1b[K{}", line);
}

void ProgressBar::clear() {
  if (shown_) fmt::print(stderr, "\r\x1b[K");
  shown_ = false;
}

}  // namespace deltafox::app
