// Products with the matrices of a 760M model on a CPU, y = x wᵀ by themselves: how near they come
// to the peak of the machine's arithmetic, with weights that are in the caches, a matrix again and
// again, and with weights from memory, as in a model, where each is another matrix. Prints JSON:
// milliseconds of a product (medians), operations a second as a share of the peak of the dtype's
// fastest instruction, measured before, and bytes of weights a second.
//
//   bench_products [TOKENS [THREADS [RUNS [DTYPE]]]]
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "core/context.h"
#include "core/float_convert.h"
#include "core/quantized.h"
#include "ops/linear.h"
#include "ops/peak_rate.h"
#include "ops/quantize.h"
#include "ops/tile_order.h"

namespace deltafox {
namespace {

using nlohmann::ordered_json;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Tensor random_matrix(const Shape& shape) {
  Tensor w(DType::kF32, shape);
  std::mt19937 random(0);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  for (std::int64_t i = 0; i < shape.size(); ++i) w.f32()[i] = normal(random);
  return w;
}

// w [N, K] F32 as a matrix of another dtype.
Tensor converted(Context& ctx, const Tensor& w, DType dtype) {
  const Shape shape = w.view().shape;
  Tensor to(dtype, shape);
  if (is_packed(dtype)) {
    ops::quantize(ctx, {.w = w.view(), .packed = to.view()});
  } else if (dtype == DType::kBF16Tiles) {
    const TensorView rows{to.view().data, DType::kBF16, shape};
    convert(w.view(), rows);
    ops::arrange_in_tiles(ctx, rows);
  } else {
    convert(w.view(), to.view());
  }
  return to;
}

struct Case {
  std::string_view name;
  Shape shape;  // [N, K], or [2N, K] of a gated unit
  bool gated;
};

// Seconds of a product, one for each run: by all copies of the matrix in turn.
std::vector<double> times(Context& ctx, const Case& which, const std::vector<Tensor>& copies,
                          std::int64_t tokens, int runs) {
  const std::int64_t rows = which.shape[0] / (which.gated ? 2 : 1);
  Tensor x(DType::kF32, {tokens, which.shape[1]});
  Tensor y(DType::kF32, {tokens, rows});
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < tokens * which.shape[1]; ++i) x.f32()[i] = normal(random);
  std::vector<double> seconds;
  for (int run = -1; run < runs; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    for (const Tensor& w : copies) {
      if (which.gated) {
        ops::linear_glu(ctx, {.x = x.view(), .w = w.view(), .y = y.view()});
      } else {
        ops::linear(ctx, {.x = x.view(), .w = w.view(), .y = y.view()});
      }
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    if (run >= 0) seconds.push_back(time.count() / static_cast<double>(copies.size()));
  }
  return seconds;
}

double peak(ThreadPool& threads, std::string_view dtype) {
  double best = 0;
  for (const cpu::PeakRate& rate : cpu::measure_peak_rates(threads, 3)) {
    if (rate.dtype == dtype && !rate.rates.empty()) best = std::max(best, median(rate.rates));
  }
  return best;
}

int argument(int argc, char** argv, int i, int otherwise) {
  int value = otherwise;
  if (argc > i) std::from_chars(argv[i], argv[i] + std::strlen(argv[i]), value);
  return value;
}

int run(int argc, char** argv) {
  constexpr std::size_t kMemoryBytes = std::size_t{512} << 20;  // more than caches keep
  const std::int64_t tokens = argument(argc, argv, 1, 512);
  const int runs = argument(argc, argv, 3, 7);
  ThreadPool threads(argument(argc, argv, 2, 0));
  Context ctx(threads);
  const Case cases[] = {{"attention", {1536, 1536}, false},
                        {"gate, up", {8192, 1536}, true},
                        {"down", {1536, 4096}, false}};
  const std::pair<std::string_view, DType> dtypes[] = {{"float32", DType::kF32},
                                                       {"bfloat16", DType::kBF16},
                                                       {"bfloat16 in tiles", DType::kBF16Tiles},
                                                       {"int8", DType::kQ8},
                                                       {"int4", DType::kQ4}};
  ordered_json report{{"tokens", tokens}, {"threads", threads.size()}};
  for (const auto& [name, dtype] : dtypes) {
    const bool tiles = dtype == DType::kBF16Tiles;
    if (argc > 4 && name != argv[4]) continue;
    if (tiles && !ops::prefers_tiles(ctx, cases[0].shape)) continue;
    const double limit = peak(threads, is_packed(dtype)       ? "int8"
                                       : dtype == DType::kF32 ? "float32"
                                                              : "bfloat16");
    for (const Case& which : cases) {
      const Tensor matrix = random_matrix(which.shape);
      std::vector<Tensor> copies(1, converted(ctx, matrix, dtype));
      ordered_json row{{"dtype", name}, {"matrix", which.name}};
      const double operations = 2.0 * static_cast<double>(which.shape.size() * tokens);
      for (const std::string_view from : {"caches", "memory"}) {
        if (from == "memory") {
          copies.resize(kMemoryBytes / copies[0].bytes() + 1, copies[0]);
        }
        const double seconds = median(times(ctx, which, copies, tokens, runs));
        row[fmt::format("ms, weights in {}", from)] = seconds * 1e3;
        row[fmt::format("share of the peak, {}", from)] = operations / seconds / limit;
        row[fmt::format("GB/s of weights, {}", from)] =
            static_cast<double>(copies[0].bytes()) / seconds / 1e9;
      }
      report["products"].push_back(row);
      fmt::print(stderr, "{}\n", row.dump());
    }
  }
  fmt::print("{}\n", report.dump(2));
  return 0;
}

}  // namespace
}  // namespace deltafox

int main(int argc, char** argv) {
  return deltafox::run(argc, argv);
}
