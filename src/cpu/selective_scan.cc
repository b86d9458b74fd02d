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

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(selective_scan_target);
void selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  HWY_DYNAMIC_DISPATCH(selective_scan_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
