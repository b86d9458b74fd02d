#include "ops/gate.h"

namespace deltafox::reference {

void gate(const GateArgs& args) {
  for (std::int64_t i = 0; i < args.x.shape.size(); ++i) {
    args.x.f32()[i] *= activate(args.activation, args.gate.f32()[i]);
  }
}

}  // namespace deltafox::reference
