// Linked where the CUDA back end is not built: whoever asks for a GPU gets one clear line.
#include "core/device_clock.h"
#include "core/error.h"
#include "ops/activation.h"
#include "ops/adamw.h"
#include "ops/attention_step.h"
#include "ops/choose_token.h"
#include "ops/cross_entropy.h"
#include "ops/delta_mixer.h"
#include "ops/delta_rule.h"
#include "ops/embedding.h"
#include "ops/forgetting_attention.h"
#include "ops/gate.h"
#include "ops/gla.h"
#include "ops/kv_append.h"
#include "ops/linear.h"
#include "ops/log_sigmoid.h"
#include "ops/quantize.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/selective_scan.h"
#include "ops/short_conv.h"
#include "ops/ssd.h"
#include "ops/step.h"
#include "ops/token_shift.h"

namespace deltafox::cuda {
namespace {

[[noreturn]] void fail_without_cuda() {
  fail("this build has no CUDA back end");
}

}  // namespace

std::shared_ptr<Stream> make_stream() {
  fail_without_cuda();
}
void synchronize(Stream& /*stream*/) {
  fail_without_cuda();
}
double seconds_of(Stream& /*stream*/, const std::function<void()>& /*work*/) {
  fail_without_cuda();
}
void* allocate(std::size_t /*bytes*/) {
  fail_without_cuda();
}
void release(void* /*memory*/, std::size_t /*bytes*/) noexcept {}
void copy(void* /*to*/, const void* /*from*/, std::size_t /*bytes*/) {
  fail_without_cuda();
}
void copy(Stream& /*stream*/, void* /*to*/, const void* /*from*/, std::size_t /*bytes*/) {
  fail_without_cuda();
}
void zero(Stream& /*stream*/, void* /*memory*/, std::size_t /*bytes*/) {
  fail_without_cuda();
}
std::size_t memory_in_use() {
  fail_without_cuda();
}
std::shared_ptr<GrowingMemory> make_growing_memory() {
  fail_without_cuda();
}
std::byte* grow(GrowingMemory& /*memory*/, std::size_t /*bytes*/) {
  fail_without_cuda();
}

void upload(ThreadPool& /*threads*/, std::span<const Piece> /*pieces*/) {
  fail_without_cuda();
}
std::shared_ptr<Graph> record(Stream& /*stream*/, const std::function<void()>& /*work*/) {
  fail_without_cuda();
}
void run(Stream& /*stream*/, Graph& /*graph*/) {
  fail_without_cuda();
}
std::shared_ptr<void> allocate_shared(std::size_t /*bytes*/) {
  fail_without_cuda();
}

void activation(Context& /*ctx*/, const ActivationArgs& /*args*/) {
  fail_without_cuda();
}
void glu(Context& /*ctx*/, const GluArgs& /*args*/) {
  fail_without_cuda();
}
void forget_gate(Context& /*ctx*/, const ForgetGateArgs& /*args*/) {
  fail_without_cuda();
}
void feature_map(Context& /*ctx*/, const FeatureMapArgs& /*args*/) {
  fail_without_cuda();
}
void activation_backward(Context& /*ctx*/, const ActivationBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void forget_gate_backward(Context& /*ctx*/, const ForgetGateBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void feature_map_backward(Context& /*ctx*/, const FeatureMapBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void glu_backward(Context& /*ctx*/, const GluBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void adamw(Context& /*ctx*/, const AdamWArgs& /*args*/) {
  fail_without_cuda();
}
void adamw_step(Context& /*ctx*/, const AdamWStepArgs& /*args*/) {
  fail_without_cuda();
}
double sum_of_squares(Context& /*ctx*/, const ConstTensorView& /*x*/) {
  fail_without_cuda();
}
void attention_step(Context& /*ctx*/, const AttentionStepArgs& /*args*/) {
  fail_without_cuda();
}
void choose_token(Context& /*ctx*/, const ChooseTokenArgs& /*args*/) {
  fail_without_cuda();
}
void cross_entropy(Context& /*ctx*/, const CrossEntropyArgs& /*args*/) {
  fail_without_cuda();
}
void cross_entropy_backward(Context& /*ctx*/, const CrossEntropyBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void delta_inputs(Context& /*ctx*/, const DeltaInputsArgs& /*args*/) {
  fail_without_cuda();
}
void delta_inputs_backward(Context& /*ctx*/, const DeltaInputsBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void delta_token(Context& /*ctx*/, const DeltaTokenArgs& /*args*/) {
  fail_without_cuda();
}
void delta_rule(Context& /*ctx*/, const DeltaRuleArgs& /*args*/) {
  fail_without_cuda();
}
void delta_rule_backward(Context& /*ctx*/, const DeltaRuleBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void embedding(Context& /*ctx*/, const EmbeddingArgs& /*args*/) {
  fail_without_cuda();
}
void embedding_backward(Context& /*ctx*/, const EmbeddingBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void forgetting_attention(Context& /*ctx*/, const ForgettingAttentionArgs& /*args*/) {
  fail_without_cuda();
}
void forgetting_attention_backward(Context& /*ctx*/,
                                   const ForgettingAttentionBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void gate(Context& /*ctx*/, const GateArgs& /*args*/) {
  fail_without_cuda();
}
void gate_backward(Context& /*ctx*/, const GateBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void gla(Context& /*ctx*/, const GlaArgs& /*args*/) {
  fail_without_cuda();
}
void gla_step(Context& /*ctx*/, const GlaStepArgs& /*args*/) {
  fail_without_cuda();
}
void gla_backward(Context& /*ctx*/, const GlaBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void kv_append(Context& /*ctx*/, const KvAppendArgs& /*args*/) {
  fail_without_cuda();
}
void arrange_packed(Context& /*ctx*/, const TensorView& /*packed*/) {
  fail_without_cuda();
}
void linear(Context& /*ctx*/, const LinearArgs& /*args*/) {
  fail_without_cuda();
}
bool linear_glu(Context& /*ctx*/, const LinearGluArgs& /*args*/) {
  fail_without_cuda();
}
void linear_backward(Context& /*ctx*/, const LinearBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void log_sigmoid(Context& /*ctx*/, const LogSigmoidArgs& /*args*/) {
  fail_without_cuda();
}
void log_sigmoid_backward(Context& /*ctx*/, const LogSigmoidBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void rms_norm(Context& /*ctx*/, const RmsNormArgs& /*args*/) {
  fail_without_cuda();
}
void rms_norm_backward(Context& /*ctx*/, const RmsNormBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void rope(Context& /*ctx*/, const RopeArgs& /*args*/) {
  fail_without_cuda();
}
void rope_backward(Context& /*ctx*/, const RopeBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void selective_scan(Context& /*ctx*/, const SelectiveScanArgs& /*args*/) {
  fail_without_cuda();
}
void selective_scan_backward(Context& /*ctx*/, const SelectiveScanBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void short_conv(Context& /*ctx*/, const ShortConvArgs& /*args*/) {
  fail_without_cuda();
}
void short_conv_backward(Context& /*ctx*/, const ShortConvBackwardArgs& /*args*/) {
  fail_without_cuda();
}
bool short_conv_backward_has_norm(const ShortConvBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void ssd(Context& /*ctx*/, const SsdArgs& /*args*/) {
  fail_without_cuda();
}
void ssd_step(Context& /*ctx*/, const SsdStepArgs& /*args*/) {
  fail_without_cuda();
}
void ssd_backward(Context& /*ctx*/, const SsdBackwardArgs& /*args*/) {
  fail_without_cuda();
}
void token_shift(Context& /*ctx*/, const TokenShiftArgs& /*args*/) {
  fail_without_cuda();
}
void token_shift_backward(Context& /*ctx*/, const TokenShiftBackwardArgs& /*args*/) {
  fail_without_cuda();
}

void step_linear(Context& /*ctx*/, const StepLinearArgs& /*args*/) {
  fail_without_cuda();
}
void delta_rule_step(Context& /*ctx*/, const DeltaRuleStepArgs& /*args*/) {
  fail_without_cuda();
}
bool begin_step_program(Context& /*ctx*/) {
  fail_without_cuda();
}
void run_step_program(Context& /*ctx*/) {
  fail_without_cuda();
}
void end_step_program(Context& /*ctx*/) {
  fail_without_cuda();
}

}  // namespace deltafox::cuda
