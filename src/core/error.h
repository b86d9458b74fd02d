// Throwing Error with a formatted message.
#pragma once

#include <fmt/format.h>

#include <utility>

#include "deltafox/error.h"

namespace deltafox {

// fail("{}: tensor {}: ...", path, name): throws Error with one formatted line.
template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace deltafox
