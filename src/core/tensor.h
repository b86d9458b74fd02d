// Views of contiguous row-major tensors, and an owning one.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "core/buffer.h"
#include "deltafox/dtype.h"

namespace deltafox {

// Up to four dimensions.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  Shape(std::initializer_list<std::int64_t> dims)
      : Shape(std::span<const std::int64_t>(dims.begin(), dims.size())) {}
  explicit Shape(std::span<const std::int64_t> dims) : rank_(static_cast<int>(dims.size())) {
    assert(dims.size() <= kMaxRank);
    std::copy(dims.begin(), dims.end(), dims_.begin());
  }

  int rank() const { return rank_; }
  std::int64_t operator[](int i) const {
    assert(i >= 0 && i < rank_);
    return dims_[static_cast<std::size_t>(i)];
  }
  std::int64_t size() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank_; ++i) product *= (*this)[i];
    return product;
  }
  bool operator==(const Shape&) const = default;

 private:
  std::array<std::int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// "[2, 64, 128]"
std::string to_string(const Shape& shape);

// Bytes of a tensor: elements one after the other, or a packed matrix [N, K].
std::size_t bytes_of(DType dtype, const Shape& shape);

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  float* f32() const {
    assert(dtype == DType::kF32);
    return static_cast<float*>(data);
  }
  TensorView reshaped(const Shape& to) const {
    assert(to.size() == shape.size());
    return {data, dtype, to};
  }
};

struct ConstTensorView {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  ConstTensorView() = default;
  ConstTensorView(const void* data_, DType dtype_, const Shape& shape_)
      : data(data_), dtype(dtype_), shape(shape_) {}
  // NOLINTNEXTLINE(google-explicit-constructor): a view to read is what a writable view also is.
  ConstTensorView(const TensorView& view) : data(view.data), dtype(view.dtype), shape(view.shape) {}

  const float* f32() const {
    assert(dtype == DType::kF32);
    return static_cast<const float*>(data);
  }
  ConstTensorView reshaped(const Shape& to) const {
    assert(to.size() == shape.size());
    return {data, dtype, to};
  }
};

// Owns memory of the host or a GPU, zeroed unless said otherwise; copying it copies the contents.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, const Shape& shape, Device device = Device::kCpu)
      : buffer_(bytes_of(dtype, shape), device), dtype_(dtype), shape_(shape) {}
  // Of the host, with anything in it.
  static Tensor uninitialised(DType dtype, const Shape& shape) {
    Tensor result;
    result.buffer_ = Buffer::uninitialised(bytes_of(dtype, shape));
    result.dtype_ = dtype;
    result.shape_ = shape;
    return result;
  }

  TensorView view() { return {buffer_.data(), dtype_, shape_}; }
  ConstTensorView view() const { return {buffer_.data(), dtype_, shape_}; }
  float* f32() { return view().f32(); }
  const float* f32() const { return view().f32(); }
  std::size_t bytes() const { return buffer_.size(); }
  Device device() const { return buffer_.device(); }

  // All of it, from and to the host's memory, wherever the tensor lies.
  void read_from(const void* host);
  void write_to(void* host) const;

 private:
  Buffer buffer_;
  DType dtype_ = DType::kF32;
  Shape shape_;
};

}  // namespace deltafox
