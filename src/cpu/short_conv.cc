#include "ops/short_conv.h"

#include <hwy/cache_control.h>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/short_conv.cc"
#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

// Channels of a task, or as many heads as fit: weights and history are first turned so that
// neighbouring channels lie side by side. Where that makes enough tasks, whole rows, which
// processors foresee.
constexpr std::int64_t kBlock = 256;
constexpr std::int64_t kWideBlock = 2048;
constexpr std::int64_t kStretch = 32;  // tokens of a task
// Tokens that are convolved at once, vector by vector of channels: what two of them read is loaded
// once.
constexpr std::int64_t kTogether = 4;
constexpr std::int64_t kLine = 16;  // floats of a cache line

struct ConvBlock {
  const ShortConvArgs& args;
  std::int64_t channel;   // the first of the block
  std::int64_t channels;  // of the block
  std::int64_t width;     // W
  std::int64_t stride;    // channels of a whole block, rounded up to vectors
  float* taps;            // [W, stride]
  float* history;         // [W - 1, stride], the rows before the sequence's first

  // Row t of the sequence that starts at row `begin` of x; negative rows are history.
  const float* row(std::int64_t begin, std::int64_t t) const {
    if (t < 0) return history + (t + width - 1) * stride;
    return args.x.f32() + (begin + t) * args.x.shape[1] + channel;
  }

  // to [W - first, stride] = from [C, W]ᵀ, this block's channels and columns from `first` on.
  void turn(const float* from, std::int64_t first, float* to) const {
    from += channel * width;
    std::int64_t c = 0;
    for (; width == 4 && c + lanes() <= channels; c += lanes()) {
      VF32 column[4];
      hn::LoadInterleaved4(kF32, from + c * width, column[0], column[1], column[2], column[3]);
      for (std::int64_t i = first; i < width; ++i) store(column[i], to + (i - first) * stride + c);
    }
    for (; c < channels; ++c) {
      for (std::int64_t i = first; i < width; ++i)
        to[(i - first) * stride + c] = from[c * width + i];
    }
  }
  void load_taps() const { turn(args.w.f32(), 0, taps); }
  void load_history(const float* state) const { turn(state, 1, history); }

  // Of history, which was loaded, and x.
  void update(float* state, std::int64_t begin, std::int64_t length) const {
    float* to = state + channel * width;
    const auto last = [&](std::int64_t i) { return row(begin, length - width + i); };
    std::int64_t c = 0;
    for (; width == 4 && c + lanes() <= channels; c += lanes()) {
      hn::StoreInterleaved4(load(last(0) + c), load(last(1) + c), load(last(2) + c),
                            load(last(3) + c), kF32, to + c * width);
    }
    for (; c < channels; ++c) {
      for (std::int64_t i = 0; i < width; ++i) to[c * width + i] = last(i)[c];
    }
  }

  // Tokens [t, t + kTogether), of W = kWidth, whole vectors of channels; returns their number.
  template <int kWidth>
  HWY_INLINE std::int64_t convolve_together(std::int64_t begin, std::int64_t t) const {
    const std::int64_t row_floats = args.x.shape[1];
    float* y = args.y.f32() + (begin + t) * row_floats + channel;
    const float* bias = args.bias.data != nullptr ? args.bias.f32() + channel : nullptr;
    const float* rows[kWidth - 1 + kTogether];
    for (int i = 0; i < kWidth - 1 + kTogether; ++i) rows[i] = row(begin, t - kWidth + 1 + i);
    std::int64_t c = 0;
    for (; c + lanes() <= channels; c += lanes()) {
      VF32 sums[kTogether];
      for (VF32& sum : sums) sum = bias != nullptr ? load(bias + c) : hn::Zero(kF32);
      VF32 w[kWidth];
      for (int i = 0; i < kWidth; ++i) w[i] = load(taps + i * stride + c);
      for (int i = 0; i < kWidth - 1 + kTogether; ++i) {
        const VF32 x = load(rows[i] + c);
        for (int token = 0; token < kTogether; ++token) {
          const int tap = i - token;
          if (tap >= 0 && tap < kWidth) sums[token] = hn::MulAdd(w[tap], x, sums[token]);
        }
      }
      activate_all(args.activation, sums);
      for (int token = 0; token < kTogether; ++token) {
        store(sums[token], y + token * row_floats + c);
        // What the next tokens read and write.
        __builtin_prefetch(rows[kWidth - 1 + token] + kTogether * row_floats + c);
        __builtin_prefetch(y + (token + kTogether) * row_floats + c);
      }
    }
    return c;
  }

  // One token, channels from c of the block on.
  void convolve(std::int64_t begin, std::int64_t t, std::int64_t from) const {
    float* y = args.y.f32() + (begin + t) * args.x.shape[1] + channel + from;
    const float* bias = args.bias.data != nullptr ? args.bias.f32() + channel + from : nullptr;
    for_vectors(channels - from,
                [&](std::int64_t c, auto&& load_vector, auto&& store_vector) HWY_ATTR {
                  VF32 sum = bias != nullptr ? load_vector(bias + c) : hn::Zero(kF32);
                  for (std::int64_t i = 0; i < width; ++i) {
                    const float* x = row(begin, t - width + 1 + i) + from;
                    sum = hn::MulAdd(load(taps + i * stride + from + c), load_vector(x + c), sum);
                  }
                  store_vector(activate(args.activation, sum), y + c);
                });
  }

  // The heads of a token at length one, as feature_map makes them.
  void normalize(std::int64_t row) const {
    float* y = args.y.f32() + row * args.x.shape[1] + channel;
    for (std::int64_t c = 0; c < channels; c += args.norm_width) {
      float* head = y + c;
      const VF32 scale = hn::Set(kF32, l2_scale(sum_of_squares(head, args.norm_width)));
      for_vectors(args.norm_width,
                  [&](std::int64_t i, auto&& load_vector, auto&& store_vector)
                      HWY_ATTR { store_vector(hn::Mul(load_vector(head + i), scale), head + i); });
    }
  }
};

void short_conv_target(Context& ctx, const ShortConvArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t width = args.w.shape[1];
  // Only the first tokens of a sequence see its history, and only their task touches the state.
  const std::int64_t stretch = std::max(kStretch, width);
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    longest = std::max(longest, args.sequences.length(b));
  }
  const std::int64_t stretches = (longest + stretch - 1) / stretch;
  const bool wide = args.sequences.count() * stretches >= 4 * ctx.threads().size();
  const std::int64_t head = std::max<std::int64_t>(1, args.norm_width);
  const std::int64_t heads = std::max<std::int64_t>(1, (wide ? kWideBlock : kBlock) / head);
  const std::int64_t block_channels = std::min(channels, heads * head);
  const std::int64_t blocks = (channels + block_channels - 1) / block_channels;
  ScratchScope scratch(ctx);
  const std::int64_t stride = (block_channels + kLine - 1) / kLine * kLine;
  const std::int64_t slot_floats = (2 * width - 1) * stride;
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  const std::int64_t tasks = args.sequences.count() * stretches * blocks;
  ctx.threads().parallel_for(tasks, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / (stretches * blocks);
    const std::int64_t first = task / blocks % stretches * stretch;
    const std::int64_t channel = task % blocks * block_channels;
    const std::int64_t length = args.sequences.length(b);
    if (first >= length) return;
    float* memory = slots + slot * slot_floats;
    const ConvBlock block{.args = args,
                          .channel = channel,
                          .channels = std::min(block_channels, channels - channel),
                          .width = width,
                          .stride = stride,
                          .taps = memory,
                          .history = memory + width * stride};
    float* state = args.states[static_cast<std::size_t>(b)];
    block.load_taps();
    if (first == 0) block.load_history(state);
    const std::int64_t begin = args.sequences.begin(b);
    const std::int64_t end = std::min(length, first + stretch);
    for (std::int64_t t = first; t < end;) {
      const bool together = width == 4 && t + kTogether <= end;
      const std::int64_t next = together ? t + kTogether : t + 1;
      const std::int64_t done = together ? block.convolve_together<4>(begin, t) : 0;
      for (; t < next; ++t) {
        if (done < block.channels) block.convolve(begin, t, done);
        if (args.norm_width > 0) block.normalize(begin + t);
      }
    }
    if (first == 0) block.update(state, begin, length);
  });
}

namespace {

// Rows lie apart, which no processor foresees: those of a block are asked for so many rows ahead.
constexpr std::int64_t kRowsAhead = 8;
// Channels of a task of backward, which has all sequences.
constexpr std::int64_t kBackwardBlock = 64;

struct ConvBackwardBlock {
  const ShortConvBackwardArgs& args;
  std::int64_t channel;   // the first of the block
  std::int64_t channels;  // of the block
  std::int64_t width;     // W
  float* taps;            // [W, kBackwardBlock]
  float* dtaps;           // [W, kBackwardBlock]
  float* dbias;           // [kBackwardBlock]
  float* ds;              // [W, kBackwardBlock], of row t at t mod W

  static std::int64_t floats(std::int64_t width) { return (3 * width + 1) * kBackwardBlock; }

  // Of row t + i, i < W, if that of row t is at `slot`.
  float* ds_row(std::int64_t slot, std::int64_t i) const {
    const std::int64_t at = slot + i;
    return ds + (at < width ? at : at - width) * kBackwardBlock;
  }
  const float* x_row(std::int64_t row) const {
    return args.x.f32() + row * args.x.shape[1] + channel;
  }

  void begin() const {
    std::fill(taps, taps + floats(width), 0.0f);
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t i = 0; i < width; ++i) {
        taps[i * kBackwardBlock + c] = args.w.f32()[(channel + c) * width + i];
      }
    }
  }

  void add_to_weights() const {
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t i = 0; args.dw.data != nullptr && i < width; ++i) {
        args.dw.f32()[(channel + c) * width + i] += dtaps[i * kBackwardBlock + c];
      }
      if (args.dbias.data != nullptr) args.dbias.f32()[channel + c] += dbias[c];
    }
  }

  // Row t of the sequence of `length` rows that starts at row `first`; later rows came before.
  void step(std::int64_t first, std::int64_t length, std::int64_t t) const {
    const std::int64_t at = (first + t) * args.x.shape[1] + channel;
    const float* dy = args.dy.f32() + at;
    const float* bias = args.bias.data != nullptr ? args.bias.f32() + channel : nullptr;
    const std::int64_t oldest = std::max<std::int64_t>(0, width - 1 - t);  // tap inside
    const std::int64_t later = std::min(width - 1, length - 1 - t);        // rows that read this
    const std::int64_t slot = t % width;
    float* d_sum = ds_row(slot, 0);
    if (t >= kRowsAhead) {
      const std::int64_t ahead = at - kRowsAhead * args.x.shape[1];
      for (std::int64_t c = 0; c < channels; c += kLine) {
        hwy::Prefetch(args.dy.f32() + ahead + c);
        hwy::Prefetch(args.x.f32() + ahead + c);
        hwy::Prefetch(args.dx.f32() + ahead + c);
      }
    }
    for_vectors(channels, [&](std::int64_t c, auto&& load_vector, auto&& store_vector) HWY_ATTR {
      VF32 d = load_vector(dy + c);
      if (args.activation != Activation::kIdentity) {
        VF32 sum = bias != nullptr ? load_vector(bias + c) : hn::Zero(kF32);
        for (std::int64_t i = oldest; i < width; ++i) {
          const VF32 x = load_vector(x_row(first + t - width + 1 + i) + c);
          sum = hn::MulAdd(load(taps + i * kBackwardBlock + c), x, sum);
        }
        d = hn::Mul(d, activation_slope(args.activation, sum));
      }
      store(d, d_sum + c);
      for (std::int64_t i = oldest; i < width; ++i) {
        const VF32 x = load_vector(x_row(first + t - width + 1 + i) + c);
        float* dtap = dtaps + i * kBackwardBlock + c;
        store(hn::MulAdd(d, x, load(dtap)), dtap);
      }
      store(hn::Add(load(dbias + c), d), dbias + c);
      VF32 dx = hn::Zero(kF32);
      for (std::int64_t i = 0; i <= later; ++i) {
        const VF32 tap = load(taps + (width - 1 - i) * kBackwardBlock + c);
        dx = hn::MulAdd(tap, load(ds_row(slot, i) + c), dx);
      }
      store_vector(dx, args.dx.f32() + at + c);
    });
  }
};

}  // namespace

void short_conv_backward_target(Context& ctx, const ShortConvBackwardArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t width = args.w.shape[1];
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = ConvBackwardBlock::floats(width);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  const std::int64_t blocks = (channels + kBackwardBlock - 1) / kBackwardBlock;
  ctx.threads().parallel_for(blocks, [&](std::int64_t task, int slot) {
    float* memory = slots + slot * slot_floats;
    const std::int64_t channel = task * kBackwardBlock;
    const std::int64_t size = width * kBackwardBlock;
    const ConvBackwardBlock block{.args = args,
                                  .channel = channel,
                                  .channels = std::min(kBackwardBlock, channels - channel),
                                  .width = width,
                                  .taps = memory,
                                  .dtaps = memory + size,
                                  .dbias = memory + 3 * size,
                                  .ds = memory + 2 * size};
    block.begin();
    for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
      const std::int64_t length = args.sequences.length(b);
      for (std::int64_t t = length; t-- > 0;) block.step(args.sequences.begin(b), length, t);
    }
    block.add_to_weights();
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(short_conv_target);
HWY_EXPORT(short_conv_backward_target);
void short_conv(Context& ctx, const ShortConvArgs& args) {
  HWY_DYNAMIC_DISPATCH(short_conv_target)(ctx, args);
}
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(short_conv_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
