// What holds products on AMX when operands do not lie in registers: loops of loads and products
// alone, which decide nothing and add to nothing, so that no kernel can be faster that reads what
// they read. Prints JSON, medians of the runs, all threads of the machine at a time.
//
//   steps    nanoseconds of a step of a pair of tiles by a pair, four loads and four products, by
//            where the operands come from; the share of the peak that this is
//   squares  nanoseconds of 32 tokens by 32 rows by 256 columns of int8, four such steps, whose
//            integers are stored, scaled and added to float32 sums
//   streams  GB/s of a bfloat16 matrix that is multiplied with a token and comes from memory, in
//            rows and in the order of tiles, beside reading alone
//
//   bench_amx [RUNS]
#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <nlohmann/json.hpp>

#if defined(__x86_64__)
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "core/buffer.h"
#include "core/read_bandwidth.h"
#include "core/thread_pool.h"
#include "cpu/amx.h"
#include "cpu/intrinsics.h"
#include "cpu/isa.h"

#define DELTAFOX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8,amx-bf16")))

namespace deltafox {
namespace {

constexpr std::int64_t kTile = 1024;  // bytes
constexpr std::int64_t kPairOfTiles = 2 * kTile;

DELTAFOX_TARGET void configure() {
  cpu::TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, 16, 64);
  cpu::load_tiles(config);
}

// A pair of tiles by a pair. Of two products in a row one operand is the same.
DELTAFOX_TARGET inline void step(const std::byte* x, const std::byte* w) {
  _tile_loadd(4, x, 64);
  _tile_loadd(6, w, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(5, x + kTile, 64);
  _tile_dpbssd(2, 5, 6);
  _tile_loadd(7, w + kTile, 64);
  _tile_dpbssd(3, 5, 7);
  _tile_dpbssd(1, 4, 7);
}

// Steps by operands of so many bytes each, over and over.
DELTAFOX_TARGET void steps(const std::byte* x, std::int64_t x_bytes, const std::byte* w,
                           std::int64_t w_bytes, std::int64_t count) {
  configure();
  std::int64_t x_at = 0;
  std::int64_t w_at = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    step(x + x_at, w + w_at);
    x_at = x_at + kPairOfTiles == x_bytes ? 0 : x_at + kPairOfTiles;
    w_at = w_at + kPairOfTiles == w_bytes ? 0 : w_at + kPairOfTiles;
  }
  _tile_release();
}

// Of operands that are loaded once.
DELTAFOX_TARGET void products(const std::byte* x, std::int64_t count) {
  configure();
  step(x, x + kPairOfTiles);
  for (std::int64_t i = 0; i < count; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    _tile_dpbssd(1, 4, 7);
  }
  _tile_release();
}

constexpr std::int64_t kSquareBytes = 4 * kPairOfTiles;  // of each operand

// Squares of four steps. kAdds: between the steps the integers of the square before are scaled and
// added to the sums [32, 32] of that square.
template <bool kAdds>
DELTAFOX_TARGET void squares(const std::byte* x, std::int64_t x_bytes, const std::byte* w,
                             std::int64_t w_bytes, float* sums, std::int64_t count_of_sums,
                             std::int64_t count) {
  alignas(64) static thread_local std::int32_t integers[4][256];
  configure();
  const __m512 scale_of_w = _mm512_set1_ps(0.5F);
  float scales_of_x[32];
  std::fill_n(scales_of_x, 32, 0.25F);
  cpu::finish_stores();
  std::int64_t x_at = 0;
  std::int64_t w_at = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    float* to = sums + i % count_of_sums * 1024;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < 4; ++k) {
      step(x + x_at + k * kPairOfTiles, w + w_at + k * kPairOfTiles);
      if constexpr (!kAdds) continue;
#pragma GCC unroll 8
      for (std::int64_t t = 8 * k; t < 8 * k + 8; ++t) {
        const __m512 scale = _mm512_mul_ps(scale_of_w, _mm512_set1_ps(scales_of_x[t]));
#pragma GCC unroll 2
        for (std::int64_t p = 0; p < 2; ++p) {
          const __m512i exact = _mm512_load_si512(integers[t / 16 * 2 + p] + t % 16 * 16);
          float* sum = to + t * 32 + p * 16;
          _mm512_store_ps(sum,
                          _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, _mm512_load_ps(sum)));
        }
      }
    }
    _tile_stored(0, integers[0], 64);
    _tile_stored(1, integers[1], 64);
    _tile_stored(2, integers[2], 64);
    _tile_stored(3, integers[3], 64);
    x_at = x_at + kSquareBytes == x_bytes ? 0 : x_at + kSquareBytes;
    if (x_at == 0) w_at = w_at + kSquareBytes == w_bytes ? 0 : w_at + kSquareBytes;
  }
  _tile_release();
}

constexpr std::int64_t kColumns = 1536;           // of a bfloat16 matrix
constexpr std::int64_t kRowBytes = 2 * kColumns;  // a tile has 64 bytes of sixteen rows
constexpr std::int64_t kBand = 16 * kRowBytes;    // sixteen rows
constexpr std::int64_t kSteps = kRowBytes / 64;

enum class Order : std::uint8_t { kRows, kRowsFetched, kTiles };

// A tile in the order of memory.
DELTAFOX_TARGET inline void fetch(const std::byte* from) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kTile; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
  }
}

// Bands of a matrix by one token, x [kSteps] tiles of a column; two bands at a time in the order of
// tiles.
DELTAFOX_TARGET void stream(const std::byte* w, std::int64_t bands, const std::byte* x,
                            Order order) {
  cpu::TileConfig config;
  for (const int tile : {0, 2, 6}) config.set(tile, 16, 4);
  for (const int tile : {4, 5}) config.set(tile, 16, 64);
  cpu::load_tiles(config);
  const bool tiles = order == Order::kTiles;
  const std::int64_t at_a_time = tiles ? 2 : 1;
  constexpr std::int64_t kAhead = 768;
  for (std::int64_t band = 0; band + at_a_time <= bands; band += at_a_time) {
    const std::byte* at = w + band * kBand;
    for (std::int64_t k = 0; k < kSteps; ++k) {
      _tile_loadd(6, x + k * kTile, 64);
      if (tiles) {
        _tile_loadd(4, at + k * kTile, 64);
        _tile_loadd(5, at + kBand + k * kTile, 64);
        fetch(at + k * kTile + kAhead);
        fetch(at + kBand + k * kTile + kAhead);
        _tile_dpbf16ps(2, 5, 6);
      } else {
        _tile_loadd(4, at + k * 64, kRowBytes);
        if (order == Order::kRowsFetched) {
          for (std::int64_t line = 0; line < 16; ++line) {
            const std::byte* next = at + kBand + (k * 16 + line) * 64;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
          }
        }
      }
      _tile_dpbf16ps(0, 4, 6);
    }
  }
  _tile_release();
}

class Bench {
 public:
  explicit Bench(int runs) : runs_(runs) {}

  nlohmann::ordered_json report() {
    using Json = nlohmann::ordered_json;
    constexpr std::int64_t kCount = 1 << 15;
    constexpr std::int64_t kSmall = 8 << 10;    // stays in the first-level cache
    constexpr std::int64_t kLarge = 512 << 10;  // in the second-level one
    const double peak = seconds([](std::byte* memory) { products(memory, kCount); }) / kCount * 1e9;
    Json steps_of{{"registers", Json{{"ns", peak}, {"share of the peak", 1.0}}}};
    const auto add_steps = [&](const char* name, std::int64_t x_bytes, std::int64_t w_bytes) {
      const double ns = seconds([&](std::byte* memory) {
                          steps(memory, x_bytes, memory + kLarge, w_bytes, kCount);
                        }) /
                        kCount * 1e9;
      steps_of[name] = {{"ns", ns}, {"share of the peak", peak / ns}};
    };
    add_steps("both operands in the first-level cache", kSmall, kSmall);
    add_steps("one in the second-level cache", kLarge, kSmall);
    add_steps("both in the second-level cache", kLarge, kLarge);
    Json squares_of;
    const auto add_squares = [&](const char* name, auto adds, std::int64_t x_bytes,
                                 std::int64_t w_bytes, std::int64_t count_of_sums) {
      constexpr std::int64_t kSquares = kCount / 4;
      const double ns = seconds([&](std::byte* memory) {
                          auto* sums = reinterpret_cast<float*>(memory + 2 * kLarge);
                          squares<decltype(adds)::value>(memory, x_bytes, memory + kLarge, w_bytes,
                                                         sums, count_of_sums, kSquares);
                        }) /
                        kSquares * 1e9;
      squares_of[name] = {{"ns", ns}, {"share of the peak", 4 * peak / ns}};
    };
    add_squares("not added, operands in the first-level cache", std::false_type(), kSmall, kSmall,
                1);
    add_squares("added, operands and sums in the first-level cache", std::true_type(), kSmall,
                kSmall, 1);
    add_squares("not added, tokens in the second-level cache", std::false_type(), kLarge, kSmall,
                1);
    add_squares("added, tokens and sums in the second-level cache", std::true_type(), kLarge,
                kLarge, 16);
    Json streams;
    constexpr std::int64_t kBands = kMatrix / kBand;
    const auto add_stream = [&](const char* name, const std::function<void(std::byte*)>& task) {
      streams[name] = static_cast<double>(threads_.size() * kBands * kBand) / seconds(task) / 1e9;
    };
    std::vector<double> reading = ReadBandwidth().measure(threads_, runs_);
    streams["read"] = median(reading) / 1e9;
    for (const auto& [name, order] : {std::pair{"rows", Order::kRows},
                                      std::pair{"rows, the next ones fetched", Order::kRowsFetched},
                                      std::pair{"tiles", Order::kTiles}}) {
      add_stream(name, [&, order = order](std::byte* memory) {
        stream(memory + kCaches, kBands, memory, order);
      });
    }
    return {{"threads", threads_.size()},
            {"steps", steps_of},
            {"squares of int8", squares_of},
            {"streams, GB/s", streams}};
  }

 private:
  static constexpr std::int64_t kCaches = 2 << 20;
  static constexpr std::int64_t kMatrix = 256 << 20;  // of each thread: more than caches keep

  // Of a task that each thread does once, in its own memory: the median.
  double seconds(const std::function<void(std::byte*)>& task) {
    std::vector<double> times;
    for (int run = -1; run < runs_; ++run) {
      const auto begin = std::chrono::steady_clock::now();
      threads_.parallel_for(threads_.size(), [&](std::int64_t thread) {
        task(memory_.data() + thread * (kCaches + kMatrix));
      });
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
      if (run >= 0) times.push_back(time.count());
    }
    return median(times);
  }

  static double median(std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  }

  int runs_;
  ThreadPool threads_{0};
  Buffer memory_ = random(threads_.size() * (kCaches + kMatrix) + kBand);

  // The processor takes longer for numbers that differ than for zeros. Sums in it are finite.
  static Buffer random(std::int64_t bytes) {
    Buffer memory(static_cast<std::size_t>(bytes));
    std::mt19937 bits(0);
    for (std::size_t i = 0; i + 4 <= memory.size(); i += 4) {
      const auto four = static_cast<std::uint32_t>(bits() & 0xbfffbfffU);  // bfloat16 below 2
      std::memcpy(memory.data() + i, &four, sizeof four);
    }
    return memory;
  }
};

}  // namespace
}  // namespace deltafox
#endif

int main(int argc, char** argv) {
#if defined(__x86_64__)
  const deltafox::cpu::Isa& isa = deltafox::cpu::isa();
  if (isa.amx_int8 && isa.amx_bf16) {
    int runs = 9;
    if (argc > 1) std::from_chars(argv[1], argv[1] + std::strlen(argv[1]), runs);
    fmt::print("{}\n", deltafox::Bench(runs).report().dump(2));
    return 0;
  }
#endif
  fmt::print(stderr, "bench_amx: this processor has no AMX\n");
  return 2;
}
