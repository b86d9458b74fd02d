// deltafox loss: the negative log-likelihood of every label, and their mean.
#include <fmt/format.h>

#include <cmath>
#include <memory>

#include "commands.h"
#include "common.h"
#include "core/error.h"
#include "io/safetensors.h"
#include "score_input.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct LossCommand {
  ModelOptions model_options;
  ScoreInputOptions input_options;
  std::string output;
  std::string gradients;
  bool recompute = false;
  bool json = false;

  void run() const;
  std::vector<float> compute_gradients(const ScoreInput& input, const Model& model) const;
  void write_output(const ScoreInput& input, const std::vector<float>& losses) const;
};

// [B, T], zero at padding and where the label is negative.
std::vector<float> compute(const Model& model, const ScoreInput& input) {
  std::vector<float> losses(input.labels.size());
  ProgressBar progress(ProgressBar::Unit::kTokens);
  for_each_group(
      input, model,
      [&](std::int64_t first_row, const infer::PaddedBatch& batch, std::span<State* const> states) {
        const auto offset = static_cast<std::size_t>(first_row * input.columns);
        const std::vector<std::int32_t> labels =
            batch.pack(std::span(input.labels).subspan(offset));
        std::vector<float> packed(labels.size());
        model.loss(batch.batch(), labels, states, packed);
        for (std::size_t t = 0; t < packed.size(); ++t) {
          losses[offset + static_cast<std::size_t>(batch.places()[t])] = packed[t];
        }
        progress.update("loss", static_cast<std::int64_t>(offset) + batch.places().back(),
                        input.rows * input.columns);
      });
  return losses;
}

// The losses as `compute` gives them. All rows in one call: the gradient is that of their mean.
std::vector<float> LossCommand::compute_gradients(const ScoreInput& input,
                                                  const Model& model) const {
  const infer::PaddedBatch batch(input.input_ids, input.attention_mask, input.rows);
  const std::vector<std::int32_t> labels = batch.pack(std::span(input.labels));
  std::vector<float> packed(labels.size());
  std::vector<io::TensorDeclaration> tensors;
  std::vector<std::vector<float>> values;
  model.loss_and_gradients(batch.batch(), labels, packed,
                           [&](const std::string& name, std::span<const std::int64_t> shape,
                               std::span<const float> gradient) {
                             tensors.push_back({"grad." + name, DType::kF32, Shape(shape)});
                             values.emplace_back(gradient.begin(), gradient.end());
                           },
                           {.recompute = recompute});
  io::SafetensorsWriter writer(gradients, tensors);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    writer.write(tensors[i].name, std::as_bytes(std::span(values[i])));
  }
  writer.finish();
  std::vector<float> losses(input.labels.size());
  for (std::size_t t = 0; t < packed.size(); ++t) {
    losses[static_cast<std::size_t>(batch.places()[t])] = packed[t];
  }
  return losses;
}

void LossCommand::write_output(const ScoreInput& input, const std::vector<float>& losses) const {
  io::SafetensorsWriter writer(output, {{"loss", DType::kF32, {input.rows, input.columns}}});
  writer.write("loss", std::as_bytes(std::span(losses)));
  writer.finish();
}

void LossCommand::run() const {
  const std::string directory = model_options.directory();
  // Whatever the checkpoint's dtype, gradients are those of float32 weights unless a GPU is told
  // otherwise.
  const DType dtype = model_options.dtype().value_or(DType::kF32);
  if (!gradients.empty() && dtype != DType::kF32 && model_options.device() == Device::kCpu) {
    fail("--gradients: needs --dtype float32");
  }
  const Model model = gradients.empty()
                          ? model_options.load(directory)
                          : Model::load(directory, {.dtype = dtype,
                                                    .threads = model_options.threads(),
                                                    .device = model_options.device()});
  const ScoreInput input = input_options.read(model, directory);
  const std::vector<float> losses =
      gradients.empty() ? compute(model, input) : compute_gradients(input, model);

  double sum = 0;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    if (input.labels[i] < 0 || !input.is_token(static_cast<std::int64_t>(i))) continue;
    sum += static_cast<double>(losses[i]);
    ++tokens;
  }
  const double mean = tokens > 0 ? sum / static_cast<double>(tokens) : 0;
  if (!output.empty()) write_output(input, losses);
  if (!json) {
    return write_stdout(
        fmt::format("loss {:.6f}  perplexity {:.4f}  tokens {}\n", mean, std::exp(mean), tokens));
  }
  nlohmann::ordered_json report{{"loss", mean}, {"perplexity", std::exp(mean)}, {"tokens", tokens}};
  if (!output.empty()) report["output"] = output;
  if (!gradients.empty()) report["gradients"] = gradients;
  for (std::int64_t row = 0; row < input.rows; ++row) {
    nlohmann::ordered_json values = nlohmann::ordered_json::array();
    nlohmann::ordered_json labels = nlohmann::ordered_json::array();
    for (std::int64_t place = row * input.columns; place < (row + 1) * input.columns; ++place) {
      if (!input.is_token(place)) continue;
      values.push_back(losses[static_cast<std::size_t>(place)]);
      labels.push_back(input.labels[static_cast<std::size_t>(place)]);
    }
    report["sequences"].push_back({{"labels", labels}, {"losses", values}});
  }
  print_json(report, -1);
}

}  // namespace

void add_loss(CLI::App& app) {
  CLI::App* command = app.add_subcommand("loss", "Compute the loss and the perplexity of a text");
  const auto options = std::make_shared<LossCommand>();
  options->model_options.add(*command);
  options->input_options.add(*command, true);
  command
      ->add_option("-o,--output", options->output,
                   "safetensors file to write: loss [B, T] float32, zeros at padding and at "
                   "negative labels")
      ->type_name("FILE");
  CLI::Option* gradients =
      command
          ->add_option("--gradients", options->gradients,
                       "safetensors file to write: grad.<parameter>, the gradients of the mean "
                       "loss, with the weights as float32, or on a GPU as --dtype says")
          ->type_name("FILE");
  command
      ->add_flag("--recompute", options->recompute,
                 "Compute each layer once more for the gradients instead of keeping what they "
                 "need: less memory, the same results")
      ->needs(gradients);
  command->add_flag("--json", options->json, "Print JSON, with the loss of every token");
  command->footer(
      "Labels in a file are not shifted: the loss at t is that of labels[t] after the model read\n"
      "input_ids[0..t]. Of --text and --input-ids the ids are the labels, and the model reads "
      "them\n"
      "moved right by one, with the BOS token in front. The mean is over all labels that are not\n"
      "negative.\n\n"
      "Examples:\n"
      "  deltafox loss --model DIR --text \"The capital of France is Paris.\"\n"
      "  deltafox loss --model DIR --input batch.safetensors --output loss.safetensors\n"
      "  deltafox loss --model DIR --text \"Hello\" --gradients gradients.safetensors");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
