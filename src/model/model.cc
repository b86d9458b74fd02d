// The public Model: checks, splitting of long batches into pieces, one Context for each caller.
#include "deltafox/model.h"

#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <numeric>
#include <set>

#include "core/context.h"
#include "core/error.h"
#include "deltafox/hub.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/blocks/projection.h"
#include "model/decoder.h"
#include "model/gradients.h"
#include "model/loader.h"
#include "model/quantize.h"
#include "model/registry.h"
#include "model/state_file.h"
#include "ops/cross_entropy.h"
#include "ops/delta_rule.h"
#include "ops/gla.h"
#include "ops/ssd.h"
#include "ops/tile_order.h"

namespace deltafox {
namespace {

// A batch is read in pieces of about this many tokens, so memory is bounded at any length. Within a
// sequence pieces end at multiples of kPieceAlign tokens (the longest chunk of any mixer), so that
// where they end changes nothing.
constexpr std::int64_t kPieceTokens = 1024;
constexpr std::int64_t kGpuPieceTokens = 16384;
constexpr std::int64_t kPieceAlign = 64;
static_assert(kPieceAlign % kDeltaRuleChunk == 0 && kPieceAlign % kGlaChunk == 0 &&
              kPieceAlign % kSsdChunk == 0);
// Rows of logits in memory at a time.
constexpr std::int64_t kLogitRows = 128;

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;

// The elements of an F32 tensor, copied to `host` if they lie on a GPU.
const float* on_host(Context& ctx, const ConstTensorView& tensor, std::vector<float>& host) {
  if (ctx.device() == Device::kCpu) return tensor.f32();
  host.resize(static_cast<std::size_t>(tensor.shape.size()));
  ctx.copy(host.data(), tensor.data, host.size() * sizeof(float));
  ctx.synchronize();
  return host.data();
}

// The ids where ops read them.
std::span<const std::int32_t> on_device(Context& ctx, ScratchScope& scratch,
                                        std::span<const std::int32_t> ids) {
  if (ctx.device() == Device::kCpu) return ids;
  const TensorView copy = scratch.tensor({static_cast<std::int64_t>(ids.size())}, DType::kI32);
  ctx.copy(copy.data, ids.data(), ids.size_bytes());
  return {static_cast<const std::int32_t*>(copy.data), ids.size()};
}

std::uint64_t next_model_id() {
  static std::atomic<std::uint64_t> next{1};
  return next.fetch_add(1);
}

}  // namespace

struct State::Impl {
  SequenceState sequence;
};

State::State() = default;
State::State(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
State::State(const State& other)
    : impl_(other.impl_ ? std::make_unique<Impl>(*other.impl_) : nullptr) {}
State::State(State&&) noexcept = default;
State& State::operator=(const State& other) {
  if (this != &other) impl_ = other.impl_ ? std::make_unique<Impl>(*other.impl_) : nullptr;
  return *this;
}
State& State::operator=(State&&) noexcept = default;
State::~State() = default;

std::int64_t State::position() const {
  return impl_ ? impl_->sequence.position : 0;
}

bool State::empty() const {
  return impl_ == nullptr;
}

std::size_t State::bytes() const {
  std::size_t total = 0;
  if (!impl_) return total;
  // visit() hands out writable tensors; nothing is written here.
  auto& layers = const_cast<std::vector<MixerState>&>(impl_->sequence.layers);
  for (MixerState& layer : layers) {
    std::visit(
        [&](auto& state) {
          state.visit([&](const char*, const StateTensor& tensor) { total += tensor.bytes(); });
        },
        layer);
  }
  return total;
}

struct Model::Impl {
  Impl(const std::string& directory, const LoadOptions& options);

  // A Context for the duration of one call.
  class Lease {
   public:
    explicit Lease(Impl& model) : model_(model) {
      std::call_once(model_.populated_, [&] { model_.populate(); });
      const std::scoped_lock lock(model_.contexts_mutex_);
      if (model_.contexts_.empty()) {
        context_ =
            std::make_unique<Context>(model_.threads_, model_.device_, model_.activation_dtype_);
      } else {
        context_ = std::move(model_.contexts_.back());
        model_.contexts_.pop_back();
      }
    }
    ~Lease() {
      const std::scoped_lock lock(model_.contexts_mutex_);
      Statistics& statistics = context_->statistics();
      model_.attention_stats_.blocks += statistics.attention_blocks;
      model_.attention_stats_.skipped_blocks += statistics.attention_blocks_skipped;
      statistics = {};
      model_.contexts_.push_back(std::move(context_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Context& operator*() { return *context_; }

   private:
    Impl& model_;
    std::unique_ptr<Context> context_;
  };

  void check(const Batch& batch) const;
  std::vector<SequenceState*> check(const Batch& batch, std::span<State* const> states) const;
  void check_labels(const Batch& batch, std::span<const std::int32_t> labels,
                    std::span<const float> loss) const;

  // on_piece(first_row, hidden [n, C]) for successive pieces of the packed batch, hidden before the
  // final norm.
  template <typename OnPiece>
  void run(Context& ctx, const Batch& batch, std::span<SequenceState* const> states,
           OnPiece&& on_piece, const HiddenSink& hidden_sink = {}) const;

  // on_rows(first_row, logits [n, N]) for successive rows of a piece.
  template <typename OnRows>
  void each_logits(Context& ctx, std::int64_t first_row, const TensorView& hidden, OnRows&& on_rows,
                   const HiddenSink& hidden_sink = {}) const;

  const std::string& hash();

  std::uint64_t id_ = next_model_id();
  ThreadPool threads_;
  io::Checkpoint checkpoint_;
  std::string config_text_;
  io::JsonObject config_;
  CausalLM lm_;
  std::vector<Tensor> buffers_;
  ModelInfo info_;
  Device device_;
  DType activation_dtype_ = DType::kF32;

  std::mutex contexts_mutex_;
  std::vector<std::unique_ptr<Context>> contexts_;
  AttentionStats attention_stats_;  // under contexts_mutex_
  std::once_flag populated_;
  std::once_flag hashed_;
  std::string hash_;

 private:
  static io::JsonObject read_config(const std::string& directory, const std::string& text);
  DType gpu_dtype(const LoadOptions& options) const;
  void fill_info(const std::string& directory);
  void populate();
  void copy_weights();
  void arrange_in_tiles();
  bool is_looked_up(const std::string& name) const;
};

Model::Impl::Impl(const std::string& directory, const LoadOptions& options)
    : threads_(options.threads),
      checkpoint_(io::Checkpoint::open(directory)),
      config_text_(io::read_text_file(directory + "/config.json", kMaxConfigBytes)),
      config_(read_config(directory, config_text_)),
      lm_(build_model(config_)),
      device_(options.device) {
  std::optional<DType> dtype = options.dtype;
  if (device_ == Device::kCuda) {
    dtype = gpu_dtype(options);
    activation_dtype_ = *dtype == DType::kF32 ? DType::kF32 : DType::kBF16;
  }
  buffers_ = bind_params(lm_, checkpoint_, dtype, threads_);
  if (device_ == Device::kCuda) {
    buffers_ = place_on_gpu(lm_, threads_);
  } else {
    if (options.copy_weights) copy_weights();
    arrange_in_tiles();
  }
  fill_info(directory);
}

DType Model::Impl::gpu_dtype(const LoadOptions& options) const {
  if (options.dtype == DType::kF16) {
    fail("dtype: on a GPU weights are kept as float32, bfloat16, int8 or int4");
  }
  if (options.dtype) return *options.dtype;
  if (const auto packed = quantization_of(config_)) return *packed;
  const std::string& name = lm_.config().names.embeddings;
  const bool stored_bf16 =
      checkpoint_.contains(name) && checkpoint_.view(name).dtype == DType::kBF16;
  return stored_bf16 ? DType::kBF16 : DType::kF32;
}

// Before the model is built: a scheme that is not known explains tensors that are missing.
io::JsonObject Model::Impl::read_config(const std::string& directory, const std::string& text) {
  io::JsonObject config = io::JsonObject::parse(text, directory + "/config.json");
  quantization_of(config);
  return config;
}

void Model::Impl::fill_info(const std::string& directory) {
  info_.directory = directory;
  info_.model_type = config_.string("model_type", "");
  info_.vocab_size = lm_.config().vocab_size;
  info_.hidden_size = lm_.config().hidden_size;
  info_.num_hidden_layers = lm_.num_layers();
  lm_.visit_params([&](const std::string& name, Param& param) {
    const std::int64_t size = param.shape.size();
    const auto bytes = static_cast<std::int64_t>(bytes_of(param.value.dtype, param.shape));
    info_.weight_bytes += bytes;
    if (!is_looked_up(name)) info_.step_weight_bytes += bytes;
    if (!param.trainable) return;
    info_.num_parameters += size;
    if (name != lm_.config().names.embeddings) info_.num_non_embedding_parameters += size;
  });
  State state(std::make_unique<State::Impl>(State::Impl{lm_.new_state()}));
  info_.state_bytes = static_cast<std::int64_t>(state.bytes());
  info_.config_json = config_text_;
  info_.random_weights = config_.boolean("deltafox_random_weights", false);

  const auto token = [&](const char* key) {
    // -1 is a common way to say "none".
    const auto id = config_.optional_integer(key, std::nullopt, -1, info_.vocab_size - 1);
    return id && *id >= 0 ? std::optional(static_cast<std::int32_t>(*id)) : std::nullopt;
  };
  info_.bos_token_id = token("bos_token_id");
  info_.pad_token_id = token("pad_token_id");
  const std::string generation_path = directory + "/generation_config.json";
  const io::JsonObject generation =
      std::filesystem::exists(generation_path)
          ? io::JsonObject::parse(io::read_text_file(generation_path, kMaxConfigBytes),
                                  generation_path)
          : config_;
  const io::JsonObject& eos_source = generation.contains("eos_token_id") ? generation : config_;
  for (const std::int64_t id : eos_source.integers("eos_token_id", 0, info_.vocab_size - 1)) {
    info_.eos_token_ids.push_back(static_cast<std::int32_t>(id));
  }
}

// Whether a step reads a few rows of a matrix: the embedding, unless it is the head as well.
bool Model::Impl::is_looked_up(const std::string& name) const {
  return name == lm_.config().names.embeddings && !lm_.config().tie_word_embeddings;
}

// Weights are worked through in pieces, so that threads share the work.
constexpr std::size_t kPiece = std::size_t{8} << 20;

// The weights that a step reads, from the checkpoint's files into one piece of memory, in the order
// that they are read in.
void Model::Impl::copy_weights() {
  constexpr std::size_t kAlignment = 256;
  std::set<const void*> converted;
  for (const Tensor& buffer : buffers_) converted.insert(buffer.view().data);
  std::vector<Param*> params;
  std::vector<std::size_t> offsets{0};
  lm_.visit_params([&](const std::string& name, Param& param) {
    if (is_looked_up(name) || converted.contains(param.value.data)) return;
    params.push_back(&param);
    const std::size_t bytes = bytes_of(param.value.dtype, param.shape);
    offsets.push_back(offsets.back() + (bytes + kAlignment - 1) / kAlignment * kAlignment);
  });
  Tensor& copy =
      buffers_.emplace_back(DType::kU8, Shape{static_cast<std::int64_t>(offsets.back())});
  auto* const to = static_cast<std::byte*>(copy.view().data);
  struct Piece {
    std::byte* to;
    std::span<const std::byte> from;
  };
  std::vector<Piece> pieces;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const ConstTensorView& value = params[i]->value;
    const std::span from(static_cast<const std::byte*>(value.data),
                         bytes_of(value.dtype, params[i]->shape));
    for (std::size_t at = 0; at < from.size(); at += kPiece) {
      pieces.push_back(
          {to + offsets[i] + at, from.subspan(at, std::min(kPiece, from.size() - at))});
    }
    params[i]->value.data = to + offsets[i];
  }
  threads_.parallel_for(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i) {
    const Piece& piece = pieces[static_cast<std::size_t>(i)];
    std::memcpy(piece.to, piece.from.data(), piece.from.size());
  });
}

// Matrices in memory of our own, where the processor reads them faster by tiles.
void Model::Impl::arrange_in_tiles() {
  const auto is_ours = [&](const void* data) {
    return std::any_of(buffers_.begin(), buffers_.end(), [&](const Tensor& buffer) {
      const auto* const begin = static_cast<const std::byte*>(buffer.view().data);
      return data >= begin && data < begin + buffer.bytes();
    });
  };
  Context ctx(threads_);
  lm_.visit_params([&](const std::string& name, Param& param) {
    ConstTensorView& w = param.value;
    if (!param.is_matrix || !param.packable || w.dtype != DType::kBF16 ||
        name == lm_.config().names.embeddings || !ops::prefers_tiles(ctx, w.shape) ||
        !is_ours(w.data)) {
      return;
    }
    ops::arrange_in_tiles(ctx, {const_cast<void*>(w.data), w.dtype, w.shape});
    w.dtype = DType::kBF16Tiles;
  });
}

// Maps, before the first call, the weights that it will read: fetching ahead does nothing for pages
// that are not there.
void Model::Impl::populate() {
  if (device_ != Device::kCpu) return;  // they are not in the host's memory
  std::vector<std::span<const std::byte>> pieces;
  lm_.visit_params([&](const std::string& name, Param& param) {
    if (is_looked_up(name)) return;
    std::span left(static_cast<const std::byte*>(param.value.data),
                   bytes_of(param.value.dtype, param.shape));
    while (!left.empty()) {
      pieces.push_back(left.first(std::min(kPiece, left.size())));
      left = left.subspan(pieces.back().size());
    }
  });
  threads_.parallel_for(static_cast<std::int64_t>(pieces.size()),
                        [&](std::int64_t i) { io::populate(pieces[static_cast<std::size_t>(i)]); });
}

void Model::Impl::check(const Batch& batch) const {
  const auto tokens = static_cast<std::int64_t>(batch.input_ids.size());
  const std::span<const std::int64_t> cu = batch.cu_seqlens;
  if (cu.size() < 2 || cu.front() != 0 || cu.back() != tokens) {
    fail("batch: cu_seqlens must run from 0 to the number of ids, {}", tokens);
  }
  for (std::size_t b = 0; b + 1 < cu.size(); ++b) {
    if (cu[b + 1] <= cu[b]) fail("batch: sequence {} is empty", b);
  }
  for (std::size_t t = 0; t < batch.input_ids.size(); ++t) {
    const std::int32_t id = batch.input_ids[t];
    if (id < 0 || id >= info_.vocab_size) {
      fail("input_ids: id {} at position {} is out of range, the vocabulary has {} entries", id, t,
           info_.vocab_size);
    }
  }
}

std::vector<SequenceState*> Model::Impl::check(const Batch& batch,
                                               std::span<State* const> states) const {
  check(batch);
  if (states.size() + 1 != batch.cu_seqlens.size()) {
    fail("batch: {} states for {} sequences", states.size(), batch.cu_seqlens.size() - 1);
  }
  std::vector<SequenceState*> sequences;
  sequences.reserve(states.size());
  for (State* state : states) {
    if (state == nullptr || state->empty() || state->impl().sequence.model_id != id_) {
      fail("batch: state {} was not made by this model", sequences.size());
    }
    SequenceState& sequence = state->impl().sequence;
    sequences.push_back(&sequence);
  }
  std::vector<SequenceState*> sorted = sequences;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    fail("batch: two sequences share a state");
  }
  return sequences;
}

void Model::Impl::check_labels(const Batch& batch, std::span<const std::int32_t> labels,
                               std::span<const float> loss) const {
  if (labels.size() != batch.input_ids.size() || loss.size() != labels.size()) {
    fail("loss: {} ids, {} labels and room for {} losses", batch.input_ids.size(), labels.size(),
         loss.size());
  }
  for (std::size_t t = 0; t < labels.size(); ++t) {
    if (labels[t] >= info_.vocab_size) {
      fail("labels: id {} at position {} is out of range, the vocabulary has {} entries", labels[t],
           t, info_.vocab_size);
    }
  }
}

template <typename OnPiece>
void Model::Impl::run(Context& ctx, const Batch& batch, std::span<SequenceState* const> states,
                      OnPiece&& on_piece, const HiddenSink& hidden_sink) const {
  const std::span<const std::int64_t> cu = batch.cu_seqlens;
  const std::int64_t total = cu.back();
  const std::int64_t piece_tokens = ctx.device() == Device::kCpu ? kPieceTokens : kGpuPieceTokens;
  std::size_t first = 0;  // the first sequence of the piece
  for (std::int64_t begin = 0; begin < total;) {
    ScratchScope scratch(ctx);
    const std::span<std::int64_t> piece =
        scratch.array<std::int64_t>(static_cast<std::int64_t>(cu.size()));
    std::int64_t end = begin;
    std::size_t count = 0;  // sequences in the piece
    piece[0] = 0;
    while (first + count < states.size()) {
      const std::int64_t budget = piece_tokens - (end - begin);
      const std::int64_t left = cu[first + count + 1] - end;
      const std::int64_t take = left <= budget ? left : budget / kPieceAlign * kPieceAlign;
      if (take == 0) break;
      end += take;
      piece[++count] = end - begin;
      if (take < left) break;
    }
    const Sequences sequences(piece.first(count + 1));
    const TensorView hidden = scratch.tensor({end - begin, lm_.config().hidden_size});  // [n, C]
    CausalLM::LayerHook hook;
    if (hidden_sink) {
      hook = [&](std::int64_t layer, const ConstTensorView& rows) {
        std::vector<float> host;
        hidden_sink(layer, begin, end - begin, on_host(ctx, rows, host));
      };
    }
    const auto ids = batch.input_ids.subspan(static_cast<std::size_t>(begin),
                                             static_cast<std::size_t>(end - begin));
    lm_.forward(ctx, on_device(ctx, scratch, ids), sequences, states.subspan(first, count), hidden,
                hook);
    on_piece(begin, hidden);
    begin = end;
    while (first < states.size() && cu[first + 1] <= begin) ++first;
  }
}

template <typename OnRows>
void Model::Impl::each_logits(Context& ctx, std::int64_t first_row, const TensorView& hidden,
                              OnRows&& on_rows, const HiddenSink& hidden_sink) const {
  const std::int64_t rows = hidden.shape[0];
  ScratchScope scratch(ctx);
  const TensorView normed = scratch.activation(hidden.shape);  // [n, C]
  if (hidden_sink) {
    const TensorView exact = scratch.tensor(hidden.shape);  // [n, C]
    lm_.final_norm(ctx, hidden, exact);
    std::vector<float> host;
    hidden_sink(lm_.num_layers() + 1, first_row, rows, on_host(ctx, exact, host));
  }
  lm_.final_norm(ctx, hidden, normed);
  const TensorView logits = scratch.tensor({std::min(rows, kLogitRows), info_.vocab_size});
  for (std::int64_t r = 0; r < rows; r += kLogitRows) {
    // On a GPU the last rows are computed with some of those before: the algorithm of fewer rows
    // would round otherwise.
    const std::int64_t begin = ctx.device() == Device::kCpu
                                   ? r
                                   : std::max<std::int64_t>(0, std::min(r, rows - kLogitRows));
    const std::int64_t n = std::min(kLogitRows, rows - begin);
    const TensorView part{logits.data, DType::kF32, {n, info_.vocab_size}};
    lm_.head(ctx, rows_of(normed, begin, n), part);
    on_rows(first_row + r, rows_of(part, r - begin, n - (r - begin)));
  }
}

// XXH3-128 over the tensors in the order of their names, as stored. Depends on the weights, not on
// the files they are spread over.
const std::string& Model::Impl::hash() {
  std::call_once(hashed_, [&] {
    const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                         &XXH3_freeState);
    if (state == nullptr) fail("out of memory");
    XXH3_128bits_reset(state.get());
    for (const std::string& name : checkpoint_.names()) {
      const ConstTensorView view = checkpoint_.view(name);
      const std::string header =
          fmt::format("{} {} {}\n", name, name_of(view.dtype), to_string(view.shape));
      XXH3_128bits_update(state.get(), header.data(), header.size());
      XXH3_128bits_update(state.get(), view.data,
                          static_cast<std::size_t>(view.shape.size()) * size_of(view.dtype));
    }
    const XXH128_hash_t digest = XXH3_128bits_digest(state.get());
    hash_ = fmt::format("xxh3-128:{:016x}{:016x}", digest.high64, digest.low64);
  });
  return hash_;
}

Model::Model(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Model Model::load(const std::string& path_or_id, const LoadOptions& options) {
  if (options.dtype && *options.dtype != DType::kF32 && *options.dtype != DType::kBF16 &&
      *options.dtype != DType::kF16 && !is_packed(*options.dtype)) {
    fail("dtype: weights are kept as float32, bfloat16, float16, int8 or int4");
  }
  if (options.threads < 0 || options.threads > 1024) {
    fail("threads: must be from 0 to 1024, got {}", options.threads);
  }
  return Model(std::make_shared<Impl>(hub::resolve(path_or_id, options.revision), options));
}

const ModelInfo& Model::info() const {
  return impl_->info_;
}

void Weight::copy_to(void* host) const {
  if (device == Device::kCuda) return cuda::copy(host, data, bytes);
  if (tiled) {
    return ops::copy_from_tiles({data, DType::kBF16Tiles, {shape[0], shape[1]}},
                                static_cast<std::uint16_t*>(host));
  }
  std::memcpy(host, data, bytes);
}

std::vector<Weight> Model::weights() const {
  std::vector<Weight> weights;
  impl_->lm_.visit_params([&](const std::string& name, const Param& param) {
    Weight& weight = weights.emplace_back();
    weight.name = name;
    weight.tiled = param.value.dtype == DType::kBF16Tiles;
    weight.dtype = weight.tiled ? DType::kBF16 : param.value.dtype;
    for (int i = 0; i < param.shape.rank(); ++i) weight.shape.push_back(param.shape[i]);
    weight.device = impl_->device_;
    weight.data = param.value.data;
    weight.bytes = bytes_of(param.value.dtype, param.value.shape);
    weight.trainable = param.trainable;
  });
  return weights;
}

AttentionStats Model::attention_stats() const {
  const std::scoped_lock lock(impl_->contexts_mutex_);
  return impl_->attention_stats_;
}

State Model::new_state() const {
  State state(std::make_unique<State::Impl>(
      State::Impl{impl_->lm_.new_state(impl_->device_, impl_->activation_dtype_)}));
  state.impl().sequence.model_id = impl_->id_;
  return state;
}

void Model::save_state(const State& state, const std::string& path) const {
  State copy = state;  // visiting needs a writable one
  if (copy.empty() || copy.impl().sequence.model_id != impl_->id_) {
    fail("{}: the state to save belongs to another model", path);
  }
  write_state(copy.impl().sequence, impl_->hash(), path);
}

State Model::load_state(const std::string& path) const {
  State state = new_state();
  read_state(path, impl_->hash(), state.impl().sequence);
  return state;
}

void Model::forward(const Batch& batch, std::span<State* const> states,
                    std::span<float> last_logits) const {
  const std::vector<SequenceState*> sequences = impl_->check(batch, states);
  const auto count = static_cast<std::int64_t>(sequences.size());
  const std::int64_t vocab = info().vocab_size;
  const std::int64_t width = info().hidden_size;
  if (!last_logits.empty() && static_cast<std::int64_t>(last_logits.size()) != count * vocab) {
    fail("forward: last_logits has {} elements, expected {} x {}", last_logits.size(), count,
         vocab);
  }
  Impl::Lease lease(*impl_);
  Context& ctx = *lease;
  ScratchScope scratch(ctx);
  const TensorView last = scratch.tensor({count, width});  // [B, C]
  std::int64_t ended = 0;
  impl_->run(ctx, batch, sequences, [&](std::int64_t first_row, const TensorView& hidden) {
    const std::int64_t end = first_row + hidden.shape[0];
    for (; ended < count && batch.cu_seqlens[static_cast<std::size_t>(ended) + 1] <= end; ++ended) {
      const std::int64_t row =
          batch.cu_seqlens[static_cast<std::size_t>(ended) + 1] - 1 - first_row;
      // Rows that follow one another in both are copied at once.
      const std::int64_t begin = ended;
      while (ended + 1 < count && row + (ended + 1 - begin) < hidden.shape[0] &&
             batch.cu_seqlens[static_cast<std::size_t>(ended) + 2] - 1 - first_row ==
                 row + (ended + 1 - begin)) {
        ++ended;
      }
      ctx.copy(last.f32() + begin * width, hidden.f32() + row * width,
               static_cast<std::size_t>((ended + 1 - begin) * width) * sizeof(float));
    }
  });
  if (!last_logits.empty()) {
    impl_->each_logits(ctx, 0, last, [&](std::int64_t row, const TensorView& logits) {
      ctx.copy(last_logits.data() + row * vocab, logits.f32(),
               static_cast<std::size_t>(logits.shape.size()) * sizeof(float));
    });
  }
  ctx.synchronize();
}

void Model::step(std::span<const std::int32_t> input_ids, std::span<State* const> states,
                 std::span<float> logits) const {
  std::vector<std::int64_t> cu_seqlens(input_ids.size() + 1);
  for (std::size_t b = 0; b < cu_seqlens.size(); ++b) cu_seqlens[b] = static_cast<std::int64_t>(b);
  forward({input_ids, cu_seqlens}, states, logits);
}

SequenceState& contents_of(State& state) {
  return state.impl().sequence;
}

std::unique_ptr<Decoder> Model::decoder(const TokenOptions& options,
                                        std::span<const std::int32_t> eos_token_ids) const {
  if (impl_->device_ == Device::kCpu) return nullptr;
  struct Held {
    explicit Held(std::shared_ptr<Impl> of) : model(std::move(of)), lease(*model) {}
    std::shared_ptr<Impl> model;
    Impl::Lease lease;
  };
  const auto held = std::make_shared<Held>(impl_);
  return std::make_unique<Decoder>(std::shared_ptr<Context>(held, &*held->lease), impl_->lm_,
                                   options, eos_token_ids);
}

void Model::greedy_on_gpu(std::span<const std::int32_t> input_ids, std::span<State* const> states,
                          std::int64_t steps, const IdsSink& on_ids) const {
  std::vector<std::int64_t> cu_seqlens(input_ids.size() + 1);
  std::iota(cu_seqlens.begin(), cu_seqlens.end(), 0);
  std::vector<Decoder::Sequence> sequences;
  for (SequenceState* state : impl_->check({input_ids, cu_seqlens}, states)) {
    sequences.push_back({.state = state, .ids = input_ids.subspan(sequences.size(), 1)});
  }
  const std::unique_ptr<Decoder> decoder = this->decoder({}, {});
  decoder->start(sequences, std::max<std::int64_t>(steps, 0));
  std::vector<std::int32_t> ids(input_ids.size());
  for (std::int64_t s = 0, launched = 0; s < steps; ++s) {
    for (; launched < steps && decoder->under_way() < Decoder::kMostUnderWay; ++launched) {
      decoder->launch();
    }
    const std::span<const ChosenToken> chosen = decoder->take();
    std::transform(chosen.begin(), chosen.end(), ids.begin(),
                   [](const ChosenToken& token) { return token.id; });
    if (on_ids) on_ids(s, ids);
  }
}

void Model::greedy(std::span<const std::int32_t> input_ids, std::span<State* const> states,
                   std::int64_t steps, const IdsSink& on_ids) const {
  const std::size_t count = input_ids.size();
  const auto vocab = static_cast<std::size_t>(info().vocab_size);
  if (impl_->device_ == Device::kCuda) return greedy_on_gpu(input_ids, states, steps, on_ids);
  std::vector<std::int32_t> ids(input_ids.begin(), input_ids.end());
  std::vector<float> logits(count * vocab);
  for (std::int64_t s = 0; s < steps; ++s) {
    step(ids, states, logits);
    for (std::size_t b = 0; b < count; ++b) {
      const auto row = logits.begin() + static_cast<std::ptrdiff_t>(b * vocab);
      ids[b] = static_cast<std::int32_t>(
          std::max_element(row, row + static_cast<std::ptrdiff_t>(vocab)) - row);
    }
    if (on_ids) on_ids(s, ids);
  }
}

void Model::logits(const Batch& batch, std::span<State* const> states, const LogitsSink& sink,
                   const HiddenSink& hidden_sink) const {
  const std::vector<SequenceState*> sequences = impl_->check(batch, states);
  Impl::Lease lease(*impl_);
  Context& ctx = *lease;
  impl_->run(
      ctx, batch, sequences,
      [&](std::int64_t first_row, const TensorView& hidden) {
        impl_->each_logits(
            ctx, first_row, hidden,
            [&](std::int64_t row, const TensorView& logits) {
              if (!sink) return;
              std::vector<float> host;
              sink(row, logits.shape[0], on_host(ctx, logits, host));
            },
            hidden_sink);
      },
      hidden_sink);
}

void Model::loss(const Batch& batch, std::span<const std::int32_t> labels,
                 std::span<State* const> states, std::span<float> loss) const {
  const std::vector<SequenceState*> sequences = impl_->check(batch, states);
  impl_->check_labels(batch, labels, loss);
  Impl::Lease lease(*impl_);
  Context& ctx = *lease;
  impl_->run(ctx, batch, sequences, [&](std::int64_t first_row, const TensorView& hidden) {
    impl_->each_logits(ctx, first_row, hidden, [&](std::int64_t row, const TensorView& logits) {
      const auto at = static_cast<std::size_t>(row);
      const auto rows = static_cast<std::size_t>(logits.shape[0]);
      ops::cross_entropy(
          ctx,
          {.logits = logits, .labels = labels.subspan(at, rows), .loss = loss.subspan(at, rows)});
    });
  });
}

void Model::loss_and_gradients(const Batch& batch, std::span<const std::int32_t> labels,
                               std::span<float> loss, const GradientSink& sink,
                               const GradientOptions& options) const {
  impl_->check(batch);
  impl_->check_labels(batch, labels, loss);
  impl_->lm_.visit_params([&](const std::string& name, const Param& param) {
    const DType kept = param.value.dtype;
    if (kept == DType::kF32 || (impl_->device_ == Device::kCuda && !is_packed(kept))) return;
    fail("gradients: tensor '{}' is kept as {}; load the model with dtype float32", name,
         name_of(kept));
  });
  const auto counted = std::count_if(labels.begin(), labels.end(), [](auto id) { return id >= 0; });
  const float scale = counted > 0 ? 1 / static_cast<float>(counted) : 0;
  Gradients gradients(impl_->lm_, impl_->device_);
  {
    Impl::Lease lease(*impl_);
    Context& ctx = *lease;
    ScratchScope scratch(ctx);
    const TensorView losses = scratch.tensor({std::ssize(loss)});
    impl_->lm_.forward_backward(ctx, on_device(ctx, scratch, batch.input_ids),
                                Sequences(batch.cu_seqlens), on_device(ctx, scratch, labels), scale,
                                {losses.f32(), loss.size()}, gradients,
                                {.recompute = options.recompute});
    ctx.copy(loss.data(), losses.data, loss.size_bytes());
    ctx.synchronize();
  }
  for (const Gradients::Entry& entry : gradients.entries()) {
    const Shape& shape = entry.param->shape;
    std::vector<std::int64_t> dims(static_cast<std::size_t>(shape.rank()));
    for (int i = 0; i < shape.rank(); ++i) dims[static_cast<std::size_t>(i)] = shape[i];
    std::vector<float> host;
    const float* values = entry.value.f32();
    if (impl_->device_ == Device::kCuda) {
      host.resize(static_cast<std::size_t>(shape.size()));
      cuda::copy(host.data(), values, host.size() * sizeof(float));
      values = host.data();
    }
    sink(entry.name, dims, {values, static_cast<std::size_t>(shape.size())});
  }
}

}  // namespace deltafox
