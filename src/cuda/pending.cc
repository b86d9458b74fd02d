// Ops whose kernels are under way on other branches. Whoever adds src/cuda/<op>.cu deletes its line
// here; the file goes with the last one.
#include "core/error.h"
#include "ops/cross_entropy.h"
#include "ops/forgetting_attention.h"
#include "ops/kv_append.h"
#include "ops/rope.h"
#include "ops/selective_scan.h"
#include "ops/token_shift.h"

namespace deltafox::cuda {
// clang-format off
void cross_entropy(Context&, const CrossEntropyArgs&) { fail("cross_entropy: no CUDA version yet"); }
void forgetting_attention(Context&, const ForgettingAttentionArgs&) { fail("forgetting_attention: no CUDA version yet"); }
void kv_append(Context&, const KvAppendArgs&) { fail("kv_append: no CUDA version yet"); }
void rope(Context&, const RopeArgs&) { fail("rope: no CUDA version yet"); }
void selective_scan(Context&, const SelectiveScanArgs&) { fail("selective_scan: no CUDA version yet"); }
void token_shift(Context&, const TokenShiftArgs&) { fail("token_shift: no CUDA version yet"); }
// clang-format on
}  // namespace deltafox::cuda
