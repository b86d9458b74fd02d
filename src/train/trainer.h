// The training loop: one step after the other from where the run stands to its end.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "deltafox/device.h"
#include "train/config.h"

namespace deltafox::train {

struct StepReport {
  std::int64_t tokens = 0;  // trained on so far, and in all
  std::int64_t max_tokens = 0;
  double loss = 0;  // the mean of the step, in nats a token
  double lr = 0;
  double grad_norm = 0;          // before clipping
  double tokens_per_second = 0;  // of the last steps
  // 6 FLOPs a parameter and token, of the peak measured at the start: of a CPU's float32
  // arithmetic, of a GPU's products
  double flops_utilization = 0;
  double seconds_left = 0;
  bool logged = false;  // an interval of the log ends here
};

struct Listener {
  std::function<void(const StepReport&)> on_step;                            // any may be empty
  std::function<void(const std::string&)> on_note;                           // one line
  std::function<void(std::int64_t done, std::int64_t total)> on_validation;  // tokens
};

enum class Outcome : std::uint8_t { kFinished, kStopped };

class Trainer {
 public:
  // Opens the data and makes the model: from the newest checkpoint in output_dir, else from
  // fork_dir or `pretrained`, else at random. Throws Error if the configuration does not fit them.
  Trainer(const Config& config, int threads, Device device, Listener listener);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  // Trains until the end, or until `stop` becomes true: then the step under way is finished and a
  // checkpoint is written. At the end the model is exported to output_dir/model. Throws Error that
  // names the step and the last good checkpoint if the loss or the gradient is not finite.
  Outcome run(const std::atomic<bool>& stop);

  std::int64_t num_parameters() const;
  std::int64_t tokens() const;  // where the run stands

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltafox::train
