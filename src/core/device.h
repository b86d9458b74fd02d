// What the CUDA back end implements for core: memory, copies and streams. src/cuda/stubs is linked
// instead where the back end is not built; then all of it throws Error. (docs/cuda.md)
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include "core/thread_pool.h"
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
// Zeroes the device's memory as a part of a stream's work.
void zero(Stream& stream, void* memory, std::size_t bytes);
// Bytes of the device's memory that are taken, by whomever.
std::size_t memory_in_use();

// Memory that grows at its end and stays where it is, so that nothing has to know its size before.
class GrowingMemory;
// Null where the driver has no such memory.
std::shared_ptr<GrowingMemory> make_growing_memory();
// Its beginning, aligned to 256 bytes, with at least `bytes` there, not zeroed. Throws Error saying
// how much was needed.
std::byte* grow(GrowingMemory& memory, std::size_t bytes);

// Host memory to be copied to the device's.
struct Piece {
  void* to;
  const void* from;
  std::size_t bytes;
};
// Copies much at the speed of the bus, through pinned memory that the pool's threads fill.
void upload(ThreadPool& threads, std::span<const Piece> pieces);

// Work that was recorded once and is run with one call. The addresses that it uses are part of it.
class Graph;
// Records `work` without running it. It must have run before with the same shapes, so that scratch
// memory and uploads are there.
std::shared_ptr<Graph> record(Stream& stream, const std::function<void()>& work);
void run(Stream& stream, Graph& graph);

// Memory of the host that kernels write to, zeroed.
std::shared_ptr<void> allocate_shared(std::size_t bytes);

}  // namespace deltafox::cuda
