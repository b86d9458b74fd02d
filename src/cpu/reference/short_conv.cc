#include "ops/short_conv.h"

#include <algorithm>

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
  if (args.norm_width > 0) {
    const Shape heads{args.y.shape[0], channels / args.norm_width, args.norm_width};
    feature_map({.norm = FeatureNorm::kL2, .x = args.y.reshaped(heads)});
  }
}

void short_conv_backward(const ShortConvBackwardArgs& args) {
  const std::int64_t channels = args.x.shape[1];
  const std::int64_t width = args.w.shape[1];
  std::fill(args.dx.f32(), args.dx.f32() + args.dx.shape.size(), 0.0F);
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    const std::int64_t begin = args.sequences.begin(b);
    for (std::int64_t t = begin; t < args.sequences.end(b); ++t) {
      for (std::int64_t c = 0; c < channels; ++c) {
        // f(i, where) for each tap and the element of x that it meets.
        const auto each_tap = [&](auto&& f) {
          for (std::int64_t i = std::max<std::int64_t>(0, width - 1 - (t - begin)); i < width; ++i)
            f(c * width + i, (t - width + 1 + i) * channels + c);
        };
        double sum = args.bias.data != nullptr ? args.bias.f32()[c] : 0;
        each_tap([&](std::int64_t tap, std::int64_t at) {
          sum += static_cast<double>(args.w.f32()[tap]) * args.x.f32()[at];
        });
        const double ds = args.dy.f32()[t * channels + c] * activation_slope(args.activation, sum);
        each_tap([&](std::int64_t tap, std::int64_t at) {
          args.dx.f32()[at] += static_cast<float>(ds * args.w.f32()[tap]);
          if (args.dw.data == nullptr) return;
          args.dw.f32()[tap] += static_cast<float>(ds * args.x.f32()[at]);
        });
        if (args.dbias.data != nullptr) args.dbias.f32()[c] += static_cast<float>(ds);
      }
    }
  }
}

}  // namespace deltafox::reference
