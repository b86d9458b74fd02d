// The module itself, its exception, and the hub.
#include "bindings.h"
#include "deltafox/error.h"
#include "deltafox/hub.h"

namespace deltafox::python {

void bind_hub(py::module_& module) {
  module.def(
      "resolve",
      [](const std::string& path_or_id, const std::string& revision) {
        const py::gil_scoped_release release;
        return hub::resolve(path_or_id, revision);
      },
      py::arg("path_or_id"), py::arg("revision"));
  module.def(
      "pull",
      [](const std::string& id, const std::string& revision, const py::object& on_progress) {
        hub::PullOptions options;
        options.revision = revision;
        // Called without one, too, so that an interrupt ends a download.
        options.on_progress = [&](const hub::Progress& progress) {
          const py::gil_scoped_acquire acquire;
          if (PyErr_CheckSignals() != 0) throw py::error_already_set();
          if (!on_progress.is_none()) {
            on_progress(progress.file, progress.done_bytes, progress.total_bytes);
          }
          return true;
        };
        const py::gil_scoped_release release;
        return hub::pull(id, options);
      },
      py::arg("id"), py::arg("revision"), py::arg("on_progress"));
}

// Older versions of pybind11 read NumPy 2's arrays wrongly, without noticing.
void check_numpy() {
  constexpr int kFirstForNumPy2 = 0x020C0000;
  const py::str version = py::module_::import("numpy").attr("__version__");
  if (PYBIND11_VERSION_HEX < kFirstForNumPy2 && std::stoi(version) >= 2) {
    throw py::import_error(
        "deltafox was built with a pybind11 that knows NumPy 1 only; build it with 2.12 or later");
  }
}

}  // namespace deltafox::python

PYBIND11_MODULE(_core, module) {
  using namespace deltafox::python;
  check_numpy();
  module.doc() = "The C++ library, with NumPy arrays. Use the package deltafox instead.";
  module.attr("__version__") = DELTAFOX_VERSION;
  py::register_exception<deltafox::Error>(module, "Error", PyExc_ValueError).doc() =
      "A bad file, option, shape or environment. The message is one line that names it.";
  bind_hub(module);
  bind_tokenizer(module);
  bind_model(module);
  bind_weights(module);
  bind_generation(module);
  bind_training(module);
}
