#include "model/quantize.h"

#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/error.h"
#include "core/quantized.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "model/loader.h"
#include "model/registry.h"

namespace deltafox {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMethod = "deltafox";
constexpr std::int64_t kSchemeVersion = 1;
constexpr std::size_t kMaxSmallFile = std::size_t{256} << 20;

// How a parameter is written.
struct Plan {
  std::string name;         // in the file to read
  std::string stored_name;  // in the file to write
  DType kept;
  Shape shape;         // of the parameter
  Shape stored_shape;  // of the tensor that is written

  io::TensorDeclaration declaration() const {
    return {stored_name, is_packed(kept) ? DType::kU8 : kept, stored_shape};
  }
};

Plan plan_of(const std::string& name, const Shape& shape, DType kept) {
  Plan plan{name, name, kept, shape, shape};
  if (is_packed(kept)) {
    const PackedLayout layout(kept, shape[0], shape[1]);
    plan.stored_name = packed_name(name, kept);
    plan.stored_shape = {layout.panels(), layout.panel_bytes()};
  }
  return plan;
}

// Everything but weights and config.json: tokenizers, generation_config.json, licences.
void copy_small_files(const fs::path& from, const fs::path& to) {
  for (const fs::directory_entry& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    const bool weights = name.ends_with(".safetensors") || name.ends_with(".bin") ||
                         name.ends_with(".index.json") || name.ends_with(".pt");
    if (weights || name == "config.json" || name.starts_with(".") || !entry.is_regular_file()) {
      continue;
    }
    if (entry.file_size() > kMaxSmallFile) continue;
    const std::string text = io::read_text_file(entry.path().string(), kMaxSmallFile);
    io::AtomicFile file((to / name).string());
    file.append(std::as_bytes(std::span(text)));
    file.commit();
  }
}

// The text with a member more; goes in before the last brace, since Python's Infinity would not
// survive a JSON library.
std::string with_quantization(const std::string& config, DType dtype) {
  if (!is_packed(dtype)) return config;
  std::string text = config.substr(0, config.find_last_of('}'));
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  const bool empty = text.ends_with('{');
  return fmt::format(
      "{}{}\n  \"quantization_config\": {{\"quant_method\": \"{}\", \"version\": {}, \"weights\": "
      "\"{}\"}}\n}}\n",
      text, empty ? "" : ",", kMethod, kSchemeVersion, dtype == DType::kQ8 ? "int8" : "int4");
}

void refuse_existing(const fs::path& directory) {
  for (const char* name : {"config.json", "model.safetensors"}) {
    if (fs::exists(directory / name)) fail("{}: exists already", (directory / name).string());
  }
}

}  // namespace

std::string packed_name(const std::string& name, DType dtype) {
  return name + (dtype == DType::kQ8 ? ".q8" : ".q4");
}

std::optional<DType> quantization_of(const io::JsonObject& config) {
  const auto scheme = config.object("quantization_config");
  if (!scheme) return std::nullopt;
  scheme->choice("quant_method", "", {kMethod});
  const std::string weights = scheme->choice("weights", "", {"int8", "int4"});
  const std::int64_t version = scheme->integer("version", 0, 0, 1 << 20);
  if (version != kSchemeVersion) {
    fail("{}: key 'quantization_config.version': {} is not known, only {}", config.file(), version,
         kSchemeVersion);
  }
  return weights == "int8" ? DType::kQ8 : DType::kQ4;
}

void write_quantized(const std::string& from, const std::string& to,
                     const QuantizeOptions& options) {
  const std::string config_path = from + "/config.json";
  const std::string config_text = io::read_text_file(config_path, std::size_t{16} << 20);
  const io::JsonObject config = io::JsonObject::parse(config_text, config_path);
  if (config.has_value("quantization_config")) fail("{}: is quantised already", config_path);
  const io::Checkpoint checkpoint = io::Checkpoint::open(from);
  CausalLM model = build_model(config);
  ThreadPool threads(options.threads);
  // Checks names, shapes and dtypes; nothing is converted.
  std::vector<Plan> plans;
  const std::vector<Tensor> vectors = bind_params(model, checkpoint, std::nullopt, threads);
  std::vector<ConstTensorView> values;
  std::vector<io::TensorDeclaration> declarations;
  std::int64_t total = 0;
  model.visit_params([&](const std::string& name, Param& param) {
    const DType kept = kept_dtype(model.config().names, name, param, options.dtype);
    plans.push_back(plan_of(name, param.shape, kept));
    values.push_back(param.value);
    declarations.push_back(plans.back().declaration());
    total += static_cast<std::int64_t>(bytes_of(kept, param.shape));
  });

  const io::NewDirectory made(to);
  refuse_existing(to);
  io::SafetensorsWriter writer((fs::path(to) / "model.safetensors").string(), declarations,
                               {{"format", "pt"}}, io::SafetensorsWriter::kCacheLine);
  std::int64_t done = 0;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    const Plan& plan = plans[i];
    const Tensor kept =
        kept_as(values[i], plan.kept, checkpoint.file_of(plan.name), plan.name, threads);
    writer.write(plan.stored_name, {static_cast<const std::byte*>(kept.view().data), kept.bytes()});
    done += static_cast<std::int64_t>(kept.bytes());
    if (options.on_progress) options.on_progress(done, total);
  }
  writer.finish();
  copy_small_files(from, to);
  const std::string text = with_quantization(config_text, options.dtype);
  io::AtomicFile file((fs::path(to) / "config.json").string());
  file.append(std::as_bytes(std::span(text)));
  file.commit();
}

}  // namespace deltafox
