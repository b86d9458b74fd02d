// The one exception type of deltafox.
#pragma once

#include <stdexcept>
#include <string>

namespace deltafox {

// Thrown at boundaries: a bad file, option, shape or environment. what() is one line that names the
// file, tensor, option or line at fault; the program prints it and exits with code 2.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace deltafox
