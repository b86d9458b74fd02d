// deltafox loss: the negative log-likelihood of every label, and their mean.
#include <fmt/format.h>

#include <cmath>
#include <memory>

#include "commands.h"
#include "common.h"
#include "io/safetensors.h"
#include "score_input.h"
#include "terminal.h"

namespace deltafox::app {
namespace {

struct LossCommand {
  ModelOptions model_options;
  ScoreInputOptions input_options;
  std::string output;
  bool json = false;

  void run() const;
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

void LossCommand::write_output(const ScoreInput& input, const std::vector<float>& losses) const {
  io::SafetensorsWriter writer(output, {{"loss", DType::kF32, {input.rows, input.columns}}});
  writer.write("loss", std::as_bytes(std::span(losses)));
  writer.finish();
}

void LossCommand::run() const {
  const std::string directory = model_options.directory();
  const Model model = model_options.load(directory);
  const ScoreInput input = input_options.read(model, directory);
  const std::vector<float> losses = compute(model, input);

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
  command->add_flag("--json", options->json, "Print JSON, with the loss of every token");
  command->footer(
      "Labels in a file are not shifted: the loss at t is that of labels[t] after the model read\n"
      "input_ids[0..t]. Of --text and --input-ids the ids are the labels, and the model reads "
      "them\n"
      "moved right by one, with the BOS token in front. The mean is over all labels that are not\n"
      "negative.\n\n"
      "Examples:\n"
      "  deltafox loss --model DIR --text \"The capital of France is Paris.\"\n"
      "  deltafox loss --model DIR --input batch.safetensors --output loss.safetensors");
  command->callback([options] { options->run(); });
}

}  // namespace deltafox::app
