// deltafox logits: the logits of every token, from a file into a file.
#include <fmt/format.h>

#include <memory>

#include "commands.h"
#include "common.h"
#include "io/safetensors.h"
#include "score_input.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct LogitsCommand {
  ModelOptions model_options;
  ScoreInputOptions input_options;
  std::string output;
  bool hidden_states = false;
  bool json = false;

  void run() const;
};

// Rows of `width` floats of tensor `name`, [..., B, T, width], at their padded places.
class PlacedRows {
 public:
  PlacedRows(io::SafetensorsWriter& writer, const char* name, std::int64_t width)
      : writer_(writer), name_(name), row_bytes_(static_cast<std::size_t>(width) * sizeof(float)) {}

  // Rows first, first + 1, ... of the packed batch. Place `offset` is the batch's first.
  void write(const infer::PaddedBatch& batch, std::int64_t offset, std::int64_t first,
             std::int64_t rows, const float* data) {
    const auto places =
        batch.places().subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows));
    // As few writes as there are runs of neighbours.
    for (std::size_t begin = 0; begin < places.size();) {
      std::size_t end = begin + 1;
      while (end < places.size() && places[end] == places[end - 1] + 1) ++end;
      write_at(offset + places[begin],
               {reinterpret_cast<const std::byte*>(data) + begin * row_bytes_,
                (end - begin) * row_bytes_});
      begin = end;
    }
  }

  // Zeros at the padding of `input`; `offset` as above.
  void write_padding(const ScoreInput& input, std::int64_t offset) {
    const std::vector<std::byte> zeros(row_bytes_);
    for (std::int64_t place = 0; place < input.rows * input.columns; ++place) {
      if (!input.is_token(place)) write_at(offset + place, zeros);
    }
  }

 private:
  void write_at(std::int64_t place, std::span<const std::byte> bytes) {
    writer_.write_at(name_, static_cast<std::uint64_t>(place) * row_bytes_, bytes);
  }

  io::SafetensorsWriter& writer_;
  const char* name_;
  std::size_t row_bytes_;
};

void LogitsCommand::run() const {
  const std::string directory = model_options.directory();
  const Model model = model_options.load(directory);
  const ScoreInput input = input_options.read(model, directory);
  const std::int64_t vocab = model.info().vocab_size;
  const std::int64_t width = model.info().hidden_size;
  const std::int64_t layers = model.info().num_hidden_layers + 2;
  const std::int64_t places = input.rows * input.columns;

  std::vector<io::TensorDeclaration> tensors{
      {"logits", DType::kF32, {input.rows, input.columns, vocab}}};
  if (hidden_states) {
    tensors.push_back({"hidden_states", DType::kF32, {layers, input.rows, input.columns, width}});
  }
  io::SafetensorsWriter writer(output, tensors);
  PlacedRows logits(writer, "logits", vocab);
  PlacedRows hidden(writer, "hidden_states", width);
  ProgressBar progress(ProgressBar::Unit::kTokens);
  std::int64_t tokens = 0;
  for_each_group(
      input, model,
      [&](std::int64_t first_row, const infer::PaddedBatch& batch, std::span<State* const> states) {
        const std::int64_t offset = first_row * input.columns;
        HiddenSink hidden_sink;
        if (hidden_states) {
          hidden_sink = [&](std::int64_t layer, std::int64_t row, std::int64_t rows,
                            const float* data) {
            hidden.write(batch, layer * places + offset, row, rows, data);
          };
        }
        model.logits(
            batch.batch(), states,
            [&](std::int64_t row, std::int64_t rows, const float* data) {
              logits.write(batch, offset, row, rows, data);
              tokens += rows;
              progress.update("logits", tokens, places);
            },
            hidden_sink);
      });
  logits.write_padding(input, 0);
  for (std::int64_t layer = 0; hidden_states && layer < layers; ++layer) {
    hidden.write_padding(input, layer * places);
  }
  writer.finish();
  progress.clear();

  nlohmann::ordered_json report{
      {"output", output}, {"tokens", tokens}, {"logits", {input.rows, input.columns, vocab}}};
  if (hidden_states) report["hidden_states"] = {layers, input.rows, input.columns, width};
  if (json) return print_json(report);
  for (const auto& tensor : tensors) {
    write_stdout(fmt::format("{}: {} {} F32\n", output, tensor.name, to_string(tensor.shape)));
  }
}

}  // namespace

void add_logits(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("logits", "Write the logits of every token to a safetensors file");
  const auto options = std::make_shared<LogitsCommand>();
  options->model_options.add(*command);
  options->input_options.add(*command, false);
  command
      ->add_option("-o,--output", options->output,
                   "safetensors file to write: logits [B, T, N] float32, zeros at padding")
      ->type_name("FILE")
      ->required();
  command->add_flag("--hidden-states", options->hidden_states,
                    "Also write hidden_states [layers + 2, B, T, C]: the embedding, each layer's "
                    "output, the final norm");
  command->add_flag("--json", options->json, "Print what was written as JSON");
  command->footer(
      "Examples:\n"
      "  deltafox logits --model DIR --input batch.safetensors --output logits.safetensors\n"
      "  deltafox logits --model DIR --text \"Hello\" --output logits.safetensors");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
