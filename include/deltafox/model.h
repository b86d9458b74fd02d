// A loaded language model and the memory of the sequences it reads.
//
// Letters: B sequences, T tokens of all sequences together, N vocabulary. Sequences of a batch may
// have any lengths: they are packed one after the other, and what one gets does not depend on which
// others are in the batch, on how its tokens were split into calls, or on the number of threads
// (bitwise for batch and threads; to rounding for the split).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "deltafox/device.h"
#include "deltafox/dtype.h"

namespace deltafox {

class Decoder;        // model/decoder.h
struct TokenOptions;  // ops/choose_token.h

struct LoadOptions {
  // How the weight matrices are kept: as stored when empty; kF32 is the exact mode, kQ8 and kQ4 are
  // int8 and int4 (docs/quantization.md). Vectors (norms, convolutions, biases) are float32, and so
  // is all arithmetic but the products with matrices of fewer bits, and with them, on a CPU with
  // AMX, those within attention and the delta rule (docs/numerics.md).
  std::optional<DType> dtype = {};
  int threads = 0;  // 0: one for each core this process may use
  // On a CPU, weights that are kept as stored are read where their files are mapped: loading takes
  // no time, and processes share them. Copied, they lie on huge pages where the system has them,
  // and bfloat16 ones on a processor with AMX in the order of its tiles, which steps read faster:
  // worth it for more than some fifty tokens. The same bits either way.
  bool copy_weights = false;
  // On a GPU matrices and activations are bfloat16 where they are stored so or `dtype` says so,
  // else float32; with kQ8 and kQ4 activations are bfloat16. The residual stream, gates, states and
  // statistics are float32.
  Device device = Device::kCpu;
  std::string revision = "main";
};

struct ModelInfo {
  std::string directory;   // where it was loaded from
  std::string model_type;  // as in config.json
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_hidden_layers = 0;
  std::int64_t num_parameters = 0;                // all, tied embeddings counted once
  std::int64_t num_non_embedding_parameters = 0;  // all but the embedding, as the paper does
  std::int64_t weight_bytes = 0;                  // memory of the weights as kept
  std::int64_t step_weight_bytes = 0;             // of them, those that every step reads
  std::int64_t state_bytes = 0;                   // one sequence's state when new
  std::optional<std::int32_t> bos_token_id;
  std::vector<std::int32_t> eos_token_ids;  // generation_config.json first, else config.json
  std::optional<std::int32_t> pad_token_id;
  std::string config_json;      // the text of config.json
  bool random_weights = false;  // config.json says the weights were never trained
};

// What a model remembers of one sequence. A value: copying it forks the sequence.
class State {
 public:
  State();
  State(const State&);
  State(State&&) noexcept;
  State& operator=(const State&);
  State& operator=(State&&) noexcept;
  ~State();

  std::int64_t position() const;  // tokens read so far
  bool empty() const;             // made by no model
  // Memory held. It grows with the tokens where layers attend; pages that copies share count in
  // each.
  std::size_t bytes() const;

  struct Impl;
  explicit State(std::unique_ptr<Impl> impl);
  Impl& impl() { return *impl_; }
  const Impl& impl() const { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

// What attention did in a model's calls, in blocks of some queries of a head by some keys.
struct AttentionStats {
  std::int64_t blocks = 0;          // that causality and the window leave
  std::int64_t skipped_blocks = 0;  // of them, by adaptive computation pruning
};

// A weight as the model keeps it: row-major, or packed (is_packed(dtype), on a GPU in an order of
// its own), or else, where `tiled`, bfloat16 in an order of its own. The data live as long as a
// copy of the model does.
struct Weight {
  std::string name;  // as in the checkpoint
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  Device device = Device::kCpu;
  const void* data = nullptr;  // in the device's memory
  std::size_t bytes = 0;
  bool trainable = true;  // false for what the official code keeps as a buffer
  bool tiled = false;     // on a processor with AMX, where the matrix is not read from its file

  // Copies the data, from wherever they lie, to `bytes` of the host's memory; row-major if tiled.
  void copy_to(void* host) const;
};

// Token ids of B sequences, packed.
struct Batch {
  std::span<const std::int32_t> input_ids;   // [T]
  std::span<const std::int64_t> cu_seqlens;  // [B+1], from 0 to T; sequence b is [cu[b], cu[b+1])
};

// Receives `rows` rows of N logits, those of tokens first_row... of the packed batch, in order.
using LogitsSink =
    std::function<void(std::int64_t first_row, std::int64_t rows, const float* logits)>;

// Receives the hidden states [T', C] of a piece of the batch at a layer: 0 is the embedding, l the
// output of layer l, num_hidden_layers + 1 the final norm. (transformers' hidden_states omits the
// output of the last layer before the norm.)
using HiddenSink = std::function<void(std::int64_t layer, std::int64_t first_row, std::int64_t rows,
                                      const float* hidden)>;

// Receives the gradient of a parameter by the name it has in the checkpoint, its elements in order.
using GradientSink = std::function<void(
    const std::string& name, std::span<const std::int64_t> shape, std::span<const float> gradient)>;

struct GradientOptions {
  // Compute each layer once more on the way back rather than keep what backward needs of all: a
  // fraction of the memory for a third more work, and the same bits.
  bool recompute = false;
};

// Immutable once loaded; all members may be called from several threads at once, on different
// states. Every call checks its ids and sizes and throws Error before it changes a state.
class Model {
 public:
  // `path_or_id`: a checkpoint directory in the Hugging Face layout, or a hub id that the cache
  // holds.
  static Model load(const std::string& path_or_id, const LoadOptions& options = {});

  const ModelInfo& info() const;

  // All weights, in the model's order.
  std::vector<Weight> weights() const;

  // Of all calls since the model was loaded that have returned.
  AttentionStats attention_stats() const;

  State new_state() const;
  // A versioned safetensors file that names the model by a hash of its weights.
  void save_state(const State& state, const std::string& path) const;
  // Throws Error if the file is damaged, of another version, or of another model.
  State load_state(const std::string& path) const;

  // Reads the batch, continuing from `states` [B] and updating them. `last_logits` [B,N] receives
  // the logits of each sequence's last token; it may be empty if only the states are wanted.
  void forward(const Batch& batch, std::span<State* const> states,
               std::span<float> last_logits) const;

  // One token for each of B sequences: the same as forward with B sequences of length one.
  void step(std::span<const std::int32_t> input_ids, std::span<State* const> states,
            std::span<float> logits) const;

  // Receives the ids [B] that the sequences chose in step 0, 1, ...
  using IdsSink = std::function<void(std::int64_t step, std::span<const std::int32_t> ids)>;
  // `steps` times a step and the likeliest token (the first of equals) of each sequence, which the
  // next step reads. On a GPU the logits stay there, and nothing waits for the host.
  void greedy(std::span<const std::int32_t> input_ids, std::span<State* const> states,
              std::int64_t steps, const IdsSink& on_ids) const;

  // For generate(): what decodes and chooses tokens on a GPU; null on the CPU.
  std::unique_ptr<Decoder> decoder(const TokenOptions& options,
                                   std::span<const std::int32_t> eos_token_ids) const;

  // As forward, with the logits of every token handed to `sink` in pieces, so that no [T,N] buffer
  // is needed.
  void logits(const Batch& batch, std::span<State* const> states, const LogitsSink& sink,
              const HiddenSink& hidden_sink = {}) const;

  // As forward, with loss[t] = -log softmax(logits_t)[labels_t] for all T tokens. Labels are not
  // shifted; a negative label gives 0.
  void loss(const Batch& batch, std::span<const std::int32_t> labels,
            std::span<State* const> states, std::span<float> loss) const;

  // The loss of whole sequences, which begin from new states, and the gradient of its mean over the
  // labels that are not negative, for every trained parameter. On a CPU the weights must be kept as
  // float32 (LoadOptions::dtype), else it throws Error; on a GPU those of bfloat16 give gradients
  // as training with bf16-mixed has them.
  void loss_and_gradients(const Batch& batch, std::span<const std::int32_t> labels,
                          std::span<float> loss, const GradientSink& sink,
                          const GradientOptions& options = {}) const;

 private:
  struct Impl;
  void greedy_on_gpu(std::span<const std::int32_t> input_ids, std::span<State* const> states,
                     std::int64_t steps, const IdsSink& on_ids) const;
  explicit Model(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace deltafox
