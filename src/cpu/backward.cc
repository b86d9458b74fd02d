// Backward on the plain versions until each has its fast one.
#include "ops/activation.h"
#include "ops/cross_entropy.h"
#include "ops/delta_rule.h"
#include "ops/embedding.h"
#include "ops/forgetting_attention.h"
#include "ops/gate.h"
#include "ops/gla.h"
#include "ops/linear.h"
#include "ops/log_sigmoid.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/selective_scan.h"
#include "ops/short_conv.h"
#include "ops/ssd.h"
#include "ops/token_shift.h"

namespace deltafox::cpu {
void linear_backward(Context& /*ctx*/, const LinearBackwardArgs& args) {
  reference::linear_backward(args);
}
void activation_backward(Context& /*ctx*/, const ActivationBackwardArgs& args) {
  reference::activation_backward(args);
}
void glu_backward(Context& /*ctx*/, const GluBackwardArgs& args) {
  reference::glu_backward(args);
}
void forget_gate_backward(Context& /*ctx*/, const ForgetGateBackwardArgs& args) {
  reference::forget_gate_backward(args);
}
void feature_map_backward(Context& /*ctx*/, const FeatureMapBackwardArgs& args) {
  reference::feature_map_backward(args);
}
void cross_entropy_backward(Context& /*ctx*/, const CrossEntropyBackwardArgs& args) {
  reference::cross_entropy_backward(args);
}
void embedding_backward(Context& /*ctx*/, const EmbeddingBackwardArgs& args) {
  reference::embedding_backward(args);
}
void gate_backward(Context& /*ctx*/, const GateBackwardArgs& args) {
  reference::gate_backward(args);
}
void log_sigmoid_backward(Context& /*ctx*/, const LogSigmoidBackwardArgs& args) {
  reference::log_sigmoid_backward(args);
}
void rms_norm_backward(Context& /*ctx*/, const RmsNormBackwardArgs& args) {
  reference::rms_norm_backward(args);
}
void rope_backward(Context& /*ctx*/, const RopeBackwardArgs& args) {
  reference::rope_backward(args);
}
void token_shift_backward(Context& /*ctx*/, const TokenShiftBackwardArgs& args) {
  reference::token_shift_backward(args);
}
void short_conv_backward(Context& /*ctx*/, const ShortConvBackwardArgs& args) {
  reference::short_conv_backward(args);
}
void delta_rule_backward(Context& /*ctx*/, const DeltaRuleBackwardArgs& args) {
  reference::delta_rule_backward(args);
}
void gla_backward(Context& /*ctx*/, const GlaBackwardArgs& args) {
  reference::gla_backward(args);
}
void ssd_backward(Context& /*ctx*/, const SsdBackwardArgs& args) {
  reference::ssd_backward(args);
}
void selective_scan_backward(Context& /*ctx*/, const SelectiveScanBackwardArgs& args) {
  reference::selective_scan_backward(args);
}
void forgetting_attention_backward(Context& /*ctx*/, const ForgettingAttentionBackwardArgs& args) {
  reference::forgetting_attention_backward(args);
}
}  // namespace deltafox::cpu
