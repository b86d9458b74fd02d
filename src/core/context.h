// What an op needs besides its arguments: the device, the threads, scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/buffer.h"
#include "core/device.h"
#include "core/tensor.h"
#include "core/thread_pool.h"

namespace deltafox {

// Memory that is handed out in stack order. It grows while a shape is new and is of a piece from
// then on, so the second call with the same shapes allocates nothing. A GPU's grows in place and is
// no larger than what was in use at a time; the host's, whose pages cost nothing before they are
// touched, grows by blocks, which become one when all is released.
class Scratch {
 public:
  explicit Scratch(Device device = Device::kCpu)
      : device_(device),
        growing_(device == Device::kCuda ? cuda::make_growing_memory() : nullptr) {}

  struct Mark {
    std::size_t block;
    std::size_t used;
  };
  // Uninitialised memory, aligned to a cache line (on a GPU to 256 bytes).
  std::byte* allocate(std::size_t bytes);
  Mark mark() const { return {block_, used_}; }
  void release(Mark mark);
  std::size_t capacity() const;

 private:
  Device device_;
  std::shared_ptr<cuda::GrowingMemory> growing_;  // or null, and then there are blocks
  std::size_t grown_ = 0;                         // bytes of it that are there
  std::vector<Buffer> blocks_;
  std::size_t block_ = 0;  // the block in use
  std::size_t used_ = 0;   // bytes used of it
};

// What ops have done since the Context was made.
struct Statistics {
  std::int64_t attention_blocks = 0;          // of queries and keys, with causality and window
  std::int64_t attention_blocks_skipped = 0;  // of them, by adaptive computation pruning
};

// What the CPU's rope has found last. All layers of a model turn the same positions.
struct RopeTables {
  float base = 0;
  float direction = 0;
  std::int64_t dim = 0;
  std::vector<float> positions;  // [T]
  std::vector<float> values;     // [T, 2, dim / 2] cosines and sines
};

// Not thread safe: one Context a calling thread.
class Context {
 public:
  explicit Context(ThreadPool& threads) : threads_(&threads) {}
  // For ops on a GPU: tensors lie in its memory, spans in the host's unless an op says otherwise,
  // and ops return before their work is done. Throws Error if there is no GPU.
  Context(ThreadPool& threads, Device device, DType activation_dtype)
      : threads_(&threads),
        device_(device),
        activation_dtype_(activation_dtype),
        tensor_scratch_(device),
        kept_scratch_(device) {
    if (device == Device::kCuda) stream_ = cuda::make_stream();
  }

  Device device() const { return device_; }
  ThreadPool& threads() { return *threads_; }
  Scratch& scratch() { return scratch_; }
  // Where ScratchScope takes tensors from.
  Scratch& tensor_scratch() { return device_ == Device::kCpu ? scratch_ : tensor_scratch_; }
  // Where tensors lie that outlive the scope they were made in; see KeptScope.
  Scratch& kept_scratch() { return kept_scratch_; }
  Statistics& statistics() { return statistics_; }
  RopeTables& rope_tables() { return rope_tables_; }

  // What blocks keep activations in: F32 on the CPU, F32 or BF16 on a GPU. The residual stream,
  // gates, states and statistics are F32 in any case.
  DType activation_dtype() const { return activation_dtype_; }
  // The GPU's stream.
  cuda::Stream& stream() { return *stream_; }
  // Waits until all ops are done.
  void synchronize() {
    if (stream_) cuda::synchronize(*stream_);
  }
  // While a step is recorded that adds a token to each sequence: where in the GPU's memory the
  // number of its runs so far will be. What depends on positions adds it to those of the recording.
  const std::int32_t* recorded_runs() const { return recorded_runs_; }
  void set_recorded_runs(const std::int32_t* runs) { recorded_runs_ = runs; }
  // Between any two of host and device; see cuda::copy.
  void copy(void* to, const void* from, std::size_t bytes);
  // Zeroes memory of the Context's device.
  void zero(void* memory, std::size_t bytes);

 private:
  ThreadPool* threads_;
  Device device_ = Device::kCpu;
  DType activation_dtype_ = DType::kF32;
  Scratch scratch_;
  std::shared_ptr<cuda::Stream> stream_;
  Scratch tensor_scratch_;
  Scratch kept_scratch_;
  Statistics statistics_;
  RopeTables rope_tables_;
  const std::int32_t* recorded_runs_ = nullptr;
};

// Hands out scratch memory that lives as long as it does; or, with `keep`, tensors that live as
// long as the KeptScope around it.
class ScratchScope {
 public:
  explicit ScratchScope(Context& ctx, bool keep = false)
      : scratch_(ctx.scratch()),
        mark_(scratch_.mark()),
        tensor_scratch_(keep ? ctx.kept_scratch() : ctx.tensor_scratch()),
        tensor_mark_(tensor_scratch_.mark()),
        activation_dtype_(ctx.activation_dtype()),
        keep_(keep) {}
  ~ScratchScope() {
    if (!keep_) tensor_scratch_.release(tensor_mark_);
    scratch_.release(mark_);
  }
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

  // In the memory of the Context's device.
  TensorView tensor(const Shape& shape, DType dtype = DType::kF32) {
    return {tensor_scratch_.allocate(static_cast<std::size_t>(shape.size()) * size_of(dtype)),
            dtype, shape};
  }
  TensorView activation(const Shape& shape) { return tensor(shape, activation_dtype_); }
  // Of the same shape and dtype.
  TensorView like(const ConstTensorView& x) { return tensor(x.shape, x.dtype); }
  // In the host's memory.
  template <typename T>
  std::span<T> array(std::int64_t n) {
    static_assert(std::is_trivially_destructible_v<T>);
    const auto count = static_cast<std::size_t>(n);
    // NOLINTNEXTLINE(bugprone-sizeof-expression): of pointers too.
    return {reinterpret_cast<T*>(scratch_.allocate(count * sizeof(T))), count};
  }

 private:
  Scratch& scratch_;
  Scratch::Mark mark_;
  Scratch& tensor_scratch_;
  Scratch::Mark tensor_mark_;
  DType activation_dtype_;
  bool keep_;
};

// Gives back at its end what was kept while it lived.
class KeptScope {
 public:
  explicit KeptScope(Context& ctx) : scratch_(ctx.kept_scratch()), mark_(scratch_.mark()) {}
  ~KeptScope() { scratch_.release(mark_); }
  KeptScope(const KeptScope&) = delete;
  KeptScope& operator=(const KeptScope&) = delete;

 private:
  Scratch& scratch_;
  Scratch::Mark mark_;
};

}  // namespace deltafox
