// What an action has to say when it fails.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "deltafox/error.h"

namespace deltafox::test {

// What the Error says that `action` throws, "no error" if it throws none. Every message is one
// line.
template <typename Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    std::string what = error.what();
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    return what;
  }
  return "no error";
}

}  // namespace deltafox::test
