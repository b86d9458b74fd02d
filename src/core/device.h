// What the CUDA back end implements for core: memory, copies and streams. src/cuda/stubs is linked
// instead where the back end is not built; then all of it throws Error. (docs/cuda.md)
#pragma once

#include <cstddef>
#include <memory>

#include "deltafox/device.h"

namespace deltafox::cuda {

// A stream and what belongs to it; only src/cuda knows what.
class Stream;

// Throws Error if there is no device or no driver.
std::shared_ptr<Stream> make_stream();
// Waits until all that was issued to the stream is done.
void synchronize(Stream& stream);

// Memory is ordered by itself: allocations, releases and copies wait for what streams were given
// before, and what streams are given afterwards waits for them.

// Zeroed, aligned to 256 bytes. Throws Error saying how much was needed.
void* allocate(std::size_t bytes);
void release(void* memory, std::size_t bytes) noexcept;
// Between any two of host and device; done when it returns if the host is one of them.
void copy(void* to, const void* from, std::size_t bytes);
// The same as a part of a stream's work, not waited for. The host's side must be kept until
// synchronize().
void copy(Stream& stream, void* to, const void* from, std::size_t bytes);

}  // namespace deltafox::cuda
