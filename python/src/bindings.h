// What the binding files share. The module `deltafox._core` is the public C++ API with NumPy arrays
// for spans; the Python files on top of it give it Hugging Face's names and shapes.
//
// Arrays must be C-contiguous and of the very dtype (none is converted or copied); the Python side
// sees to that. The GIL is released wherever the library computes.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "deltafox/model.h"

namespace deltafox::python {

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> read(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// Throws ValueError for a read-only array.
template <typename T>
std::span<T> write(Array<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

// Throws Error unless it is "cpu" or "cuda".
Device device_named(const std::string& name);

// A State that Python holds, perhaps from several threads.
struct SharedState {
  explicit SharedState(State value) : state(std::move(value)) {}

  State state;
  std::atomic<bool> busy = false;
};

// The states of one call, which no other call may use meanwhile. Throws Error if one does.
class StateLock {
 public:
  explicit StateLock(const std::vector<SharedState*>& states);
  ~StateLock();
  StateLock(const StateLock&) = delete;
  StateLock& operator=(const StateLock&) = delete;

  std::vector<State*> pointers() const;

 private:
  std::vector<SharedState*> states_;
};

void bind_model(py::module_& module);
void bind_weights(py::module_& module);
void bind_tokenizer(py::module_& module);
void bind_generation(py::module_& module);
void bind_training(py::module_& module);
void bind_hub(py::module_& module);

}  // namespace deltafox::python
