#include "cuda/card.h"

#include <algorithm>
#include <cstdlib>

#include "cuda/check.h"

namespace deltafox::cuda {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int compute_major() {
  static const int major = [] {
    const char* const most = std::getenv("DELTAFOX_CUDA_MAJOR");
    const int own = attribute(cudaDevAttrComputeCapabilityMajor);
    return most == nullptr ? own : std::min(own, std::atoi(most));
  }();
  return major;
}

bool plain_products() {
  static const bool plain = std::getenv("DELTAFOX_PLAIN_PRODUCTS") != nullptr;
  return plain;
}

int most_shared_bytes() {
  static const int bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return bytes;
}

}  // namespace deltafox::cuda
