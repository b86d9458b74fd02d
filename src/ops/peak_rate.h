// How fast this machine's cores multiply and add, to measure prefill against.
#pragma once

#include <string_view>
#include <vector>

#include "core/thread_pool.h"
#include "deltafox/dtype.h"

namespace deltafox::cpu {

// The instruction sets that kernels here can make use of, as isa() reports them: "avx2", "avx512",
// "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8".
std::vector<std::string_view> instruction_sets();

struct PeakRate {
  std::string_view dtype;        // "float32", "bfloat16", "int8"
  std::string_view instruction;  // "vdpbf16ps", ...
  // Operations per second of each pass, a multiplication and an addition being two. Empty where the
  // instruction is not available.
  std::vector<double> rates;
};

// Every known instruction, on all threads of the pool: registers only, no memory. passes >= 1.
std::vector<PeakRate> measure_peak_rates(ThreadPool& threads, int passes);

// Operations per second with F32 or BF16, the best of what takes some ten milliseconds an
// instruction: what model FLOPs utilisation is counted against. 0 where no instruction is known.
double measure_peak(ThreadPool& threads, DType dtype);

}  // namespace deltafox::cpu
