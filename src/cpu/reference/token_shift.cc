#include "ops/token_shift.h"

namespace deltafox::reference {

void token_shift(const TokenShiftArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  const std::int64_t dim = args.x.shape[2];
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    float* state = args.states[static_cast<std::size_t>(b)];
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      for (std::int64_t i = 0; i < heads * dim; ++i) {
        const float alpha = args.alpha.f32()[t * heads + i / dim];
        const float x = args.x.f32()[t * heads * dim + i];
        args.y.f32()[t * heads * dim + i] = alpha * state[i] + (1 - alpha) * x;
        state[i] = x;
      }
    }
  }
}

void token_shift_backward(const TokenShiftBackwardArgs& args) {
  const std::int64_t heads = args.x.shape[1];
  const std::int64_t dim = args.x.shape[2];
  const std::int64_t width = heads * dim;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const double alpha = args.alpha.f32()[t * heads + h];
        double dalpha = 0;
        for (std::int64_t i = t * width + h * dim; i < t * width + (h + 1) * dim; ++i) {
          const double previous = t == args.sequences.begin(b) ? 0 : args.x.f32()[i - width];
          dalpha += args.dy.f32()[i] * (previous - args.x.f32()[i]);
          double dx = (1 - alpha) * args.dy.f32()[i];
          if (t + 1 < args.sequences.end(b)) {
            dx += static_cast<double>(args.alpha.f32()[(t + 1) * heads + h]) *
                  args.dy.f32()[i + width];
          }
          args.dx.f32()[i] = static_cast<float>(dx);
        }
        args.dalpha.f32()[t * heads + h] = static_cast<float>(dalpha);
      }
    }
  }
}

}  // namespace deltafox::reference
