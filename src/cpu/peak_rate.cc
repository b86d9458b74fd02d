// Loops of independent multiply-adds in registers, as many at a time as hide their latency. What
// the numbers are does not matter, so long as they stay finite.
#include "ops/peak_rate.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <chrono>
#include <cstdint>

#include "cpu/amx.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

namespace deltafox::cpu {
namespace {

using Clock = std::chrono::steady_clock;

struct Kernel {
  std::string_view dtype;
  std::string_view instruction;
  bool available;
  void (*run)(std::int64_t rounds);
  double operations;  // of a round
};

#if defined(__x86_64__)

// A dozen sums cover the latency on two ports, and fit the 16 registers of AVX2. They stay in
// registers 0 to 11 from round to round, whatever was in them at first.
constexpr int kSums = 12;
#define DELTAFOX_FOR_EACH_SUM(instruction) \
  ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11\n" instruction "\n.endr"
#define DELTAFOX_SUMS \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"
// NOLINTBEGIN(hicpp-no-assembler)

// What every x86-64 has: two instructions for a multiplication and an addition.
void multiply_add_128(std::int64_t rounds) {
  const __m128 half = _mm_set1_ps(0.5F);
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile(DELTAFOX_FOR_EACH_SUM("mulps %0, %%xmm\\r\naddps %0, %%xmm\\r")
                 :
                 : "x"(half)
                 : DELTAFOX_SUMS);
  }
}

__attribute__((target("avx2,fma"))) void fma_256(std::int64_t rounds) {
  const __m256 half = _mm256_set1_ps(0.5F);
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile(DELTAFOX_FOR_EACH_SUM("vfmadd213ps %0, %0, %%ymm\\r")
                 :
                 : "x"(half)
                 : DELTAFOX_SUMS);
  }
}

__attribute__((target("avx512f"))) void fma_512(std::int64_t rounds) {
  const __m512 half = _mm512_set1_ps(0.5F);
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile(DELTAFOX_FOR_EACH_SUM("vfmadd213ps %0, %0, %%zmm\\r")
                 :
                 : "v"(half)
                 : DELTAFOX_SUMS);
  }
}

__attribute__((target("avx512f"))) void dot_bf16(std::int64_t rounds) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile(DELTAFOX_FOR_EACH_SUM("vdpbf16ps %0, %0, %%zmm\\r") : : "v"(ones) : DELTAFOX_SUMS);
  }
}

__attribute__((target("avx512f"))) void dot_int8(std::int64_t rounds) {
  const __m512i ones = _mm512_set1_epi32(0x01010101);
  for (std::int64_t i = 0; i < rounds; ++i) {
    asm volatile(DELTAFOX_FOR_EACH_SUM("vpdpbusd %0, %0, %%zmm\\r") : : "v"(ones) : DELTAFOX_SUMS);
  }
}

// NOLINTEND(hicpp-no-assembler)
#undef DELTAFOX_FOR_EACH_SUM
#undef DELTAFOX_SUMS

// Tiles 0 to 3 are sums, 4 and 5 rows of one factor, 6 and 7 columns of the other, all of 16 rows
// of 64 bytes.
__attribute__((target("amx-tile"))) void clear_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  load_tiles(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

__attribute__((target("amx-tile,amx-bf16"))) void tiles_bf16(std::int64_t rounds) {
  clear_tiles();
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-int8"))) void tiles_int8(std::int64_t rounds) {
  clear_tiles();
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}

std::array<Kernel, 7> kernels() {
  const Isa& cpu = isa();
  constexpr double kTileBf16 = 4.0 * 16 * 16 * 32 * 2;
  constexpr double kTileInt8 = 4.0 * 16 * 16 * 64 * 2;
  return {Kernel{"float32", "mulps, addps", true, multiply_add_128, kSums * 8.0},
          Kernel{"float32", "vfmadd (256 bits)", cpu.avx2, fma_256, kSums * 16.0},
          Kernel{"float32", "vfmadd (512 bits)", cpu.avx512, fma_512, kSums * 32.0},
          Kernel{"bfloat16", "vdpbf16ps", cpu.avx512_bf16, dot_bf16, kSums * 64.0},
          Kernel{"bfloat16", "tdpbf16ps", cpu.amx_bf16, tiles_bf16, kTileBf16},
          Kernel{"int8", "vpdpbusd", cpu.avx512_vnni, dot_int8, kSums * 128.0},
          Kernel{"int8", "tdpbusd", cpu.amx_int8, tiles_int8, kTileInt8}};
}

#else

std::array<Kernel, 0> kernels() {
  return {};
}

#endif

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// In tasks of a millisecond, `tasks_per_thread` of them: with many, a thread that comes late costs
// little.
std::vector<double> measure(ThreadPool& threads, const Kernel& kernel, int passes,
                            std::int64_t tasks_per_thread) {
  constexpr double kTaskSeconds = 1e-3;
  constexpr std::int64_t kTrial = 20000;
  kernel.run(kTrial);  // wakes the units
  const auto trial = Clock::now();
  kernel.run(kTrial);
  const auto rounds = 1 + static_cast<std::int64_t>(kTrial * kTaskSeconds / seconds_since(trial));
  const std::int64_t tasks = tasks_per_thread * threads.size();
  std::vector<double> rates;
  for (int pass = 0; pass < passes; ++pass) {
    const auto begin = Clock::now();
    threads.parallel_for(tasks, [&](std::int64_t) { kernel.run(rounds); });
    rates.push_back(kernel.operations * static_cast<double>(rounds * tasks) / seconds_since(begin));
  }
  return rates;
}

}  // namespace

std::vector<std::string_view> instruction_sets() {
  const Isa& cpu = isa();
  std::vector<std::string_view> names;
  const auto add = [&](bool available, std::string_view name) {
    if (available) names.push_back(name);
  };
  add(cpu.avx2, "avx2");
  add(cpu.avx512, "avx512");
  add(cpu.avx512_bf16, "avx512_bf16");
  add(cpu.avx512_vnni, "avx512_vnni");
  add(cpu.amx_bf16, "amx_bf16");
  add(cpu.amx_int8, "amx_int8");
  return names;
}

std::vector<PeakRate> measure_peak_rates(ThreadPool& threads, int passes) {
  constexpr std::int64_t kTasks = 48;
  assert(passes >= 1);
  std::vector<PeakRate> peaks;
  for (const Kernel& kernel : kernels()) {
    peaks.push_back(
        {kernel.dtype, kernel.instruction,
         kernel.available ? measure(threads, kernel, passes, kTasks) : std::vector<double>{}});
  }
  return peaks;
}

double measure_peak(ThreadPool& threads, DType dtype) {
  const std::string_view wanted = dtype == DType::kBF16 ? "bfloat16" : "float32";
  constexpr int kPasses = 3;
  constexpr std::int64_t kTasks = 4;
  double best = 0;
  for (const Kernel& kernel : kernels()) {
    if (kernel.dtype != wanted || !kernel.available) continue;
    for (const double rate : measure(threads, kernel, kPasses, kTasks)) best = std::max(best, rate);
  }
  return best;
}

}  // namespace deltafox::cpu
