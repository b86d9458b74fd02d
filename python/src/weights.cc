// Weights as NumPy arrays and as DLPack tensors.
#include <array>
#include <memory>

#include "bindings.h"
#include "deltafox/error.h"

namespace deltafox::python {
namespace {

// The part of DLPack's ABI that the capsule "dltensor" needs (https://dmlc.github.io/dlpack).
struct DLDevice {
  std::int32_t device_type;  // 1: CPU
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;  // 2: IEEE float, 4: bfloat
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// A weight and a hold on the memory it lies in.
struct HeldWeight {
  Model model;
  Weight weight;

  // Throws Error for a packed one, which has no elements to look at.
  void check_plain() const {
    if (!is_packed(weight.dtype)) return;
    throw Error("parameter " + weight.name +
                ": is packed; load the model in another dtype to read it");
  }
};

// A read-only view, or a copy where the weight lies on a GPU or in tiles; bfloat16, which NumPy
// does not know, as its bits.
py::array view(const py::object& self) {
  const auto& held = self.cast<const HeldWeight&>();
  held.check_plain();
  const char* const format = held.weight.dtype == DType::kF32   ? "float32"
                             : held.weight.dtype == DType::kF16 ? "float16"
                                                                : "uint16";
  const bool copied = held.weight.device == Device::kCuda || held.weight.tiled;
  py::array array = copied
                        ? py::array(py::dtype(format), held.weight.shape)
                        : py::array(py::dtype(format), held.weight.shape, held.weight.data, self);
  if (copied) {
    const py::gil_scoped_release release;
    held.weight.copy_to(array.mutable_data());
  }
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

struct OwnedTensor {
  DLManagedTensor managed{};
  std::vector<std::int64_t> shape;
  std::unique_ptr<std::byte[]> data;  // NOLINT(modernize-avoid-c-arrays)
};

// Whoever takes the tensor renames the capsule and calls the deleter; if nobody does, we do.
void destroy_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

// A copy: the weights are immutable and lie in a read-only file mapping, and most who take DLPack
// tensors would write to them.
py::object dlpack(const HeldWeight& held) {
  held.check_plain();
  const std::size_t bytes = held.weight.bytes;
  auto owned = std::make_unique<OwnedTensor>();
  owned->shape = held.weight.shape;
  {
    const py::gil_scoped_release release;
    owned->data = std::make_unique_for_overwrite<std::byte[]>(bytes);  // NOLINT
    held.weight.copy_to(owned->data.get());
  }
  const auto bits = static_cast<std::uint8_t>(8 * size_of(held.weight.dtype));
  const std::uint8_t code = held.weight.dtype == DType::kBF16 ? 4 : 2;
  owned->managed = {.dl_tensor = {.data = owned->data.get(),
                                  .device = {.device_type = 1, .device_id = 0},
                                  .ndim = static_cast<std::int32_t>(owned->shape.size()),
                                  .dtype = {.code = code, .bits = bits, .lanes = 1},
                                  .shape = owned->shape.data(),
                                  .strides = nullptr,
                                  .byte_offset = 0},
                    .manager_ctx = owned.get(),
                    .deleter = [](DLManagedTensor* self) {
                      delete static_cast<OwnedTensor*>(self->manager_ctx);
                    }};
  PyObject* const capsule = PyCapsule_New(&owned->managed, "dltensor", &destroy_capsule);
  if (capsule == nullptr) throw py::error_already_set();
  owned.release();  // NOLINT(bugprone-unused-return-value): the capsule's
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_weights(py::module_& module) {
  py::class_<HeldWeight>(module, "Weight")
      .def_property_readonly("name", [](const HeldWeight& self) { return self.weight.name; })
      .def_property_readonly("dtype",
                             [](const HeldWeight& self) { return name_of(self.weight.dtype); })
      .def_property_readonly(
          "shape", [](const HeldWeight& self) { return py::tuple(py::cast(self.weight.shape)); })
      .def_property_readonly("nbytes", [](const HeldWeight& self) { return self.weight.bytes; })
      .def_property_readonly("trainable",
                             [](const HeldWeight& self) { return self.weight.trainable; })
      .def("view", &view)
      .def("dlpack", &dlpack);
  module.def("weights", [](const Model& model) {
    std::vector<HeldWeight> weights;
    for (Weight& weight : model.weights()) weights.push_back({model, std::move(weight)});
    return weights;
  });
}

}  // namespace deltafox::python
