#include "ops/rope.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rope.cc"
#include <hwy/foreach_target.h>

#include <algorithm>
#include <cmath>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {

HWY_INLINE void turn(float* x, std::int64_t half, const float* cosines, const float* sines) {
  const auto pair = [&](std::int64_t i, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    const VF32 a = load_vector(x + i);
    const VF32 b = load_vector(x + half + i);
    const VF32 cosine = load_vector(cosines + i);
    const VF32 sine = load_vector(sines + i);
    store_vector(hn::Sub(hn::Mul(a, cosine), hn::Mul(b, sine)), x + i);
    store_vector(hn::MulAdd(a, sine, hn::Mul(b, cosine)), x + half + i);
  };
  for_row(
      half,
      [&](std::int64_t i) HWY_ATTR {
        pair(
            i, [](const float* p) HWY_ATTR { return load(p); },
            [](VF32 v, float* p) HWY_ATTR { store(v, p); });
      },
      [&](std::int64_t i, std::int64_t n) HWY_ATTR {
        pair(
            i, [n](const float* p) HWY_ATTR { return load_first(p, n); },
            [n](VF32 v, float* p) HWY_ATTR { store_first(v, p, n); });
      });
}

// `direction` is 1, or -1 to turn back.
void find_tables(Context& ctx, const RopeArgs& args, float direction) {
  const std::int64_t tokens = args.sequences.tokens();
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t half = dim / 2;
  ScratchScope scratch(ctx);
  const std::span<float> positions = scratch.array<float>(tokens);
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      positions[static_cast<std::size_t>(t)] = static_cast<float>(
          args.positions[static_cast<std::size_t>(b)] + t - args.sequences.begin(b));
    }
  }
  RopeTables& tables = ctx.rope_tables();
  if (tables.base == args.base && tables.direction == direction && tables.dim == dim &&
      std::equal(positions.begin(), positions.end(), tables.positions.begin(),
                 tables.positions.end())) {
    return;
  }
  tables.base = args.base;
  tables.direction = direction;
  tables.dim = dim;
  tables.positions.assign(positions.begin(), positions.end());
  tables.values.resize(static_cast<std::size_t>(tokens * 2 * half));
  const std::span<float> frequencies = scratch.array<float>(half);
  for (std::int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    frequencies[static_cast<std::size_t>(i)] =
        1 / static_cast<float>(std::pow(static_cast<double>(args.base), exponent));
  }
  ctx.threads().parallel_for(tokens, [&](std::int64_t t) {
    float* cosines = tables.values.data() + t * 2 * half;
    float* sines = cosines + half;
    for (std::int64_t i = 0; i < half; ++i) {
      const float angle =
          positions[static_cast<std::size_t>(t)] * frequencies[static_cast<std::size_t>(i)];
      cosines[i] = std::cos(angle);
      sines[i] = direction * std::sin(angle);
    }
  });
}

void rope_target(Context& ctx, const RopeArgs& args, float direction) {
  find_tables(ctx, args, direction);
  const std::int64_t dim = args.q.shape[2];
  const std::int64_t half = dim / 2;
  const float* const tables = ctx.rope_tables().values.data();
  ctx.threads().parallel_for(args.sequences.tokens(), [&](std::int64_t t) {
    const float* cosines = tables + t * 2 * half;
    for (const TensorView& x : {args.q, args.k}) {
      const std::int64_t heads = x.shape[1];
      for (std::int64_t h = 0; h < heads; ++h) {
        turn(x.f32() + (t * heads + h) * dim, half, cosines, cosines + half);
      }
    }
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(rope_target);
void rope(Context& ctx, const RopeArgs& args) {
  HWY_DYNAMIC_DISPATCH(rope_target)(ctx, args, 1);
}
void rope_backward(Context& ctx, const RopeBackwardArgs& args) {
  const RopeArgs turned{.q = args.dq,
                        .k = args.dk,
                        .sequences = args.sequences,
                        .positions = args.positions,
                        .base = args.base};
  HWY_DYNAMIC_DISPATCH(rope_target)(ctx, turned, -1);
}
}  // namespace deltafox::cpu
#endif
