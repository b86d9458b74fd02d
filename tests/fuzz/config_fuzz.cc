// Config files: every getter either keeps its promise or throws one line.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include "deltafox/error.h"
#include "io/json.h"

namespace {

template <typename Read>
void attempt(Read&& read) {
  try {
    read();
  } catch (const deltafox::Error& error) {
    const std::string_view what = error.what();
    if (!what.starts_with("fuzz: ") || what.find('\n') != what.npos) __builtin_trap();
  }
}

void require(bool condition) {
  if (!condition) __builtin_trap();
}

void read_all(const deltafox::io::JsonObject& object) {
  const char* const key = "k";
  attempt([&] {
    const std::int64_t value = object.integer(key, 1, -5, 100);
    require(value >= -5 && value <= 100);
  });
  attempt([&] {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    const double value = object.number(key, 1, 0, kInfinity);
    require(value >= 0);
  });
  attempt([&] { object.boolean(key, false); });
  attempt([&] { object.optional_string(key, "x"); });
  attempt([&] { require(object.choice(key, "l2", {"l2", "sum"}).size() <= 3); });
  attempt([&] {
    for (const std::int64_t value : object.integers(key, 0, 7)) require(value >= 0 && value <= 7);
  });
  attempt([&] {
    for (const double value : object.numbers(key, -1, 1)) require(value >= -1 && value <= 1);
  });
  attempt([&] { object.strings(key); });
  attempt([&] {
    if (const auto inner = object.object(key)) read_all(*inner);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  attempt([&] { read_all(deltafox::io::JsonObject::parse(text, "fuzz")); });
  return 0;
}
