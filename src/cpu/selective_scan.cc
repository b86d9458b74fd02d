// See ops/selective_scan.h for the equations. One task is a vector of neighbouring channels of one
// sequence, whose tokens follow one another; so a result does not depend on the number of threads
// or on other sequences.
#include "ops/selective_scan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/selective_scan.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

// Floats of a full vector of any instruction set.
constexpr std::int64_t kLanes = 16;

// All tokens of sequence s for the channels of one vector, from `channel` on; `load_channels` and
// `store_channels` read and write as many as there are. decay_rates and h are [N, 16].
template <typename Load, typename Store>
HWY_INLINE void scan(const SelectiveScanArgs& args, std::int64_t s, std::int64_t channel,
                     float* decay_rates, float* h, Load&& load_channels, Store&& store_channels) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  float* state = args.states[static_cast<std::size_t>(s)] + channel;  // [N, C]
  for (std::int64_t n = 0; n < size; ++n) {
    const VF32 a_log = load(decay_rates + n * kLanes);
    store(hn::Neg(hn::Exp(kF32, a_log)), decay_rates + n * kLanes);
    store(load_channels(state + n * channels), h + n * kLanes);
  }
  const VF32 bias = load_channels(args.dt_bias.f32() + channel);
  const VF32 skip = load_channels(args.d.f32() + channel);
  for (std::int64_t t = args.sequences.begin(s); t < args.sequences.end(s); ++t) {
    const std::int64_t at = t * channels + channel;
    const float* b = args.b.f32() + t * size;
    const float* c = args.c.f32() + t * size;
    const VF32 x = load_channels(args.x.f32() + at);
    const VF32 dt = softplus(hn::Add(load_channels(args.dt.f32() + at), bias));
    const VF32 input = hn::Mul(dt, x);
    VF32 y = hn::Mul(skip, x);
    for (std::int64_t n = 0; n < size; ++n) {
      const VF32 decay = hn::Exp(kF32, hn::Mul(dt, load(decay_rates + n * kLanes)));
      const VF32 entry =
          hn::MulAdd(decay, load(h + n * kLanes), hn::Mul(hn::Set(kF32, b[n]), input));
      store(entry, h + n * kLanes);
      y = hn::MulAdd(hn::Set(kF32, c[n]), entry, y);
    }
    if (args.gate.data != nullptr) {
      y = hn::Mul(y, activate(Activation::kSilu, load_channels(args.gate.f32() + at)));
    }
    store_channels(y, args.y.f32() + at);
  }
  for (std::int64_t n = 0; n < size; ++n) {
    store_channels(load(h + n * kLanes), state + n * channels);
  }
}

}  // namespace

void selective_scan_target(Context& ctx, const SelectiveScanArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  const std::int64_t vectors = (channels + lanes() - 1) / lanes();
  ScratchScope scratch(ctx);
  float* slots = scratch.tensor({ctx.threads().size(), 2 * size, kLanes}).f32();
  ctx.threads().parallel_for(args.sequences.count() * vectors, [&](std::int64_t task, int slot) {
    const std::int64_t s = task / vectors;
    const std::int64_t channel = task % vectors * lanes();
    const std::int64_t width = std::min(lanes(), channels - channel);
    float* decay_rates = slots + slot * 2 * size * kLanes;
    float* h = decay_rates + size * kLanes;
    std::fill(decay_rates, h, 0.0f);
    for (std::int64_t i = 0; i < width; ++i) {
      for (std::int64_t n = 0; n < size; ++n) {
        decay_rates[n * kLanes + i] = args.a_log.f32()[(channel + i) * size + n];
      }
    }
    if (width == lanes()) {
      scan(
          args, s, channel, decay_rates, h, [](const float* p) HWY_ATTR { return load(p); },
          [](VF32 v, float* p) HWY_ATTR { store(v, p); });
    } else {
      scan(
          args, s, channel, decay_rates, h,
          [width](const float* p) HWY_ATTR { return load_first(p, width); },
          [width](VF32 v, float* p) HWY_ATTR { store_first(v, p, width); });
    }
  });
}

namespace {

// Channels of a task of backward, which has all sequences; and tokens whose states are computed
// again at a time.
constexpr std::int64_t kBackwardBlock = 64;
constexpr std::int64_t kBackwardChunk = 16;

// Memory of a task. A vector of channels takes kLanes floats, whatever its length.
struct ScanBackward {
  const SelectiveScanBackwardArgs& args;
  std::int64_t channel;   // the first of the block
  std::int64_t channels;  // of the block
  std::int64_t size;      // N
  float* selected;        // [T, 2, N], this block's part of db and dc
  float* rates;           // [vectors, N], −e^a_log
  float* d_a_log;         // [vectors, N]
  float* dparams;         // [vectors, 2]: dt_bias, d
  float* dh;              // [vectors, N], of the state behind the token at hand
  float* h;               // [17, N], of one vector before each token and behind the last
  float* decay;           // [16, N]
  float* dselected;       // [16, 2, N], sums of each lane over the vectors
  float* states;          // of each chunk [vectors, N], before it

  std::int64_t vectors() const { return (channels + lanes() - 1) / lanes(); }

  static std::int64_t floats(std::int64_t size, std::int64_t chunks) {
    // Vectors of the shortest length are the most.
    const std::int64_t vectors = (kBackwardBlock + lanes() - 1) / lanes();
    return kLanes * (vectors * (size * (3 + chunks) + 2) + size * (4 * kBackwardChunk + 1));
  }

  void take(float* memory) {
    const auto next = [&](std::int64_t n) { return std::exchange(memory, memory + n * kLanes); };
    rates = next(vectors() * size);
    d_a_log = next(vectors() * size);
    dparams = next(vectors() * 2);
    dh = next(vectors() * size);
    h = next((kBackwardChunk + 1) * size);
    decay = next(kBackwardChunk * size);
    dselected = next(2 * kBackwardChunk * size);
    states = memory;
  }
};

HWY_INLINE void begin_block(const ScanBackward& block) {
  std::fill(block.rates, block.dh, 0.0f);  // and d_a_log and dparams
  for (std::int64_t i = 0; i < block.channels; ++i) {
    const float* a_log = block.args.a_log.f32() + (block.channel + i) * block.size;
    float* rates = block.rates + i / lanes() * block.size * kLanes + i % lanes();
    for (std::int64_t n = 0; n < block.size; ++n) rates[n * kLanes] = a_log[n];
  }
  for (std::int64_t i = 0; i < block.vectors() * block.size; ++i) {
    float* rate = block.rates + i * kLanes;
    store(hn::Neg(hn::Exp(kF32, load(rate))), rate);
  }
}

// Inputs of one token of a vector of channels.
struct TokenInputs {
  VF32 raw;  // dt + dt_bias
  VF32 dt;   // Δ
  VF32 x;
};

template <typename Load>
HWY_INLINE TokenInputs load_token(const SelectiveScanBackwardArgs& args, std::int64_t t,
                                  std::int64_t channel, Load&& load_channels) {
  const std::int64_t at = t * args.x.shape[1] + channel;
  const VF32 raw =
      hn::Add(load_channels(args.dt.f32() + at), load_channels(args.dt_bias.f32() + channel));
  return {raw, softplus(raw), load_channels(args.x.f32() + at)};
}

// to = decay · from + Δ b x for each entry of the state; `decay` may be null.
HWY_INLINE void advance(const ScanBackward& block, const float* rates, const TokenInputs& inputs,
                        std::int64_t t, const float* from, float* to, float* decay) {
  const float* b = block.args.b.f32() + t * block.size;
  const VF32 input = hn::Mul(inputs.dt, inputs.x);
  for (std::int64_t n = 0; n < block.size; ++n) {
    const VF32 factor = hn::Exp(kF32, hn::Mul(inputs.dt, load(rates + n * kLanes)));
    if (decay != nullptr) store(factor, decay + n * kLanes);
    store(hn::MulAdd(factor, load(from + n * kLanes), hn::Mul(hn::Set(kF32, b[n]), input)),
          to + n * kLanes);
  }
}

// Token t, the j-th of its chunk, of vector v; the tokens behind it are done.
template <typename Load, typename Store>
HWY_INLINE void token_backward(const ScanBackward& block, std::int64_t v, std::int64_t t,
                               std::int64_t j, Load&& load_channels, Store&& store_channels) {
  const SelectiveScanBackwardArgs& args = block.args;
  const std::int64_t size = block.size;
  const std::int64_t channel = block.channel + v * lanes();
  const std::int64_t at = t * args.x.shape[1] + channel;
  const float* before = block.h + j * size * kLanes;
  const float* after = before + size * kLanes;
  const float* decay = block.decay + j * size * kLanes;
  const float* rates = block.rates + v * size * kLanes;
  float* dh = block.dh + v * size * kLanes;
  float* d_a_log = block.d_a_log + v * size * kLanes;
  float* db = block.dselected + 2 * j * size * kLanes;
  float* dc = db + size * kLanes;
  const float* b = args.b.f32() + t * size;
  const float* c = args.c.f32() + t * size;
  const TokenInputs inputs = load_token(args, t, channel, load_channels);
  const VF32 skip = load_channels(args.d.f32() + channel);
  VF32 dy = load_channels(args.dy.f32() + at);
  if (args.gate.data != nullptr) {
    VF32 y = hn::Mul(skip, inputs.x);
    for (std::int64_t n = 0; n < size; ++n) {
      y = hn::MulAdd(hn::Set(kF32, c[n]), load(after + n * kLanes), y);
    }
    const VF32 gate = load_channels(args.gate.f32() + at);
    const VF32 slope = activation_slope(Activation::kSilu, gate);
    store_channels(hn::Mul(hn::Mul(dy, y), slope), args.dgate.f32() + at);
    dy = hn::Mul(dy, activate(Activation::kSilu, gate));
  }
  const VF32 input = hn::Mul(inputs.dt, inputs.x);
  VF32 dinput = hn::Zero(kF32);
  VF32 ddt = hn::Zero(kF32);
  for (std::int64_t n = 0; n < size; ++n) {
    const std::int64_t i = n * kLanes;
    const VF32 d = hn::MulAdd(hn::Set(kF32, c[n]), dy, load(dh + i));
    store(hn::MulAdd(load(after + i), dy, load(dc + i)), dc + i);
    store(hn::MulAdd(d, input, load(db + i)), db + i);
    dinput = hn::MulAdd(d, hn::Set(kF32, b[n]), dinput);
    const VF32 decayed = hn::Mul(d, load(decay + i));
    const VF32 dlog = hn::Mul(hn::Mul(decayed, load(before + i)), load(rates + i));
    ddt = hn::Add(ddt, dlog);
    store(hn::MulAdd(dlog, inputs.dt, load(d_a_log + i)), d_a_log + i);
    store(decayed, dh + i);
  }
  ddt = hn::Mul(hn::MulAdd(dinput, inputs.x, ddt), sigmoid(inputs.raw));
  store_channels(hn::MulAdd(dinput, inputs.dt, hn::Mul(skip, dy)), args.dx.f32() + at);
  store_channels(ddt, args.ddt.f32() + at);
  float* dparams = block.dparams + 2 * v * kLanes;
  store(hn::Add(load(dparams), ddt), dparams);
  store(hn::MulAdd(dy, inputs.x, load(dparams + kLanes)), dparams + kLanes);
}

// f(load_channels, store_channels) for the channels of vector v.
template <typename F>
HWY_INLINE void with_vector(const ScanBackward& block, std::int64_t v, F&& f) {
  const std::int64_t width = std::min(lanes(), block.channels - v * lanes());
  for_vectors(width, [&](std::int64_t, auto&& load_channels, auto&& store_channels)
                         HWY_ATTR { f(load_channels, store_channels); });
}

HWY_INLINE void sequence_backward(const ScanBackward& block, std::int64_t first,
                                  std::int64_t length) {
  const std::int64_t size = block.size;
  const std::int64_t state_floats = block.vectors() * size * kLanes;
  const std::int64_t count = (length + kBackwardChunk - 1) / kBackwardChunk;
  std::fill(block.states, block.states + state_floats, 0.0f);
  for (std::int64_t t = 0; t < (count - 1) * kBackwardChunk; ++t) {
    const std::int64_t c = t / kBackwardChunk;
    for (std::int64_t v = 0; v < block.vectors(); ++v) {
      float* after = block.states + (c + 1) * state_floats + v * size * kLanes;
      const float* before = t % kBackwardChunk == 0 ? after - state_floats : after;
      with_vector(block, v, [&](auto&& load_channels, auto&&) HWY_ATTR {
        const TokenInputs inputs =
            load_token(block.args, first + t, block.channel + v * lanes(), load_channels);
        advance(block, block.rates + v * size * kLanes, inputs, first + t, before, after, nullptr);
      });
    }
  }
  std::fill(block.dh, block.dh + state_floats, 0.0f);
  for (std::int64_t c = count - 1; c >= 0; --c) {
    const std::int64_t begin = first + c * kBackwardChunk;
    const std::int64_t tokens = std::min(kBackwardChunk, length - c * kBackwardChunk);
    std::fill(block.dselected, block.dselected + 2 * tokens * size * kLanes, 0.0f);
    for (std::int64_t v = 0; v < block.vectors(); ++v) {
      with_vector(block, v, [&](auto&& load_channels, auto&& store_channels) HWY_ATTR {
        std::copy_n(block.states + c * state_floats + v * size * kLanes, size * kLanes, block.h);
        for (std::int64_t j = 0; j < tokens; ++j) {
          const TokenInputs inputs =
              load_token(block.args, begin + j, block.channel + v * lanes(), load_channels);
          float* before = block.h + j * size * kLanes;
          advance(block, block.rates + v * size * kLanes, inputs, begin + j, before,
                  before + size * kLanes, block.decay + j * size * kLanes);
        }
        for (std::int64_t j = tokens - 1; j >= 0; --j) {
          token_backward(block, v, begin + j, j, load_channels, store_channels);
        }
      });
    }
    for (std::int64_t i = 0; i < tokens * 2 * size; ++i) {
      block.selected[begin * 2 * size + i] = sum_of(load(block.dselected + i * kLanes));
    }
  }
}

HWY_INLINE void add_to_weights(const ScanBackward& block) {
  for (std::int64_t i = 0; i < block.channels; ++i) {
    const std::int64_t v = i / lanes();
    const float* d_a_log = block.d_a_log + v * block.size * kLanes + i % lanes();
    const float* dparams = block.dparams + 2 * v * kLanes + i % lanes();
    for (std::int64_t n = 0; n < block.size; ++n) {
      block.args.d_a_log.f32()[(block.channel + i) * block.size + n] += d_a_log[n * kLanes];
    }
    block.args.d_dt_bias.f32()[block.channel + i] += dparams[0];
    block.args.dd.f32()[block.channel + i] += dparams[kLanes];
  }
}

}  // namespace

void selective_scan_backward_target(Context& ctx, const SelectiveScanBackwardArgs& args) {
  const std::int64_t tokens = args.x.shape[0];
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t size = args.a_log.shape[1];
  const std::int64_t blocks = (channels + kBackwardBlock - 1) / kBackwardBlock;
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    longest = std::max(longest, args.sequences.length(b));
  }
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats =
      ScanBackward::floats(size, (longest + kBackwardChunk - 1) / kBackwardChunk);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  float* selected = scratch.tensor({blocks, tokens, 2, size}).f32();
  ctx.threads().parallel_for(blocks, [&](std::int64_t task, int slot) {
    const std::int64_t channel = task * kBackwardBlock;
    ScanBackward block{.args = args,
                       .channel = channel,
                       .channels = std::min(kBackwardBlock, channels - channel),
                       .size = size,
                       .selected = selected + task * tokens * 2 * size,
                       .rates = nullptr,
                       .d_a_log = nullptr,
                       .dparams = nullptr,
                       .dh = nullptr,
                       .h = nullptr,
                       .decay = nullptr,
                       .dselected = nullptr,
                       .states = nullptr};
    block.take(slots + slot * slot_floats);
    begin_block(block);
    for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
      sequence_backward(block, args.sequences.begin(b), args.sequences.length(b));
    }
    add_to_weights(block);
  });
  ctx.threads().parallel_for(tokens, [&](std::int64_t t) {
    float* db = args.db.f32() + t * size;
    float* dc = args.dc.f32() + t * size;
    std::fill(db, db + size, 0.0f);
    std::fill(dc, dc + size, 0.0f);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const float* part = selected + (block * tokens + t) * 2 * size;
      for (std::int64_t n = 0; n < size; ++n) {
        db[n] += part[n];
        dc[n] += part[size + n];
      }
    }
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(selective_scan_target);
HWY_EXPORT(selective_scan_backward_target);
void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  HWY_DYNAMIC_DISPATCH(selective_scan_target)(ctx, args);
}
void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(selective_scan_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
