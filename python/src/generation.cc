// GenerationConfig and generate().
#include "deltafox/generate.h"

#include <chrono>
#include <memory>

#include "bindings.h"
#include "deltafox/error.h"

namespace deltafox::python {
namespace {

using Clock = std::chrono::steady_clock;

py::object early_stopping(const GenerationConfig& config) {
  if (config.early_stopping == EarlyStopping::kNever) return py::str("never");
  return py::bool_(config.early_stopping == EarlyStopping::kTrue);
}

void set_early_stopping(GenerationConfig& config, const py::object& value) {
  if (py::isinstance<py::bool_>(value)) {
    config.early_stopping = value.cast<bool>() ? EarlyStopping::kTrue : EarlyStopping::kFalse;
  } else if (py::isinstance<py::str>(value) && value.cast<std::string>() == "never") {
    config.early_stopping = EarlyStopping::kNever;
  } else {
    throw Error("early_stopping: must be True, False or \"never\"");
  }
}

// Options that are lists in C++ may be single values in Python.
template <typename T>
std::vector<T> as_list(const py::object& value) {
  if (py::isinstance<py::int_>(value) || py::isinstance<py::str>(value)) return {value.cast<T>()};
  return value.cast<std::vector<T>>();
}

void set_eos_token_id(GenerationConfig& config, const py::object& value) {
  config.eos_token_id.reset();
  if (!value.is_none()) config.eos_token_id = as_list<std::int32_t>(value);
}

void set_stop_strings(GenerationConfig& config, const py::object& value) {
  config.stop_strings.clear();
  if (!value.is_none()) config.stop_strings = as_list<std::string>(value);
}

// Lets Python run the handlers of signals now and then, so that Ctrl-C ends a generation: from the
// thread that generates, at most ten times a second, as taking the GIL may mean waiting for it.
class SignalCheck {
 public:
  // Throws what a handler raised.
  void operator()() {
    const Clock::time_point now = Clock::now();
    if (now < next_) return;
    next_ = now + std::chrono::milliseconds(100);
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  Clock::time_point next_ = Clock::now() + std::chrono::milliseconds(100);
};

// on_token(sequence, id, text, logprob, finish_reason); what it returns cancels the sequence if it
// is False.
std::function<bool(const TokenEvent&)> token_callback(const py::object& on_token) {
  if (on_token.is_none()) return {};
  return [&on_token](const TokenEvent& event) {
    const py::gil_scoped_acquire acquire;
    const py::object reason = event.finish_reason
                                  ? py::object(py::str(std::string(name_of(*event.finish_reason))))
                                  : py::none();
    const py::object more = on_token(event.sequence, event.id, event.text, event.logprob, reason);
    return !more.is(py::bool_(false));
  };
}

std::vector<GeneratedSequence> run_generate(const Model& model,
                                            const std::vector<Array<std::int32_t>>& prompt_arrays,
                                            const GenerationConfig& config,
                                            const Tokenizer* tokenizer, bool skip_special_tokens,
                                            bool keep_stop_string,
                                            const std::vector<SharedState*>& initial_states,
                                            bool return_states, const py::object& on_token) {
  std::vector<std::vector<std::int32_t>> prompts;
  for (const Array<std::int32_t>& prompt : prompt_arrays) {
    const std::span<const std::int32_t> ids = read(prompt);
    prompts.emplace_back(ids.begin(), ids.end());
  }
  GenerateOptions options;
  options.tokenizer = tokenizer;
  options.skip_special_tokens = skip_special_tokens;
  options.keep_stop_string = keep_stop_string;
  options.return_states = return_states;
  std::vector<State> states;
  {
    const StateLock lock(initial_states);
    for (const SharedState* state : initial_states) states.push_back(state->state);
  }
  options.initial_states = states;
  options.on_token = token_callback(on_token);
  SignalCheck check_signals;
  options.should_stop = [&check_signals] {
    check_signals();
    return false;
  };
  const py::gil_scoped_release release;
  return generate(model, prompts, config, options);
}

template <typename T>
Array<T> copied(std::span<const T> values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

void bind_config(py::module_& module) {
  using Config = GenerationConfig;
  using py::arg;
  py::class_<Config>(module, "GenerationConfig")
      .def(py::init())
      .def(py::init<const Config&>(), arg("other"))
      .def_static("load", &Config::load, arg("directory"))
      .def("validate", &Config::validate)
      .def_readwrite("max_new_tokens", &Config::max_new_tokens)
      .def_readwrite("max_length", &Config::max_length)
      .def_readwrite("min_new_tokens", &Config::min_new_tokens)
      .def_readwrite("min_length", &Config::min_length)
      .def_readwrite("do_sample", &Config::do_sample)
      .def_readwrite("temperature", &Config::temperature)
      .def_readwrite("top_k", &Config::top_k)
      .def_readwrite("top_p", &Config::top_p)
      .def_readwrite("min_p", &Config::min_p)
      .def_readwrite("typical_p", &Config::typical_p)
      .def_readwrite("epsilon_cutoff", &Config::epsilon_cutoff)
      .def_readwrite("eta_cutoff", &Config::eta_cutoff)
      .def_readwrite("renormalize_logits", &Config::renormalize_logits)
      .def_readwrite("repetition_penalty", &Config::repetition_penalty)
      .def_readwrite("no_repeat_ngram_size", &Config::no_repeat_ngram_size)
      .def_readwrite("num_beams", &Config::num_beams)
      .def_readwrite("length_penalty", &Config::length_penalty)
      .def_property("early_stopping", &early_stopping, &set_early_stopping)
      .def_readwrite("num_return_sequences", &Config::num_return_sequences)
      .def_property(
          "eos_token_id", [](const Config& self) { return self.eos_token_id; }, &set_eos_token_id)
      .def_readwrite("pad_token_id", &Config::pad_token_id)
      .def_property(
          "stop_strings", [](const Config& self) { return self.stop_strings; }, &set_stop_strings)
      .def_readwrite("seed", &Config::seed)
      .def_readwrite("output_logprobs", &Config::output_logprobs);
}

}  // namespace

void bind_generation(py::module_& module) {
  using py::arg;
  bind_config(module);
  py::class_<GeneratedSequence>(module, "GeneratedSequence")
      .def_readonly("prompt", &GeneratedSequence::prompt)
      .def_property_readonly("new_ids",
                             [](const GeneratedSequence& self) { return copied(self.new_ids()); })
      .def_property_readonly(
          "finish_reason",
          [](const GeneratedSequence& self) { return std::string(name_of(self.finish_reason)); })
      .def_readonly("text", &GeneratedSequence::text)
      .def_readonly("stop_string", &GeneratedSequence::stop_string)
      .def_property_readonly("logprobs",
                             [](const GeneratedSequence& self) {
                               return copied(std::span<const float>(self.logprobs));
                             })
      .def_property_readonly("model_logprobs",
                             [](const GeneratedSequence& self) {
                               return copied(std::span<const float>(self.model_logprobs));
                             })
      .def_readonly("score", &GeneratedSequence::score)
      .def_property_readonly("state", [](const GeneratedSequence& self) {
        return self.state ? std::make_unique<SharedState>(*self.state) : nullptr;
      });
  module.def("generate", &run_generate, arg("model"), arg("prompts"), arg("config"),
             arg("tokenizer"), arg("skip_special_tokens"), arg("keep_stop_string"),
             arg("initial_states"), arg("return_states"), arg("on_token"));
  module.def("pad_token_id", &pad_token_id, arg("model"), arg("config"));
}

}  // namespace deltafox::python
