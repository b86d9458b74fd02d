#include "model/registry.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>

#include "core/error.h"
#include "model/arch/delta_net.h"
#include "model/arch/flash_linear_attention.h"
#include "model/arch/forgetting_transformer.h"
#include "model/arch/hgrn2.h"
#include "model/arch/mamba2.h"
#include "model/arch/samba.h"
#include "model/arch/transformer.h"

namespace deltafox {
namespace {

struct Architecture {
  const char* model_type;
  CausalLM (*build)(const io::JsonObject& config);
};

constexpr std::array kArchitectures{
    Architecture{"delta_net-project_fox", arch::build_delta_net},
    Architecture{"forgetting_transformer-project_fox", arch::build_forgetting_transformer},
    Architecture{"hgrn2-project_fox", arch::build_hgrn2},
    Architecture{"mamba2-project_fox", arch::build_mamba2},
    Architecture{"samba-project_fox", arch::build_samba},
    Architecture{"transformer-project_fox", arch::build_transformer},
    Architecture{"delta_net", arch::build_fla_delta_net},
    Architecture{"forgetting_transformer", arch::build_fla_forgetting_transformer},
};

struct Preset {
  const char* name;
  std::string (*config)();
};

using arch::FoxVariant;

template <FoxVariant kVariant, std::int64_t kHiddenSize, std::int64_t kLayers, std::int64_t kHeads>
std::string fox() {
  return arch::forgetting_transformer_config(kVariant, kHiddenSize, kLayers, kHeads);
}

constexpr std::array kPresets{
    Preset{"delta_net-125m", [] { return arch::delta_net_config(768, 12, 6); }},
    Preset{"delta_net-360m", [] { return arch::delta_net_config(1024, 24, 8); }},
    Preset{"delta_net-760m", [] { return arch::delta_net_config(1536, 24, 12); }},
    Preset{"fox_pro-125m", fox<FoxVariant::kFoxPro, 768, 12, 12>},
    Preset{"fox_pro-360m", fox<FoxVariant::kFoxPro, 1024, 24, 16>},
    Preset{"fox_pro-760m", fox<FoxVariant::kFoxPro, 1536, 24, 24>},
    Preset{"fox_llama-125m", fox<FoxVariant::kFoxLlama, 768, 12, 12>},
    Preset{"fox_llama-360m", fox<FoxVariant::kFoxLlama, 1024, 24, 16>},
    Preset{"fox_llama-760m", fox<FoxVariant::kFoxLlama, 1536, 24, 24>},
    Preset{"hgrn2-125m", [] { return arch::hgrn2_config(768, 12); }},
    Preset{"hgrn2-360m", [] { return arch::hgrn2_config(1024, 24); }},
    Preset{"hgrn2-760m", [] { return arch::hgrn2_config(1536, 24); }},
    Preset{"mamba2-125m", [] { return arch::mamba2_config(768, 24, 24); }},
    Preset{"mamba2-360m", [] { return arch::mamba2_config(1024, 48, 32); }},
    Preset{"mamba2-760m", [] { return arch::mamba2_config(1536, 48, 48); }},
    Preset{"samba-760m", arch::samba_config},
    Preset{"transformer_pro-125m", fox<FoxVariant::kTransformerPro, 768, 12, 12>},
    Preset{"transformer_pro-360m", fox<FoxVariant::kTransformerPro, 1024, 24, 16>},
    Preset{"transformer_pro-760m", fox<FoxVariant::kTransformerPro, 1536, 24, 12>},
    Preset{"transformer_llama-125m", [] { return arch::transformer_config(768, 12, 12); }},
    Preset{"transformer_llama-360m", [] { return arch::transformer_config(1024, 24, 16); }},
    Preset{"transformer_llama-760m", [] { return arch::transformer_config(1536, 24, 12); }},
};

}  // namespace

CausalLM build_model(const io::JsonObject& config) {
  const std::string type = config.string("model_type", "");
  std::vector<std::string_view> known;
  for (const Architecture& architecture : kArchitectures) {
    if (type == architecture.model_type) return architecture.build(config);
    known.emplace_back(architecture.model_type);
  }
  fail("{}: key 'model_type': '{}' is not one of the known types: {}", config.file(), type,
       fmt::join(known, ", "));
}

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  names.reserve(kPresets.size());
  for (const Preset& preset : kPresets) names.emplace_back(preset.name);
  return names;
}

std::string preset_config(const std::string& name) {
  for (const Preset& preset : kPresets) {
    if (name == preset.name) return preset.config();
  }
  fail("no model is named '{}'; known: {}", name, fmt::join(preset_names(), ", "));
}

}  // namespace deltafox
