// Shape and dtype checks at an op's entrance.
#pragma once

#include <string_view>

#include "core/error.h"
#include "core/tensor.h"

namespace deltafox::ops {

inline void check(std::string_view op, std::string_view name, const ConstTensorView& view,
                  const Shape& shape, DType dtype = DType::kF32) {
  if (view.shape != shape) {
    fail("{}: {} has shape {}, expected {}", op, name, to_string(view.shape), to_string(shape));
  }
  if (view.dtype != dtype) {
    fail("{}: {} has dtype {}, expected {}", op, name, name_of(view.dtype), name_of(dtype));
  }
}

}  // namespace deltafox::ops
