// What stands at an op's entrance: the clock, and checks of shapes and dtypes.
#pragma once

#include <string_view>

#include "core/context.h"
#include "core/error.h"
#include "core/op_times.h"  // IWYU pragma: export
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

// Of F32 or of the Context's activation dtype.
inline void check_activation(const Context& ctx, std::string_view op, std::string_view name,
                             const ConstTensorView& view, const Shape& shape) {
  check(op, name, view, shape,
        view.dtype == ctx.activation_dtype() ? ctx.activation_dtype() : DType::kF32);
}

[[noreturn]] inline void fail_on_cuda(std::string_view op) {
  fail("{}: runs on the CPU only", op);
}

}  // namespace deltafox::ops
