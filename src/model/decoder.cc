#include "model/decoder.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "core/error.h"
#include "ops/step.h"

namespace deltafox {
namespace {

constexpr std::int64_t kSlots = Decoder::kMostUnderWay + 1;
// Where memory grows, a recording has room for so many tokens of each sequence: recording takes as
// long as a few steps.
constexpr std::int64_t kRecordedSteps = 256;
// On a GPU a row of logits starts at a multiple of so many (see ops/linear.h).
constexpr std::int64_t kLogitAlign = 8;

}  // namespace

Decoder::Decoder(std::shared_ptr<Context> ctx, const CausalLM& lm, const TokenOptions& options,
                 std::span<const std::int32_t> eos_ids)
    : ctx_(std::move(ctx)), lm_(lm), options_(options), runs_(DType::kI32, {1}, Device::kCuda) {
  if (eos_ids.empty()) return;
  upload(eos_ids_, DType::kI32, {static_cast<std::int64_t>(eos_ids.size())}, eos_ids.data());
}

Decoder::~Decoder() {
  try {
    ctx_->synchronize();
  } catch (const Error&) {  // whoever takes tokens hears of it
  }
}

// Makes it a tensor of the GPU with what lies at `from`.
void Decoder::upload(Tensor& to, DType dtype, const Shape& shape, const void* from) {
  to = Tensor(dtype, shape, Device::kCuda);
  to.read_from(from);
}

// What the processors need of the ids so far.
void Decoder::upload_ids(std::span<const Sequence> sequences, std::int64_t steps) {
  const auto batch = static_cast<std::int64_t>(sequences.size());
  if (options_.repetition_penalty != 1) {
    const std::int64_t words = (lm_.config().vocab_size + 31) / 32;
    std::vector<std::uint32_t> seen(static_cast<std::size_t>(batch * words));
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      const auto row = std::span(seen).subspan(b * static_cast<std::size_t>(words));
      for (const std::int32_t id : sequences[b].ids) {
        row[static_cast<std::size_t>(id / 32)] |= 1U << id % 32;
      }
    }
    upload(seen_, DType::kI32, {batch, words}, seen.data());
  }
  if (options_.no_repeat_ngram_size > 0) {
    std::size_t longest = 0;
    for (const Sequence& sequence : sequences) longest = std::max(longest, sequence.ids.size());
    const std::int64_t capacity = static_cast<std::int64_t>(longest) + steps;
    std::vector<std::int32_t> history(static_cast<std::size_t>(batch * capacity));
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      std::copy(sequences[b].ids.begin(), sequences[b].ids.end(),
                history.begin() + static_cast<std::ptrdiff_t>(b) * capacity);
    }
    upload(history_, DType::kI32, {batch, capacity}, history.data());
  }
}

void Decoder::start(std::span<const Sequence> sequences, std::int64_t steps) {
  graph_.reset();
  recorded_left_ = 0;
  warm_ = false;
  launched_ = 0;
  taken_ = 0;
  steps_left_ = steps;
  states_.clear();
  std::vector<std::int32_t> ids;
  std::vector<TokenSequence> of_kernel;
  for (const Sequence& sequence : sequences) {
    states_.push_back(sequence.state);
    ids.push_back(sequence.ids.back());
    const auto length = static_cast<std::int32_t>(sequence.ids.size());
    of_kernel.push_back({.length = length,
                         .new_tokens = length - static_cast<std::int32_t>(sequence.prompt_size),
                         .prompt = sequence.prompt,
                         .sequence = sequence.sequence,
                         .calls = 0});
  }
  cu_seqlens_.resize(sequences.size() + 1);
  std::iota(cu_seqlens_.begin(), cu_seqlens_.end(), 0);
  upload(ids_, DType::kI32, {count()}, ids.data());
  upload(sequences_, DType::kU8, {count() * static_cast<std::int64_t>(sizeof(TokenSequence))},
         of_kernel.data());
  upload_ids(sequences, steps);
  if (count() > capacity_) {
    capacity_ = count();
    memory_ =
        cuda::allocate_shared(static_cast<std::size_t>(kSlots * capacity_) * sizeof(ChosenToken));
    chosen_ = static_cast<ChosenToken*>(memory_.get());
  }
  std::fill_n(chosen_, kSlots * count(), ChosenToken{});
}

// Room for the steps of a recording.
void Decoder::reserve() {
  recorded_left_ = lm_.replayable() ? steps_left_ : std::min(steps_left_, kRecordedSteps);
  for (SequenceState* state : states_) lm_.reserve(*state, recorded_left_);
}

void Decoder::step() {
  Context& ctx = *ctx_;
  ScratchScope scratch(ctx);
  const std::int64_t vocab = lm_.config().vocab_size;
  const std::int64_t aligned = (vocab + kLogitAlign - 1) / kLogitAlign * kLogitAlign;
  const TensorView hidden = scratch.tensor({count(), lm_.config().hidden_size});  // [B, C]
  const TensorView logits = scratch.tensor({count(), aligned});                   // [B, N']
  const std::span<const std::int32_t> ids(static_cast<const std::int32_t*>(ids_.view().data),
                                          states_.size());
  {
    ops::StepProgram program(ctx, lm_.has_step(ctx, count()));
    lm_.forward(ctx, ids, Sequences(cu_seqlens_), states_, hidden);
    lm_.norm_and_head(ctx, hidden, logits);
    program.run();
  }
  const auto kept = [](Tensor& tensor) {
    return tensor.bytes() > 0 ? tensor.view() : TensorView{};
  };
  ops::choose_token(ctx, {.logits = logits,
                          .classes = vocab,
                          .options = options_,
                          .sequences = sequences_.view(),
                          .eos_ids = kept(eos_ids_),
                          .seen = kept(seen_),
                          .history = kept(history_),
                          .ids = ids_.view(),
                          .chosen = chosen_,
                          .slots = kSlots,
                          .counter = runs_.view()});
}

// The first run of a recording is counted by recording it.
void Decoder::record() {
  ctx_->zero(runs_.view().data, runs_.bytes());
  ctx_->set_recorded_runs(static_cast<const std::int32_t*>(runs_.view().data));
  try {
    graph_ = cuda::record(ctx_->stream(), [&] { step(); });
  } catch (...) {
    ctx_->set_recorded_runs(nullptr);
    throw;
  }
  ctx_->set_recorded_runs(nullptr);
}

void Decoder::launch() {
  if (under_way() == kMostUnderWay || steps_left_ == 0) {
    fail("decoder: {} steps are under way and {} left", under_way(), steps_left_);
  }
  if (recorded_left_ == 0) {
    graph_.reset();
    warm_ = false;
    reserve();
  }
  if (graph_ != nullptr) {
    for (SequenceState* state : states_) lm_.advance(*state);
    cuda::run(ctx_->stream(), *graph_);
  } else if (warm_ && recorded_left_ > 1) {
    record();
    cuda::run(ctx_->stream(), *graph_);
  } else {
    // As it is, so that scratch memory is there.
    step();
    warm_ = true;
  }
  --recorded_left_;
  --steps_left_;
  ++launched_;
}

std::span<const ChosenToken> Decoder::take() {
  constexpr int kPatience = 1 << 20;
  ChosenToken* slot = chosen_ + taken_ % kSlots * count();
  row_.resize(states_.size());
  int waited = 0;
  for (std::size_t b = 0; b < row_.size(); ++b) {
    const std::atomic_ref<std::int32_t> id(slot[b].id);
    while (id.load(std::memory_order_acquire) == ChosenToken::kPending) {
      std::this_thread::yield();
      if (++waited == kPatience) ctx_->synchronize();  // or throws what went wrong
    }
    row_[b] = slot[b];
    slot[b] = {};
  }
  ++taken_;
  for (const ChosenToken& token : row_) {
    if (token.id == ChosenToken::kNotNumbers) fail(ChosenToken::kNotNumbersMessage);
    if (token.id == ChosenToken::kNoneLeft) fail(ChosenToken::kNoneLeftMessage);
  }
  return row_;
}

}  // namespace deltafox
