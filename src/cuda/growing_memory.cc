// Memory that grows in place (core/device.h): a range of addresses as large as the device, into
// which memory is mapped from its beginning on, in pieces. The functions are the driver's, asked
// for through the runtime: only the driver itself has them.
#include <cuda.h>

#include <vector>

#include "core/device.h"
#include "core/error.h"
#include "cuda/check.h"
#include "cuda/stream.h"

namespace deltafox::cuda {
namespace {

constexpr std::size_t kPiece = std::size_t{32} << 20;
constexpr unsigned kDriverVersion = 12000;

template <typename Function>
bool find(Function*& function, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, kDriverVersion, cudaEnableDefault, &result);
  function = reinterpret_cast<Function*>(found);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess;
}

struct Driver {
  decltype(cuMemAddressReserve)* reserve = nullptr;
  decltype(cuMemAddressFree)* free = nullptr;
  decltype(cuMemCreate)* create = nullptr;
  decltype(cuMemRelease)* release = nullptr;
  decltype(cuMemMap)* map = nullptr;
  decltype(cuMemUnmap)* unmap = nullptr;
  decltype(cuMemSetAccess)* set_access = nullptr;
  bool found = find(reserve, "cuMemAddressReserve") && find(free, "cuMemAddressFree") &&
               find(create, "cuMemCreate") && find(release, "cuMemRelease") &&
               find(map, "cuMemMap") && find(unmap, "cuMemUnmap") &&
               find(set_access, "cuMemSetAccess");

  static const Driver& instance() {
    static const Driver driver;
    return driver;
  }
};

std::size_t device_bytes() {
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return (total + kPiece - 1) / kPiece * kPiece;
}

}  // namespace

class GrowingMemory {
 public:
  // Check found() before anything else.
  GrowingMemory() {
    check(cudaGetDevice(&device_), "cudaGetDevice");
    capacity_ = device_bytes();
    if (!driver_.found || driver_.reserve(&begin_, capacity_, 0, 0, 0) != CUDA_SUCCESS) {
      begin_ = 0;
      capacity_ = 0;
    }
  }
  ~GrowingMemory() {
    if (begin_ == 0) return;
    cudaDeviceSynchronize();
    for (std::size_t i = 0; i < pieces_.size(); ++i) {
      driver_.unmap(begin_ + i * kPiece, kPiece);
      driver_.release(pieces_[i]);
    }
    driver_.free(begin_, capacity_);
  }
  GrowingMemory(const GrowingMemory&) = delete;
  GrowingMemory& operator=(const GrowingMemory&) = delete;

  bool found() const { return begin_ != 0; }
  // Whether there is room for one piece more.
  bool add_piece() {
    const std::size_t size = pieces_.size() * kPiece;
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device_};
    CUmemGenericAllocationHandle piece = 0;
    if (size == capacity_ || driver_.create(&piece, kPiece, &properties, 0) != CUDA_SUCCESS) {
      return false;
    }
    const CUmemAccessDesc access{.location = properties.location,
                                 .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    if (driver_.map(begin_ + size, kPiece, 0, piece, 0) != CUDA_SUCCESS) {
      driver_.release(piece);
      return false;
    }
    pieces_.push_back(piece);  // mapped: the destructor takes it back
    return driver_.set_access(begin_ + size, kPiece, &access, 1) == CUDA_SUCCESS;
  }
  std::byte* grow(std::size_t bytes) {
    while (pieces_.size() * kPiece < bytes) {
      if (add_piece()) continue;
      std::size_t free = 0;
      std::size_t total = 0;
      check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
      fail(
          "out of GPU memory: {} bytes of scratch memory are needed beside {} that are there, {} "
          "of {} are free",
          bytes - pieces_.size() * kPiece, pieces_.size() * kPiece, free, total);
    }
    return reinterpret_cast<std::byte*>(begin_);
  }

 private:
  const Driver& driver_ = Driver::instance();
  int device_ = 0;
  std::size_t capacity_ = 0;
  CUdeviceptr begin_ = 0;
  std::vector<CUmemGenericAllocationHandle> pieces_;
};

std::shared_ptr<GrowingMemory> make_growing_memory() {
  require_device();
  // A piece shows whether the driver really gives such memory.
  static const bool works = [] {
    GrowingMemory probe;
    return probe.found() && probe.add_piece();
  }();
  return works ? std::make_shared<GrowingMemory>() : nullptr;
}

std::byte* grow(GrowingMemory& memory, std::size_t bytes) {
  return memory.grow(bytes);
}

}  // namespace deltafox::cuda
