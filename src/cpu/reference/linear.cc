#include "ops/linear.h"

#include "core/float_convert.h"

namespace deltafox::reference {

void linear(const LinearArgs& args) {
  const std::int64_t rows = args.x.shape[0];
  const std::int64_t depth = args.w.shape[1];
  const std::int64_t columns = args.w.shape[0];
  for (std::int64_t t = 0; t < rows; ++t) {
    for (std::int64_t n = 0; n < columns; ++n) {
      double sum = 0;
      for (std::int64_t k = 0; k < depth; ++k) {
        sum += static_cast<double>(args.x.f32()[t * depth + k]) * load_f32(args.w, n * depth + k);
      }
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
    double sum = args.dw.f32()[i];
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
