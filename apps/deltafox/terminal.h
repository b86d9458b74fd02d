// What the program writes: results to stdout, progress and notes to stderr.
#pragma once

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace deltafox::app {

bool stdout_is_terminal();
bool stderr_is_terminal();

// Thrown when whoever read stdout has gone: the program ends quietly.
struct BrokenPipe {};
// Thrown when a signal has ended the command in good order.
struct Interrupted {};

// Writes all of it at once, unbuffered. Throws Error, or BrokenPipe.
void write_stdout(std::string_view text);
// One value and a newline; text that is not UTF-8 is repaired.
void print_json(const nlohmann::ordered_json& value, int indent = 2);
// The same on one line, as text.
std::string json_line(const nlohmann::ordered_json& value);

// "deltafox: note: <text>" on stderr.
void note(std::string_view text);

// The text without line breaks and other control characters, for a message of one line.
std::string one_line(std::string_view text);

std::string format_bytes(double bytes);        // "3.11 GiB"
std::string format_count(std::int64_t count);  // "834,829,824"; count >= 0
std::string format_duration(double seconds);   // "1:02:03", "0:07"

// A line on stderr with share, rate and time left; nothing where stderr is no terminal.
class ProgressBar {
 public:
  enum class Unit : std::uint8_t { kBytes, kTokens };

  explicit ProgressBar(Unit unit) : unit_(unit) {}
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar() { clear(); }

  // Rates count from the first update of a label on. `total` may be 0 while it is unknown.
  void update(const std::string& label, std::int64_t done, std::int64_t total);
  // Removes the line.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;

  std::string amount(double value) const;

  Unit unit_;
  bool shown_ = false;
  std::string label_;
  std::int64_t first_done_ = 0;
  Clock::time_point begin_;
  Clock::time_point drawn_;
};

}  // namespace deltafox::app
