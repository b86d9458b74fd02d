// Training checkpoints: all that a run needs to go on, to the bit.
//
// RUN/checkpoints/step-<tokens>.safetensors holds weights.<name>, m.<name> and v.<name> in float32,
// the sums of losses by position, and in its metadata the counters and the model's config.json. A
// file is there or it is not: it gets its name when it is complete. It is written beside the
// training from a copy in memory. The newest is kept, and those at multiples of an interval.
#pragma once

#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "train/evaluate.h"
#include "train/parameters.h"

namespace deltafox::train {

// Where a run stands.
struct Progress {
  std::int64_t tokens = 0;
  std::int64_t steps = 0;
  double seconds = 0;
};

// What the model of a checkpoint is.
struct ModelDescription {
  std::string config_json;
  std::string tokenizer_directory;  // may be empty
};

std::string checkpoint_path(const std::string& run_directory, std::int64_t tokens);
// The newest checkpoint of a run, if there is one.
std::optional<std::string> newest_checkpoint(const std::string& run_directory);

// Restores parameters, and the rest where it is wanted. Throws Error naming the file if it is
// damaged or of another model.
Progress load_checkpoint(const std::string& path, Parameters& parameters, LossByPosition& losses);

// Writes the weights of a checkpoint as a directory in the Hugging Face layout: config.json,
// model.safetensors and, where there is one, the tokenizer. Replaces what is there.
void export_checkpoint(const std::string& path, const std::string& directory, DType dtype,
                       ThreadPool& threads);

class CheckpointWriter {
 public:
  CheckpointWriter(std::string run_directory, std::int64_t keep_interval, ModelDescription model);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Takes a copy and returns; the writing goes on. Waits for the one before.
  void save(const Progress& progress, const Parameters& parameters, const LossByPosition& losses,
            ThreadPool& threads);
  // Throws Error if the file could not be written.
  void wait();
  // Of the last that is known to be whole; empty if there is none.
  const std::string& last() const { return last_; }
  void set_last(std::string path) { last_ = std::move(path); }
  // Removes all checkpoints of the run.
  void clear();

 private:
  struct Copied {
    std::string name;
    Tensor tensor;
  };

  void write(const std::string& path, const std::string& state) const;
  void remove_old(std::int64_t newest) const;

  std::string directory_;
  std::int64_t keep_interval_;
  ModelDescription model_;
  std::vector<Copied> copies_;
  std::future<void> writing_;
  std::string writing_path_;
  std::string last_;
};

}  // namespace deltafox::train
