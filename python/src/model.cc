// Model and State.
#include "deltafox/model.h"

#include <algorithm>
#include <array>
#include <memory>

#include "bindings.h"
#include "deltafox/error.h"

namespace deltafox::python {

StateLock::StateLock(const std::vector<SharedState*>& states) {
  for (SharedState* state : states) {
    if (state->busy.exchange(true)) {
      for (SharedState* held : states_) held->busy = false;
      throw Error("states: one is given twice, or in use by another thread; copy it first");
    }
    states_.push_back(state);
  }
}

StateLock::~StateLock() {
  for (SharedState* state : states_) state->busy = false;
}

std::vector<State*> StateLock::pointers() const {
  std::vector<State*> pointers;
  for (SharedState* state : states_) pointers.push_back(&state->state);
  return pointers;
}

Device device_named(const std::string& name) {
  for (const Device device : {Device::kCpu, Device::kCuda}) {
    if (name_of(device) == name) return device;
  }
  throw Error("device: must be cpu or cuda, got '" + name + "'");
}

namespace {

constexpr std::array kDTypes{DType::kF32, DType::kBF16, DType::kF16, DType::kQ8, DType::kQ4};

// "F32", "BF16", "F16", "Q8", "Q4".
DType dtype_named(const std::string& name) {
  const auto* const found = std::find_if(kDTypes.begin(), kDTypes.end(),
                                         [&](DType dtype) { return name_of(dtype) == name; });
  if (found == kDTypes.end()) throw Error("dtype: unknown '" + name + "'");
  return *found;
}

Model load(const std::string& path_or_id, const std::optional<std::string>& dtype,
           const std::string& device, int threads, const std::string& revision) {
  LoadOptions options{.threads = threads, .device = device_named(device), .revision = revision};
  if (dtype) options.dtype = dtype_named(*dtype);
  const py::gil_scoped_release release;
  return Model::load(path_or_id, options);
}

void forward(const Model& model, const Array<std::int32_t>& ids, const Array<std::int64_t>& cu,
             const std::vector<SharedState*>& states, std::optional<Array<float>> last_logits) {
  const Batch batch{read(ids), read(cu)};
  const std::span<float> out = last_logits ? write(*last_logits) : std::span<float>();
  const StateLock lock(states);
  const py::gil_scoped_release release;
  model.forward(batch, lock.pointers(), out);
}

// Copies the rows of a packed batch to their places in an array [places, width].
class Scatter {
 public:
  Scatter(Array<float>& out, std::int64_t width, std::span<const std::int64_t> places)
      : out_(write(out)), width_(width), places_(places) {
    const auto rows = static_cast<std::int64_t>(out_.size()) / width_;
    for (const std::int64_t place : places) {
      if (place >= rows) throw Error("places: one is beyond the array's rows");
    }
  }
  void operator()(std::int64_t first_row, std::int64_t rows, const float* data) const {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t place = places_[static_cast<std::size_t>(first_row + r)];
      if (place < 0) continue;
      std::copy_n(data + r * width_, width_, out_.data() + place * width_);
    }
  }

 private:
  std::span<float> out_;
  std::int64_t width_;
  std::span<const std::int64_t> places_;
};

// `places` [T]: the row of `out` [*, N] (and of the arrays in `hidden` [*, C]) that a token gets;
// -1: none. `hidden`: for layer 0, 1, ... an array or None.
void logits(const Model& model, const Array<std::int32_t>& ids, const Array<std::int64_t>& cu,
            const std::vector<SharedState*>& states, const Array<std::int64_t>& places,
            std::optional<Array<float>> out, std::vector<std::optional<Array<float>>> hidden) {
  const Batch batch{read(ids), read(cu)};
  if (places.size() != ids.size()) throw Error("places: one for each id is needed");
  std::optional<Scatter> scatter;
  if (out) scatter.emplace(*out, model.info().vocab_size, read(places));
  std::vector<std::optional<Scatter>> layers(hidden.size());
  for (std::size_t l = 0; l < hidden.size(); ++l) {
    if (hidden[l]) layers[l].emplace(*hidden[l], model.info().hidden_size, read(places));
  }
  LogitsSink sink;
  if (scatter) sink = *scatter;
  HiddenSink hidden_sink;
  if (!hidden.empty()) {
    hidden_sink = [&](std::int64_t layer, std::int64_t first_row, std::int64_t rows,
                      const float* data) {
      const auto l = static_cast<std::size_t>(layer);
      if (l < layers.size() && layers[l]) (*layers[l])(first_row, rows, data);
    };
  }
  const StateLock lock(states);
  const py::gil_scoped_release release;
  model.logits(batch, lock.pointers(), sink, hidden_sink);
}

void loss(const Model& model, const Array<std::int32_t>& ids, const Array<std::int64_t>& cu,
          const Array<std::int32_t>& labels, const std::vector<SharedState*>& states,
          Array<float> out) {
  const Batch batch{read(ids), read(cu)};
  const std::span<float> losses = write(out);
  const StateLock lock(states);
  const py::gil_scoped_release release;
  model.loss(batch, read(labels), lock.pointers(), losses);
}

void bind_state(py::module_& module) {
  py::class_<SharedState>(module, "State")
      .def_property_readonly("position",
                             [](SharedState& self) {
                               const StateLock lock({&self});
                               return self.state.position();
                             })
      .def_property_readonly("nbytes",
                             [](SharedState& self) {
                               const StateLock lock({&self});
                               return self.state.bytes();
                             })
      .def("copy", [](SharedState& self) {
        const StateLock lock({&self});
        const py::gil_scoped_release release;
        return std::make_unique<SharedState>(self.state);
      });
}

}  // namespace

void bind_model(py::module_& module) {
  bind_state(module);
  py::class_<ModelInfo>(module, "ModelInfo")
      .def_readonly("directory", &ModelInfo::directory)
      .def_readonly("model_type", &ModelInfo::model_type)
      .def_readonly("vocab_size", &ModelInfo::vocab_size)
      .def_readonly("hidden_size", &ModelInfo::hidden_size)
      .def_readonly("num_hidden_layers", &ModelInfo::num_hidden_layers)
      .def_readonly("num_parameters", &ModelInfo::num_parameters)
      .def_readonly("num_non_embedding_parameters", &ModelInfo::num_non_embedding_parameters)
      .def_readonly("weight_bytes", &ModelInfo::weight_bytes)
      .def_readonly("state_bytes", &ModelInfo::state_bytes)
      .def_readonly("bos_token_id", &ModelInfo::bos_token_id)
      .def_readonly("eos_token_ids", &ModelInfo::eos_token_ids)
      .def_readonly("pad_token_id", &ModelInfo::pad_token_id)
      .def_readonly("config_json", &ModelInfo::config_json)
      .def_readonly("random_weights", &ModelInfo::random_weights);

  using py::arg;
  py::class_<Model>(module, "Model")
      .def(py::init(&load), arg("path_or_id"), arg("dtype"), arg("device"), arg("threads"),
           arg("revision"))
      .def_property_readonly("info", &Model::info, py::return_value_policy::reference_internal)
      .def("new_state",
           [](const Model& self) { return std::make_unique<SharedState>(self.new_state()); })
      .def(
          "save_state",
          [](const Model& self, SharedState& state, const std::string& path) {
            const StateLock lock({&state});
            const py::gil_scoped_release release;
            self.save_state(state.state, path);
          },
          arg("state"), arg("path"))
      .def(
          "load_state",
          [](const Model& self, const std::string& path) {
            const py::gil_scoped_release release;
            return std::make_unique<SharedState>(self.load_state(path));
          },
          arg("path"))
      .def("forward", &forward, arg("ids").noconvert(), arg("cu_seqlens").noconvert(),
           arg("states"), arg("last_logits").noconvert())
      .def("logits", &logits, arg("ids").noconvert(), arg("cu_seqlens").noconvert(), arg("states"),
           arg("places").noconvert(), arg("out").noconvert(), arg("hidden").noconvert())
      .def("loss", &loss, arg("ids").noconvert(), arg("cu_seqlens").noconvert(),
           arg("labels").noconvert(), arg("states"), arg("out").noconvert());
}

}  // namespace deltafox::python
