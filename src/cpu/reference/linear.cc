#include "ops/linear.h"

#include <cmath>
#include <vector>

#include "core/float_convert.h"
#include "core/quantized.h"
#include "ops/quantize.h"

namespace deltafox::reference {
namespace {

// Row t of x as the kind of w sees it, widened again.
std::vector<float> rounded_row(const LinearArgs& args, std::int64_t t) {
  const std::int64_t depth = args.x.shape[1];
  const float* from = args.x.f32() + t * depth;
  std::vector<float> x(from, from + depth);
  if (args.w.dtype == DType::kBF16) {
    for (float& value : x) value = bf16_to_f32(f32_to_bf16(value));
  }
  if (!is_packed(args.w.dtype)) return x;
  for (std::int64_t begin = 0; begin < depth; begin += kQuantBlock) {
    const std::int64_t end = std::min(depth, begin + kQuantBlock);
    float max = 0;
    for (std::int64_t k = begin; k < end; ++k) max = std::max(max, std::abs(from[k]));
    const float inverse = max > 1e-30F ? 127 / max : 0;
    for (std::int64_t k = begin; k < end; ++k) {
      x[static_cast<std::size_t>(k)] = std::nearbyint(from[k] * inverse) * (max / 127);
    }
  }
  return x;
}

std::vector<float> weight_row(const LinearArgs& args, std::int64_t n) {
  const std::int64_t depth = args.w.shape[1];
  std::vector<float> w(static_cast<std::size_t>(depth));
  if (is_packed(args.w.dtype)) {
    cpu::dequantize_row(args.w, n, w.data());
  } else {
    to_f32(args.w, n * depth, w);
  }
  return w;
}

}  // namespace

void linear(const LinearArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t columns = args.w.shape[0];
  for (std::int64_t n = 0; n < columns; ++n) {
    const std::vector<float> w = weight_row(args, n);
    for (std::int64_t t = 0; t < rows; ++t) {
      const std::vector<float> x = rounded_row(args, t);
      double sum = 0;
      for (std::size_t k = 0; k < w.size(); ++k) sum += static_cast<double>(x[k]) * w[k];
      if (args.bias.data != nullptr) sum += args.bias.f32()[n];
      float& y = args.y.f32()[t * columns + n];
      y = static_cast<float>(args.accumulate ? y + sum : sum);
    }
  }
}

void linear_backward(const LinearBackwardArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t columns = args.w.shape[0];
  const float* dy = args.dy.f32();
  for (std::int64_t i = 0; args.dx.data != nullptr && i < rows * depth; ++i) {
    double sum = args.accumulate_dx ? args.dx.f32()[i] : 0;
    for (std::int64_t n = 0; n < columns; ++n) {
      sum += static_cast<double>(dy[i / depth * columns + n]) * args.w.f32()[n * depth + i % depth];
    }
    args.dx.f32()[i] = static_cast<float>(sum);
  }
  for (std::int64_t i = 0; args.dw.data != nullptr && i < columns * depth; ++i) {
    double sum = args.dw.begins ? 0 : args.dw.f32()[i];
    for (std::int64_t t = 0; t < rows; ++t) {
      sum += static_cast<double>(dy[t * columns + i / depth]) * args.x.f32()[t * depth + i % depth];
    }
    args.dw.f32()[i] = static_cast<float>(sum);
  }
  for (std::int64_t n = 0; args.dbias.data != nullptr && n < columns; ++n) {
    double sum = args.dbias.f32()[n];
    for (std::int64_t t = 0; t < rows; ++t) sum += dy[t * columns + n];
    args.dbias.f32()[n] = static_cast<float>(sum);
  }
}

}  // namespace deltafox::reference
