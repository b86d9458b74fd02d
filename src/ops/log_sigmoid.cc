#include "ops/log_sigmoid.h"

#include "ops/check.h"

namespace deltafox::ops {

void log_sigmoid(Context& ctx, const LogSigmoidArgs& args) {
  const OpTimer timer("log_sigmoid");
  if (args.x.data != nullptr) check("log_sigmoid", "x", args.x, args.y.shape);
  if (args.bias.data != nullptr) check("log_sigmoid", "bias", args.bias, {args.y.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::log_sigmoid(ctx, args);
    case Device::kCuda:
      return cuda::log_sigmoid(ctx, args);
  }
}

void log_sigmoid_backward(Context& ctx, const LogSigmoidBackwardArgs& args) {
  const OpTimer timer("log_sigmoid_backward");
  check("log_sigmoid_backward", "dy", args.dy, args.y.shape);
  if (args.dx.data != nullptr) check("log_sigmoid_backward", "dx", args.dx, args.y.shape);
  if (args.dbias.data != nullptr)
    check("log_sigmoid_backward", "dbias", args.dbias, {args.y.shape[1]});
  switch (ctx.device()) {
    case Device::kCpu:
      return cpu::log_sigmoid_backward(ctx, args);
    case Device::kCuda:
      return cuda::log_sigmoid_backward(ctx, args);
  }
}

}  // namespace deltafox::ops
