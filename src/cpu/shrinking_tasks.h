// Tasks for kernels that are held by reading weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "core/context.h"

namespace deltafox::cpu {

// Where tasks begin, and `parts`: each takes a share of what the ones before it left. Many parts in
// a row are read faster than a few; with the small ones at the end threads finish together.
inline std::span<const std::int64_t> shrinking_tasks(ScratchScope& scratch, std::int64_t parts,
                                                     std::int64_t threads) {
  const auto size = [&](std::int64_t begin) {
    return std::max<std::int64_t>(1, (parts - begin) / (2 * threads));
  };
  std::int64_t tasks = 0;
  for (std::int64_t begin = 0; begin < parts; begin += size(begin)) ++tasks;
  const std::span<std::int64_t> begins = scratch.array<std::int64_t>(tasks + 1);
  begins[0] = 0;
  for (std::size_t i = 1; i < begins.size(); ++i) begins[i] = begins[i - 1] + size(begins[i - 1]);
  return begins;
}

}  // namespace deltafox::cpu
