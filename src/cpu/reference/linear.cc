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

}  // namespace deltafox::reference
