#include "model/init.h"

#include <cmath>
#include <filesystem>
#include <numbers>
#include <vector>

#include "core/error.h"
#include "core/float_convert.h"
#include "core/philox.h"
#include "core/thread_pool.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "model/registry.h"

namespace deltafox {
namespace {

namespace fs = std::filesystem;

// In (0, 1): the logarithm of a normal draw must exist.
double open_unit(std::uint32_t bits) {
  return (bits + 0.5) * 0x1p-32;
}

double time_step_bias(const Init& init, double draw) {
  const double low = std::log(init.value);
  const double dt = std::max(std::exp(low + draw * (std::log(init.max) - low)), init.floor);
  return dt + std::log(-std::expm1(-dt));
}

// Four draws for elements 4·block... of parameter `index`.
std::array<float, 4> draw(const Init& init, std::uint64_t seed, std::uint32_t index,
                          std::uint64_t block) {
  const PhiloxBlock bits = philox4x32_10(
      {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), index, 0},
      {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  std::array<float, 4> values{};
  for (std::size_t i = 0; i < 4; i += 2) {
    const double a = open_unit(bits[i]);
    const double b = open_unit(bits[i + 1]);
    if (init.kind == Init::Kind::kNormal) {  // Box and Muller
      const double radius = init.value * std::sqrt(-2 * std::log(a));
      values[i] = static_cast<float>(radius * std::cos(2 * std::numbers::pi * b));
      values[i + 1] = static_cast<float>(radius * std::sin(2 * std::numbers::pi * b));
    } else if (init.kind == Init::Kind::kUniform) {
      values[i] = static_cast<float>(init.value * (2 * a - 1));
      values[i + 1] = static_cast<float>(init.value * (2 * b - 1));
    } else {
      values[i] = static_cast<float>(time_step_bias(init, a));
      values[i + 1] = static_cast<float>(time_step_bias(init, b));
    }
  }
  return values;
}

bool is_random(const Init& init) {
  return init.kind == Init::Kind::kNormal || init.kind == Init::Kind::kUniform ||
         init.kind == Init::Kind::kTimeStepBias;
}

// Element i of a parameter that is initialised without chance.
double determined(const Param& param, std::int64_t i) {
  const Init& init = param.init;
  if (init.kind == Init::Kind::kLogIndex) {
    return std::log(1 + static_cast<double>(i % param.shape[param.shape.rank() - 1]));
  }
  if (init.kind == Init::Kind::kDecayTimes) {
    const double low = std::log(init.value);
    const double spacing = (std::log(init.max) - low) /
                           static_cast<double>(std::max<std::int64_t>(1, param.shape.size() - 1));
    const double time = std::exp(low + spacing * static_cast<double>(i));
    return -std::log(std::expm1(1 / time));
  }
  return init.value;
}

void write_config(const std::string& config_json, const fs::path& path) {
  // Text goes in before the last brace: Python's Infinity would not survive a JSON library.
  std::string text = config_json.substr(0, config_json.find_last_of('}'));
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  text += ",\n  \"deltafox_random_weights\": true\n}\n";
  io::AtomicFile file(path.string());
  file.append(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace

void initial_values(const Param& param, std::uint64_t seed, std::uint32_t index, std::int64_t begin,
                    std::span<float> to) {
  if (!is_random(param.init)) {
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i] = static_cast<float>(determined(param, begin + static_cast<std::int64_t>(i)));
    }
    return;
  }
  for (std::size_t i = 0; i < to.size(); i += 4) {
    const auto values = draw(param.init, seed, index, (static_cast<std::uint64_t>(begin) + i) / 4);
    std::copy_n(values.begin(), std::min<std::size_t>(4, to.size() - i),
                to.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void write_initialised(const std::string& config_json, const std::string& directory,
                       const InitOptions& options) {
  CausalLM model = build_model(io::JsonObject::parse(config_json, "config"));
  const io::NewDirectory made(directory);
  const fs::path config_path = fs::path(directory) / "config.json";
  const fs::path weights_path = fs::path(directory) / "model.safetensors";
  for (const fs::path& path : {config_path, weights_path}) {
    if (fs::exists(path)) fail("{}: exists already", path.string());
  }

  std::vector<io::TensorDeclaration> tensors;
  std::int64_t total = 0;
  model.visit_params([&](const std::string& name, Param& param) {
    tensors.push_back({name, options.dtype, param.shape});
    total += param.shape.size() * static_cast<std::int64_t>(size_of(options.dtype));
  });
  io::SafetensorsWriter writer(weights_path.string(), tensors, {{"format", "pt"}},
                               io::SafetensorsWriter::kCacheLine);
  ThreadPool threads(options.threads);
  constexpr std::int64_t kPiece = std::int64_t{1} << 16;  // elements a task
  constexpr std::int64_t kBatch = std::int64_t{1} << 22;  // elements in memory at a time
  Tensor values(DType::kF32, {kBatch});
  Tensor narrowed(options.dtype, {kBatch});
  std::int64_t done = 0;
  std::uint32_t index = 0;
  model.visit_params([&](const std::string& name, Param& param) {
    const std::int64_t size = param.shape.size();
    for (std::int64_t begin = 0; begin < size; begin += kBatch) {
      const std::int64_t count = std::min(kBatch, size - begin);
      threads.parallel_for((count + kPiece - 1) / kPiece, [&](std::int64_t task) {
        const std::int64_t at = task * kPiece;
        const std::int64_t piece = std::min(kPiece, count - at);
        initial_values(param, options.seed, index, begin + at,
                       {values.f32() + at, static_cast<std::size_t>(piece)});
        const std::size_t element = size_of(options.dtype);
        convert(
            {values.f32() + at, DType::kF32, {piece}},
            {static_cast<std::byte*>(narrowed.view().data) + static_cast<std::size_t>(at) * element,
             options.dtype,
             {piece}});
      });
      const auto bytes = static_cast<std::size_t>(count) * size_of(options.dtype);
      writer.write(name, {static_cast<const std::byte*>(narrowed.view().data), bytes});
      done += static_cast<std::int64_t>(bytes);
      if (options.on_progress) options.on_progress(done, total);
    }
    ++index;
  });
  writer.finish();
  write_config(config_json, config_path);
}

}  // namespace deltafox
