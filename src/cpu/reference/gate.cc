#include "ops/gate.h"

namespace deltafox::reference {

void gate(const GateArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    args.x.f32()[i] *= activate(args.activation, args.gate.f32()[i]);
  }
}

void gate_backward(const GateBackwardArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    const double dy = args.dy.f32()[i];
    const float gate = args.gate.f32()[i];
    args.dgate.f32()[i] =
        static_cast<float>(dy * args.x.f32()[i] * activation_slope(args.activation, gate));
    args.dx.f32()[i] = static_cast<float>(dy * activate(args.activation, gate));
  }
}

}  // namespace deltafox::reference
