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

}  // namespace deltafox::reference
