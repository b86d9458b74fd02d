// Streams, device memory and its order. See core/device.h and cuda/stream.h.
//
// Work on memory has a stream of its own. Before it is given work, it waits for all streams that
// were given some since it did last; before a stream is given work, it waits for the memory's. So
// memory behaves as if there were one stream, but nothing waits where nothing is pending. What has
// been allocated is zeroed when something is about to use memory, all that is new at once.
#include "cuda/stream.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>

#include "core/device_clock.h"
#include "core/error.h"
#include "cuda/card.h"
#include "cuda/check.h"
#include "cuda/step_program.h"
#include "cuda/zero_blocks.h"

namespace deltafox::cuda {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::size_t kUploadBytes = std::size_t{32} << 20;
// Released blocks up to this size are kept for the next allocation of the same size.
constexpr std::size_t kKeptBlock = std::size_t{2} << 20;

class Memory {
 public:
  // Leaked, so that releases at exit find it.
  static Memory& instance() {
    static auto* memory = new Memory;
    return *memory;
  }

  void* allocate(std::size_t bytes);
  void release(void* memory, std::size_t bytes) noexcept;
  void copy(void* to, const void* from, std::size_t bytes);

  // Makes `stream` wait for the work on memory.
  void join(cudaStream_t stream, std::uint64_t& epoch) {
    const std::scoped_lock lock(mutex_);
    if (epoch == epoch_) return;
    zero_new();
    check(cudaEventRecord(event_, stream_), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream, event_, 0), "cudaStreamWaitEvent");
    epoch = epoch_;
  }
  std::uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }

  void add(Stream* owner, cudaStream_t stream) {
    const std::scoped_lock lock(mutex_);
    users_[owner] = {stream, 0};
  }
  void remove(Stream* owner) {
    const std::scoped_lock lock(mutex_);
    users_.erase(owner);
  }
  std::mutex& mutex() { return mutex_; }

 private:
  struct User {
    cudaStream_t stream;
    std::int64_t launches;  // that the memory's stream waits for already
  };

  Memory() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate");
  }
  void wait_for_users();
  void zero_new();

  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
  std::atomic<std::uint64_t> epoch_{1};
  std::map<Stream*, User> users_;
  std::unordered_map<std::size_t, std::vector<void*>> kept_;
  std::vector<MemoryBlock> new_;  // that are still to be zeroed
};

void Memory::wait_for_users() {
  for (auto& [owner, user] : users_) {
    // What is being captured does not run.
    if (owner->launches() == user.launches || owner->capturing()) continue;
    check(cudaEventRecord(event_, user.stream), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream_, event_, 0), "cudaStreamWaitEvent");
    user.launches = owner->launches();
  }
  epoch_.fetch_add(1, std::memory_order_release);
}

std::size_t rounded(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void* Memory::allocate(std::size_t bytes) {
  const std::scoped_lock lock(mutex_);
  const std::size_t size = rounded(bytes);
  void* memory = nullptr;
  std::vector<void*>& kept = kept_[size];
  if (!kept.empty()) {
    memory = kept.back();
    kept.pop_back();
  } else if (cudaMalloc(&memory, size) != cudaSuccess) {
    cudaGetLastError();
    for (auto& [block, blocks] : kept_) {
      for (void* old : blocks) cudaFree(old);
      blocks.clear();
    }
    const cudaError_t status = cudaMalloc(&memory, size);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      std::size_t free = 0;
      std::size_t total = 0;
      cudaMemGetInfo(&free, &total);
      fail("out of GPU memory: {} bytes are needed, {} of {} are free", size, free, total);
    }
    check(status, "cudaMalloc");
  }
  new_.push_back({memory, size});
  epoch_.fetch_add(1, std::memory_order_release);
  return memory;
}

void Memory::zero_new() {
  if (new_.empty()) return;
  wait_for_users();
  const auto large = std::partition(
      new_.begin(), new_.end(), [](const MemoryBlock& block) { return block.bytes <= kKeptBlock; });
  for (auto block = large; block != new_.end(); ++block) {
    check(cudaMemsetAsync(block->memory, 0, block->bytes, stream_), "cudaMemsetAsync");
  }
  new_.erase(large, new_.end());
  zero_blocks(new_, stream_);
  new_.clear();
}

void Memory::release(void* memory, std::size_t bytes) noexcept {
  const std::scoped_lock lock(mutex_);
  const std::size_t size = rounded(bytes);
  std::erase_if(new_, [&](const MemoryBlock& block) { return block.memory == memory; });
  if (size > kKeptBlock) {
    cudaFree(memory);  // waits for the device
    return;
  }
  try {
    kept_[size].push_back(memory);
  } catch (const std::bad_alloc&) {
    cudaFree(memory);
  }
}

void Memory::copy(void* to, const void* from, std::size_t bytes) {
  const std::scoped_lock lock(mutex_);
  zero_new();
  wait_for_users();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  const auto on_host = [](const void* pointer) {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, pointer), "cudaPointerGetAttributes");
    return attributes.type != cudaMemoryTypeDevice;
  };
  if (on_host(to) || on_host(from)) check(cudaStreamSynchronize(stream_), "cudaMemcpy");
}

}  // namespace

void require_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    fail("CUDA: no NVIDIA driver, or one too old for this build");
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    fail("CUDA: no GPU was found");
  }
  check(status, "cudaGetDeviceCount");
}

void fail_cuda(cudaError_t status, const char* what) {
  cudaGetLastError();  // one that can be recovered from is not reported twice
  fail("CUDA: {} failed: {}", what, cudaGetErrorString(status));
}

Stream::Stream() {
  require_device();
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  major_ = compute_major();
  if (major_ < 8) fail("CUDA: the GPU has compute capability {}, 8.0 is needed", major_);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaStreamCreateWithFlags(&uploads_stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  if (cublasLtCreate(&blas_) != CUBLAS_STATUS_SUCCESS) fail("CUDA: cuBLASLt cannot be initialised");
  Memory::instance().add(this, stream_);
}

Stream::~Stream() {
  Memory::instance().remove(this);
  cudaStreamSynchronize(stream_);
  if (uploads_device_ != nullptr) {
    cudaFree(uploads_device_);
    cudaFreeHost(uploads_host_);
  }
  cublasLtDestroy(blas_);
  cudaStreamDestroy(uploads_stream_);
  cudaStreamDestroy(stream_);
}

cudaStream_t Stream::handle() {
  if (!capturing_ && memory_epoch_ != Memory::instance().epoch()) {
    Memory::instance().join(stream_, memory_epoch_);
  }
  ++launches_;
  return stream_;
}

void Stream::synchronize() {
  check(cudaStreamSynchronize(stream_), "a kernel");
}

void Stream::begin_capture() {
  if (uploads_used_ > kUploadBytes / 2) {
    synchronize();
    forget_uploads();
  }
  handle();
  const std::scoped_lock lock(Memory::instance().mutex());
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  capturing_ = true;
}

cudaGraph_t Stream::end_capture() {
  const std::scoped_lock lock(Memory::instance().mutex());
  cudaGraph_t graph = nullptr;
  capturing_ = false;
  check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
  check(cudaStreamSynchronize(uploads_stream_), "cudaMemcpyAsync");
  return graph;
}

bool Stream::open_program() {
  if (program_open_ || major_ != 9) return false;
  if (program_ == nullptr) {
    program_ = std::make_shared<StepProgram>();
    program_->counters = Tensor(DType::kI32, {2}, Device::kCuda);
  }
  program_open_ = true;
  return true;
}

void Stream::close_program() {
  program_->clear();
  program_open_ = false;
}

const void* Stream::upload(std::span<const std::byte> bytes) {
  std::string key(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto found = uploads_.find(key);
  if (found != uploads_.end()) return found->second;
  const std::size_t size = rounded(std::max<std::size_t>(bytes.size(), 1));
  if (size > kUploadBytes) fail("CUDA: an upload of {} bytes exceeds {}", size, kUploadBytes);
  if (uploads_device_ == nullptr) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, kUploadBytes), "cudaMalloc");
    uploads_device_ = static_cast<std::byte*>(memory);
    check(cudaMallocHost(&memory, kUploadBytes), "cudaMallocHost");
    uploads_host_ = static_cast<std::byte*>(memory);
  }
  if (uploads_used_ + size > kUploadBytes) {
    if (capturing_) fail("CUDA: uploads of a recorded step exceed {} bytes", kUploadBytes / 2);
    synchronize();
    forget_uploads();
  }
  std::memcpy(uploads_host_ + uploads_used_, bytes.data(), bytes.size());
  std::byte* device = uploads_device_ + uploads_used_;
  check(cudaMemcpyAsync(device, uploads_host_ + uploads_used_, bytes.size(), cudaMemcpyHostToDevice,
                        capturing_ ? uploads_stream_ : handle()),
        "cudaMemcpyAsync");
  uploads_used_ += size;
  uploads_.emplace(std::move(key), device);
  return device;
}

std::int32_t* Stream::zeros(std::int64_t count) {
  if (zeros_.view().shape.size() < count || zeros_.bytes() == 0) {
    if (capturing_) fail("CUDA: {} counters are not there while a step is recorded", count);
    zeros_ = Tensor(DType::kI32, {count}, Device::kCuda);
  }
  return static_cast<std::int32_t*>(zeros_.view().data);
}

void Stream::forget_uploads() {
  uploads_.clear();
  uploads_used_ = 0;
  ++uploads_generation_;
}

void upload(ThreadPool& threads, std::span<const Piece> pieces) {
  constexpr std::size_t kStage = std::size_t{32} << 20;
  constexpr std::size_t kPart = std::size_t{1} << 20;
  Stream stream;
  std::array<std::shared_ptr<void>, 2> stages{allocate_shared(kStage), allocate_shared(kStage)};
  std::array<cudaEvent_t, 2> copied{};
  for (cudaEvent_t& event : copied) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  std::size_t turn = 0;
  for (const Piece& piece : pieces) {
    for (std::size_t done = 0; done < piece.bytes; done += kStage, ++turn) {
      const std::size_t bytes = std::min(kStage, piece.bytes - done);
      auto* stage = static_cast<std::byte*>(stages[turn % 2].get());
      const auto* from = static_cast<const std::byte*>(piece.from) + done;
      check(cudaEventSynchronize(copied[turn % 2]), "cudaMemcpyAsync");
      threads.parallel_for(
          static_cast<std::int64_t>((bytes + kPart - 1) / kPart), [&](std::int64_t task) {
            const std::size_t begin = static_cast<std::size_t>(task) * kPart;
            std::memcpy(stage + begin, from + begin, std::min(kPart, bytes - begin));
          });
      check(cudaMemcpyAsync(static_cast<std::byte*>(piece.to) + done, stage, bytes,
                            cudaMemcpyHostToDevice, stream.handle()),
            "cudaMemcpyAsync");
      check(cudaEventRecord(copied[turn % 2], stream.handle()), "cudaEventRecord");
    }
  }
  stream.synchronize();
  for (const cudaEvent_t event : copied) cudaEventDestroy(event);
}

class Graph {
 public:
  explicit Graph(cudaGraph_t graph) {
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  cudaGraphExec_t get() const { return exec_; }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

std::shared_ptr<Graph> record(Stream& stream, const std::function<void()>& work) {
  stream.synchronize();
  stream.begin_capture();
  try {
    work();
  } catch (...) {
    if (cudaGraph_t graph = stream.end_capture(); graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  return std::make_shared<Graph>(stream.end_capture());
}

void run(Stream& stream, Graph& graph) {
  check(cudaGraphLaunch(graph.get(), stream.handle()), "cudaGraphLaunch");
}

std::shared_ptr<void> allocate_shared(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
  std::memset(memory, 0, bytes);
  return {memory, [](void* pointer) { cudaFreeHost(pointer); }};
}

std::shared_ptr<Stream> make_stream() {
  return std::make_shared<Stream>();
}

void synchronize(Stream& stream) {
  stream.synchronize();
}

double seconds_of(Stream& stream, const std::function<void()>& work) {
  std::array<cudaEvent_t, 2> events{};
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  check(cudaEventRecord(events[0], stream.handle()), "cudaEventRecord");
  work();
  check(cudaEventRecord(events[1], stream.handle()), "cudaEventRecord");
  stream.synchronize();
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, events[0], events[1]), "cudaEventElapsedTime");
  for (const cudaEvent_t event : events) cudaEventDestroy(event);
  return milliseconds / 1e3;
}

void* allocate(std::size_t bytes) {
  static const bool found = (require_device(), true);
  (void)found;
  return Memory::instance().allocate(bytes);
}

void release(void* memory, std::size_t bytes) noexcept {
  Memory::instance().release(memory, bytes);
}

void copy(void* to, const void* from, std::size_t bytes) {
  Memory::instance().copy(to, from, bytes);
}

void copy(Stream& stream, void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream.handle()), "cudaMemcpyAsync");
}

void zero(Stream& stream, void* memory, std::size_t bytes) {
  check(cudaMemsetAsync(memory, 0, bytes, stream.handle()), "cudaMemsetAsync");
}

std::size_t memory_in_use() {
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return total - free;
}

}  // namespace deltafox::cuda
