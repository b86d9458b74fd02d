// Losses with gradients, and the training loop.
#include <atomic>
#include <exception>

#include "bindings.h"
#include "train/trainer.h"

namespace deltafox::python {
namespace {

// Fills `loss` and returns the gradients by name.
py::dict loss_and_gradients(const Model& model, const Array<std::int32_t>& ids,
                            const Array<std::int64_t>& cu, const Array<std::int32_t>& labels,
                            Array<float> loss, bool recompute) {
  const Batch batch{read(ids), read(cu)};
  const std::span<float> losses = write(loss);
  py::dict gradients;
  const GradientSink sink = [&](const std::string& name, std::span<const std::int64_t> shape,
                                std::span<const float> gradient) {
    const py::gil_scoped_acquire acquire;
    gradients[py::str(name)] =
        py::array_t<float>(std::vector<py::ssize_t>(shape.begin(), shape.end()), gradient.data());
  };
  {
    const py::gil_scoped_release release;
    model.loss_and_gradients(batch, read(labels), losses, sink, {.recompute = recompute});
  }
  return gradients;
}

// What Python hears of a training, and how it stops one: on_step(report) returning False, or a
// signal whose handler raises, let the step end and a checkpoint be written.
class Session {
 public:
  Session(const py::object& on_step, const py::object& on_note, const py::object& on_validation)
      : on_step_(on_step), on_note_(on_note), on_validation_(on_validation) {}

  train::Listener listener() {
    return {.on_step =
                [this](const train::StepReport& report) {
                  const py::gil_scoped_acquire acquire;
                  guarded([&] {
                    return py::bool_(false).is(on_step_(py::dict(
                        py::arg("tokens") = report.tokens,
                        py::arg("max_tokens") = report.max_tokens, py::arg("loss") = report.loss,
                        py::arg("lr") = report.lr, py::arg("grad_norm") = report.grad_norm,
                        py::arg("tokens_per_second") = report.tokens_per_second)));
                  });
                },
            .on_note =
                [this](const std::string& text) {
                  const py::gil_scoped_acquire acquire;
                  guarded([&] {
                    on_note_(text);
                    return false;
                  });
                },
            .on_validation =
                [this](std::int64_t done, std::int64_t total) {
                  const py::gil_scoped_acquire acquire;
                  guarded([&] {
                    on_validation_(done, total);
                    return false;
                  });
                }};
  }

  const std::atomic<bool>& stop() const { return stop_; }
  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // An exception must not tear the loop out of a step: it is kept until the loop has ended.
  template <typename Call>
  void guarded(Call&& call) {
    if (error_) return;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (call()) stop_ = true;
    } catch (...) {
      error_ = std::current_exception();
      stop_ = true;
    }
  }

  const py::object& on_step_;
  const py::object& on_note_;
  const py::object& on_validation_;
  std::atomic<bool> stop_ = false;
  std::exception_ptr error_;
};

// Returns (output directory, tokens, finished).
py::tuple run_training(const std::string& path, const std::vector<std::string>& overrides,
                       int threads, const std::string& device, const py::object& on_step,
                       const py::object& on_note, const py::object& on_validation) {
  const train::Config config = train::load_config(path, overrides);
  Session session(on_step, on_note, on_validation);
  std::int64_t tokens = 0;
  bool finished = false;
  {
    const py::gil_scoped_release release;
    train::Trainer trainer(config, threads, device_named(device), session.listener());
    finished = trainer.run(session.stop()) == train::Outcome::kFinished;
    tokens = trainer.tokens();
  }
  session.rethrow();
  return py::make_tuple(config.output_dir, tokens, finished);
}

}  // namespace

void bind_training(py::module_& module) {
  using py::arg;
  module.def("loss_and_gradients", &loss_and_gradients, arg("model"), arg("ids").noconvert(),
             arg("cu_seqlens").noconvert(), arg("labels").noconvert(), arg("loss").noconvert(),
             arg("recompute"));
  module.def("train", &run_training, arg("path"), arg("overrides"), arg("threads"), arg("device"),
             arg("on_step"), arg("on_note"), arg("on_validation"));
}

}  // namespace deltafox::python
