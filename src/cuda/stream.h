// What ops of the CUDA back end find in a Context: the stream, small arrays in device memory, the
// card's properties.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "core/context.h"
#include "core/tensor.h"

namespace deltafox::cuda {

struct StepProgram;  // cuda/step_program.h

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // For launches; they come after all work on memory (core/device.h) that was issued before.
  cudaStream_t handle();
  void synchronize();

  // Between begin and end, launches are recorded instead of run, and uploads happen at once. Memory
  // must not be allocated.
  void begin_capture();
  cudaGraph_t end_capture();
  bool capturing() const { return capturing_; }

  // A copy of `bytes` in device memory. Equal contents are uploaded once and kept, so what repeats
  // from call to call costs a look-up, and captured graphs may keep the pointer while
  // uploads_generation() stays the same.
  const void* upload(std::span<const std::byte> bytes);
  std::uint64_t uploads_generation() const { return uploads_generation_; }
  // So many counters for kernels that find zeros and leave zeros. They stay where they are until
  // more are asked for.
  std::int32_t* zeros(std::int64_t count);

  // The step program that is being gathered, or null. Opening returns false where one is open, or
  // where the card has no use for one.
  StepProgram* program() { return program_open_ ? program_.get() : nullptr; }
  bool open_program();
  void close_program();

  cublasLtHandle_t blas() const { return blas_; }
  int multiprocessors() const { return multiprocessors_; }
  int major() const { return major_; }                 // of the compute capability
  std::int64_t launches() const { return launches_; }  // handle()s taken

 private:
  void forget_uploads();

  cudaStream_t stream_ = nullptr;
  cudaStream_t uploads_stream_ = nullptr;  // of uploads during a capture
  cublasLtHandle_t blas_ = nullptr;
  int multiprocessors_ = 0;
  int major_ = 0;
  bool capturing_ = false;
  std::int64_t launches_ = 0;
  std::uint64_t memory_epoch_ = 0;  // work on memory that the stream waits for already

  std::shared_ptr<StepProgram> program_;
  bool program_open_ = false;

  Tensor zeros_;

  std::unordered_map<std::string, const void*> uploads_;
  std::uint64_t uploads_generation_ = 0;
  std::byte* uploads_device_ = nullptr;
  std::byte* uploads_host_ = nullptr;  // pinned; what copies under way read
  std::size_t uploads_used_ = 0;
};

// Throws Error if there is no GPU or no driver.
void require_device();

inline cudaStream_t stream_of(Context& ctx) {
  return ctx.stream().handle();
}

template <typename T>
const T* upload(Context& ctx, std::span<T> values) {
  static_assert(std::is_trivially_copyable_v<T>);
  return static_cast<const T*>(ctx.stream().upload(std::as_bytes(values)));
}

}  // namespace deltafox::cuda
