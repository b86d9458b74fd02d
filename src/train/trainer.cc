#include "train/trainer.h"

#include <chrono>
#include <cmath>
#include <deque>
#include <filesystem>
#include <future>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "core/context.h"
#include "core/error.h"
#include "io/file.h"
#include "ops/adamw.h"
#include "ops/linear.h"
#include "ops/peak_rate.h"
#include "train/checkpoint.h"
#include "train/data.h"
#include "train/evaluate.h"
#include "train/metrics.h"
#include "train/parameters.h"

namespace deltafox::train {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Batch {
  std::vector<std::int32_t> input_ids, labels;  // [B, T]
};

// Reads the next batch while a step is under way.
class Prefetcher {
 public:
  Prefetcher(DataSet& data, std::int64_t next, std::int64_t end)
      : data_(data), next_(next), end_(end) {
    start();
  }

  Batch take() {
    Batch batch = future_.get();
    ++next_;
    start();
    return batch;
  }

 private:
  void start() {
    if (next_ >= end_) return;
    future_ = std::async(std::launch::async, [this, index = next_] {
      const auto size = static_cast<std::size_t>(data_.shape().tokens());
      Batch batch{std::vector<std::int32_t>(size), std::vector<std::int32_t>(size)};
      data_.read(index, thread_, batch.input_ids, batch.labels);
      return batch;
    });
  }

  DataSet& data_;
  ThreadPool thread_{1};
  std::int64_t next_, end_;
  std::future<Batch> future_;
};

// Tokens a second over the last steps.
class Throughput {
 public:
  void add(const Progress& progress) {
    constexpr std::size_t kSteps = 100;
    points_.emplace_back(progress.tokens, progress.seconds);
    if (points_.size() > kSteps) points_.pop_front();
  }
  double tokens_per_second() const {
    if (points_.size() < 2) return 0;
    const double seconds = points_.back().second - points_.front().second;
    return static_cast<double>(points_.back().first - points_.front().first) / seconds;
  }

 private:
  std::deque<std::pair<std::int64_t, double>> points_;
};

DataSet open_train(const Config& config) {
  const DataConfig& data = config.data;
  if (data.kind == DataConfig::Kind::kTokens) {
    return DataSet::tokens(data.train_path, data.train, config.seed);
  }
  DataSet set = DataSet::long_crawl(data.train_path, data.train);
  if (set.batches() < config.max_tokens / data.train.tokens()) {
    fail("{}: holds {} tokens in whole batches, less than train.max_tokens {}", data.train_path,
         set.batches() * data.train.tokens(), config.max_tokens);
  }
  return set;
}

DataSet open_eval(const DataConfig& data) {
  if (!std::filesystem::exists(data.eval_path)) {
    fail(
        "{}: is missing, and skip_eval is false: there are no held-out texts (`deltafox data "
        "--heldout SHARE` keeps some)",
        data.eval_path);
  }
  return data.kind == DataConfig::Kind::kTokens
             ? DataSet::tokens(data.eval_path, data.eval, std::nullopt, data.eval_tokens)
             : DataSet::long_crawl(data.eval_path, data.eval, data.eval_tokens);
}

void add_prefix_means(const LossByPosition& losses, const std::string& prefix,
                      std::int64_t min_length, nlohmann::ordered_json& values) {
  for (const auto& [length, loss] : losses.prefix_means(min_length)) {
    values[fmt::format("{}/loss_avg_len_{}", prefix, length)] = loss;
    values[fmt::format("{}/perplexity_len_{}", prefix, length)] = std::exp(loss);
  }
}

// FLOP/s of products on a GPU, of matrices large enough that nothing else matters.
double measure_products(Context& ctx) {
  constexpr std::int64_t kSize = 8192;
  constexpr int kRuns = 5;
  ScratchScope scratch(ctx);
  const TensorView x = scratch.activation({kSize, kSize});
  const TensorView w = scratch.activation({kSize, kSize});
  const TensorView y = scratch.activation({kSize, kSize});
  ctx.zero(x.data, bytes_of(x.dtype, x.shape));
  ctx.zero(w.data, bytes_of(w.dtype, w.shape));
  double best = std::numeric_limits<double>::infinity();
  for (int r = 0; r < kRuns; ++r) {
    ctx.synchronize();
    const Clock::time_point begin = Clock::now();
    ops::linear(ctx, {.x = x, .w = w, .y = y});
    ctx.synchronize();
    best = std::min(best, seconds_since(begin));
  }
  return 2.0 * kSize * kSize * kSize / best;
}

DType activation_dtype(const Config& config, Device device) {
  return device == Device::kCuda && config.precision == Precision::kBF16Mixed ? DType::kBF16
                                                                              : DType::kF32;
}

// What matrices the model computes with.
DType matrix_dtype(const Config& config, Device device) {
  if (config.precision != Precision::kBF16Mixed) return DType::kF32;
  const bool fast = device == Device::kCuda || cpu::has_fast_bf16_products();
  return fast ? DType::kBF16 : DType::kF32;
}

}  // namespace

struct Trainer::Impl {
  Impl(const Config& the_config, int threads_wanted, Device device, Listener the_listener);

  void start();
  void one_step(const Batch& batch);
  void accumulate_gradients(const Batch& batch);
  [[noreturn]] void refuse_to_go_on(const char* what, double value);
  void report(double mean, double lr, double norm);
  void log_step(const StepReport& report);
  void log_train_eval();
  void validate();
  void save() { checkpoints.save(progress, parameters, losses, threads); }
  void note(const std::string& text) const {
    if (listener.on_note) listener.on_note(text);
  }
  // Whether an interval ends where the run stands.
  bool at(std::int64_t interval) const { return progress.tokens % interval == 0; }
  bool finished() const { return progress.tokens >= config.max_tokens; }

  Config config;
  Listener listener;
  ThreadPool threads;
  Context ctx;
  DataSet data;
  std::optional<DataSet> eval;
  ModelDescription description;
  Parameters parameters;
  LossByPosition losses;  // since the last train_eval
  Progress progress;
  CheckpointWriter checkpoints;
  std::optional<Metrics> metrics;
  Throughput throughput;
  double peak_flops = 0;
  Tensor ids, labels, loss;        // [B·T], where ops read and write them
  std::vector<float> step_losses;  // [B·T], the same on the host
};

Trainer::Impl::Impl(const Config& the_config, int threads_wanted, Device device,
                    Listener the_listener)
    : config(the_config),
      listener(std::move(the_listener)),
      threads(threads_wanted),
      ctx(threads, device, activation_dtype(config, device)),
      data(open_train(config)),
      description{model_config(config, data.vocab_size(), data.bos()), config.data.tokenizer_path},
      parameters(ctx, description.config_json, config.decay, matrix_dtype(config, device)),
      losses(config.data.train.length),
      checkpoints(config.output_dir, config.checkpoint_keep_interval, description),
      ids(DType::kI32, {config.data.train.tokens()}, device),
      labels(DType::kI32, {config.data.train.tokens()}, device),
      loss(DType::kF32, {config.data.train.tokens()}, device),
      step_losses(static_cast<std::size_t>(config.data.train.tokens())) {
  if (!config.skip_eval) {
    eval.emplace(open_eval(config.data));
    if (eval->vocab_size() != data.vocab_size()) {
      fail("{}: has a vocabulary of {}, not {} as {}", config.data.eval_path, eval->vocab_size(),
           data.vocab_size(), config.data.train_path);
    }
  }
  start();
}

// From the newest checkpoint, or from the start that the configuration names.
void Trainer::Impl::start() {
  if (!config.resume) checkpoints.clear();
  std::optional<std::string> from = newest_checkpoint(config.output_dir);
  if (!from && !config.fork_dir.empty()) from = checkpoint_path(config.fork_dir, config.fork_step);
  if (from) {
    progress = load_checkpoint(*from, parameters, losses);
    if (progress.tokens != progress.steps * config.data.train.tokens()) {
      fail("{}: has made {} steps with {} tokens, which are not the steps of {} tokens here", *from,
           progress.steps, progress.tokens, config.data.train.tokens());
    }
    checkpoints.set_last(*from);
    note(fmt::format("going on from {}", *from));
  } else if (!config.pretrained.empty()) {
    parameters.load(config.pretrained);
  } else {
    parameters.initialise(config.seed);
  }
  const DType matrices = matrix_dtype(config, ctx.device());
  if (config.precision == Precision::kBF16Mixed && matrices == DType::kF32) {
    note("fabric.precision bf16-mixed: products are float32 on a CPU without AMX");
  }
  io::AtomicFile file(config.output_dir + "/config.yaml");
  file.append(std::as_bytes(std::span(config.text)));
  file.commit();
  metrics.emplace(config.output_dir, progress.tokens);
  metrics->log("model_info", progress.tokens,
               {{"model_info/total_params", parameters.size()},
                {"model_info/non_embedding_params", parameters.non_embedding_size()}});
  metrics->log("resume", progress.tokens, {{"resume/resume_step", progress.tokens}});
  peak_flops =
      ctx.device() == Device::kCuda ? measure_products(ctx) : cpu::measure_peak(threads, matrices);
  throughput.add(progress);
}

void Trainer::Impl::accumulate_gradients(const Batch& batch) {
  const std::int64_t length = config.data.train.length;
  const std::int64_t windows =
      std::min(config.data.train.size, std::max<std::int64_t>(1, config.grad_acc_tokens / length));
  std::vector<std::int64_t> cu_seqlens;
  for (std::int64_t b = 0; b <= windows; ++b) cu_seqlens.push_back(b * length);
  const auto part = static_cast<std::size_t>(windows * length);
  const auto scale = static_cast<float>(1.0 / static_cast<double>(config.data.train.tokens()));
  ctx.copy(ids.view().data, batch.input_ids.data(), ids.bytes());
  ctx.copy(labels.view().data, batch.labels.data(), labels.bytes());
  parameters.gradients().zero(ctx);
  const auto* const first_id = static_cast<const std::int32_t*>(ids.view().data);
  const auto* const first_label = static_cast<const std::int32_t*>(labels.view().data);
  for (std::size_t begin = 0; begin < step_losses.size(); begin += part) {
    parameters.model().forward_backward(ctx, {first_id + begin, part}, Sequences(cu_seqlens),
                                        {first_label + begin, part}, scale,
                                        {loss.f32() + begin, part}, parameters.gradients(),
                                        {.recompute = config.gradient_checkpointing});
  }
  ctx.copy(step_losses.data(), loss.f32(), loss.bytes());
}

void Trainer::Impl::refuse_to_go_on(const char* what, double value) {
  checkpoints.wait();
  fail("step {} (after {} tokens): the {} is {}; the last good checkpoint is {}",
       progress.steps + 1, progress.tokens, what, value,
       checkpoints.last().empty() ? "none" : checkpoints.last());
}

void Trainer::Impl::one_step(const Batch& batch) {
  const Clock::time_point begin = Clock::now();
  const double lr = config.schedule(progress.tokens);
  accumulate_gradients(batch);
  // Without a norm that is finite, it changes nothing; losses are there when it returns.
  const double norm =
      parameters.step(config.optimizer, lr, config.max_grad_norm, progress.steps + 1);
  const double mean = std::accumulate(step_losses.begin(), step_losses.end(), 0.0) /
                      static_cast<double>(step_losses.size());
  if (!std::isfinite(mean)) refuse_to_go_on("loss", mean);
  if (!std::isfinite(norm)) refuse_to_go_on("norm of the gradient", norm);
  losses.add(step_losses);
  progress.tokens += config.data.train.tokens();
  ++progress.steps;
  progress.seconds += seconds_since(begin);
  throughput.add(progress);
  report(mean, lr, norm);
}

void Trainer::Impl::report(double mean, double lr, double norm) {
  const double rate = throughput.tokens_per_second();
  const double flops = 6 * static_cast<double>(parameters.non_embedding_size()) * rate;
  const StepReport report{
      .tokens = progress.tokens,
      .max_tokens = config.max_tokens,
      .loss = mean,
      .lr = lr,
      .grad_norm = norm,
      .tokens_per_second = rate,
      .flops_utilization = peak_flops > 0 ? flops / peak_flops : 0,
      .seconds_left =
          rate > 0 ? static_cast<double>(config.max_tokens - progress.tokens) / rate : 0,
      .logged = at(config.log_interval) || finished(),
  };
  if (at(config.log_interval)) log_step(report);
  if (listener.on_step) listener.on_step(report);
}

void Trainer::Impl::log_step(const StepReport& report) {
  metrics->log("train", progress.tokens,
               {{"train/token_count", progress.tokens},
                {"train/batch_count", progress.steps},
                {"train/total_time", progress.seconds},
                {"train/lr", report.lr},
                {"train/loss", report.loss},
                {"train/global_grad_norm", report.grad_norm}});
  metrics->log("throughput", progress.tokens,
               {{"throughput/token_count_per_second_total_recent", report.tokens_per_second},
                {"throughput/mfu_total_recent", report.flops_utilization}});
  nlohmann::ordered_json norms;
  for (const Parameters::Entry& entry : parameters.entries()) {
    const auto norm = [&](const ConstTensorView& x) {
      return std::sqrt(ops::sum_of_squares(ctx, x));
    };
    norms["pnorm/" + entry.name] = norm(entry.weight.view());
    if (entry.trained) norms["gnorm/" + entry.name] = norm(entry.gradient);
  }
  metrics->log("norm", progress.tokens, norms);
}

void Trainer::Impl::log_train_eval() {
  nlohmann::ordered_json values{
      {"train_eval/window_seq_count", losses.windows()},
      {"train_eval/window_token_count", losses.windows() * config.data.train.length}};
  add_prefix_means(losses, "train_eval", config.min_val_length, values);
  metrics->log("train_eval", progress.tokens, values);
  metrics->log_losses("train_eval", progress.tokens, losses.mean());
  losses.clear();
}

void Trainer::Impl::validate() {
  const Clock::time_point begin = Clock::now();
  const BatchShape shape = eval->shape();
  LossByPosition heldout(shape.length);
  const auto size = static_cast<std::size_t>(shape.tokens());
  Batch batch{std::vector<std::int32_t>(size), std::vector<std::int32_t>(size)};
  std::vector<float> batch_losses(size);
  for (std::int64_t b = 0; b < eval->batches(); ++b) {
    eval->read(b, threads, batch.input_ids, batch.labels);
    window_losses(ctx, parameters.model(), shape.length, batch.input_ids, batch.labels,
                  batch_losses);
    heldout.add(batch_losses);
    if (listener.on_validation) {
      listener.on_validation((b + 1) * shape.tokens(), eval->batches() * shape.tokens());
    }
  }
  const std::int64_t tokens = eval->batches() * shape.tokens();
  const double seconds = seconds_since(begin);
  const double mean = heldout.prefix_means(shape.length).front().second;
  nlohmann::ordered_json values{
      {"val/loss", mean},
      {"val/val_token_count", tokens},
      {"val/val_seq_count", heldout.windows()},
      {"val/val_time", seconds},
      {"val/val_tokens_per_second", static_cast<double>(tokens) / seconds}};
  add_prefix_means(heldout, "val", config.min_val_length, values);
  metrics->log("val", progress.tokens, values);
  metrics->log_losses("val", progress.tokens, heldout.mean());
  note(fmt::format("validation after {} tokens: loss {:.4f}, perplexity {:.3f}", progress.tokens,
                   mean, std::exp(mean)));
}

Trainer::Trainer(const Config& config, int threads, Device device, Listener listener)
    : impl_(std::make_unique<Impl>(config, threads, device, std::move(listener))) {}
Trainer::~Trainer() = default;

std::int64_t Trainer::num_parameters() const {
  return impl_->parameters.size();
}
std::int64_t Trainer::tokens() const {
  return impl_->progress.tokens;
}

Outcome Trainer::run(const std::atomic<bool>& stop) {
  Impl& run = *impl_;
  const Config& config = run.config;
  Prefetcher batches(run.data, run.progress.steps, config.max_tokens / config.data.train.tokens());
  bool saved = false;
  while (!run.finished() && !stop) {
    run.one_step(batches.take());
    if (run.at(config.train_eval_interval)) run.log_train_eval();
    const bool at_the_end = run.finished() && config.final_eval;
    if (run.eval && (run.at(config.eval_interval) || at_the_end)) run.validate();
    // The last: it keeps what the others changed.
    saved = run.at(config.checkpoint_interval) || run.finished();
    if (saved) run.save();
  }
  if (!saved && !run.finished()) run.save();
  run.checkpoints.wait();
  if (!run.finished()) return Outcome::kStopped;
  export_checkpoint(run.checkpoints.last(), config.output_dir + "/model", DType::kF32, run.threads);
  return Outcome::kFinished;
}

}  // namespace deltafox::train
