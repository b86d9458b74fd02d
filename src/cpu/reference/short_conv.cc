#include "ops/short_conv.h"

namespace deltafox::reference {

void short_conv(const ShortConvArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t width = args.w.shape[1];
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    float* state = args.states[static_cast<std::size_t>(b)];
    for (std::int64_t t = args.sequences.begin(b); t < args.sequences.end(b); ++t) {
      for (std::int64_t c = 0; c < channels; ++c) {
        float* window = state + c * width;
        for (std::int64_t i = 0; i + 1 < width; ++i) window[i] = window[i + 1];
        window[width - 1] = args.x.f32()[t * channels + c];
        float sum = args.bias.data != nullptr ? args.bias.f32()[c] : 0;
        for (std::int64_t i = 0; i < width; ++i) sum += args.w.f32()[c * width + i] * window[i];
        args.y.f32()[t * channels + c] = activate(args.activation, sum);
      }
    }
  }
}

}  // namespace deltafox::reference
