// Tokenizer.
#include "deltafox/tokenizer.h"

#include "bindings.h"

namespace deltafox::python {

void bind_tokenizer(py::module_& module) {
  using py::arg;
  py::class_<Tokenizer>(module, "Tokenizer")
      .def(py::init([](const std::string& directory) {
             const py::gil_scoped_release release;
             return Tokenizer::load(directory);
           }),
           arg("directory"))
      .def(
          "encode",
          [](const Tokenizer& self, std::string_view text, bool add_special_tokens) {
            std::vector<std::int32_t> ids;
            {
              const py::gil_scoped_release release;
              ids = self.encode(text, add_special_tokens);
            }
            return ids;
          },
          arg("text"), arg("add_special_tokens"))
      .def(
          "decode",
          [](const Tokenizer& self, const std::vector<std::int32_t>& ids,
             bool skip_special_tokens) { return self.decode(ids, skip_special_tokens); },
          arg("ids"), arg("skip_special_tokens"), py::call_guard<py::gil_scoped_release>())
      .def_property("add_bos_token", &Tokenizer::add_bos_token, &Tokenizer::set_add_bos_token)
      .def_property_readonly("escapes_json", &Tokenizer::escapes_json)
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("bos_token_id", &Tokenizer::bos_token_id)
      .def_property_readonly("eos_token_id", &Tokenizer::eos_token_id)
      .def("is_special", &Tokenizer::is_special, arg("id"));
}

}  // namespace deltafox::python
