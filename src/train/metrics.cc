#include "train/metrics.h"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <system_error>

#include "core/error.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace deltafox::train {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxLogBytes = std::size_t{1} << 32;

// Keeps the lines of steps up to `resume_tokens`, and none that an interruption cut off.
void purge(const fs::path& path, std::int64_t resume_tokens) {
  const std::string text = io::read_text_file(path.string(), kMaxLogBytes);
  std::string kept;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t newline = text.find('\n', begin);
    if (newline == std::string::npos) break;
    const std::string line = text.substr(begin, newline + 1 - begin);
    const auto value = nlohmann::json::parse(line, nullptr, false);
    if (value.is_object() && value.contains("step") && value["step"].is_number_integer() &&
        value["step"].get<std::int64_t>() <= resume_tokens) {
      kept += line;
    }
    begin = newline + 1;
  }
  if (kept == text) return;
  io::AtomicFile file(path.string());
  file.append(std::as_bytes(std::span(kept)));
  file.commit();
}

}  // namespace

Metrics::Metrics(const std::string& run_directory, std::int64_t resume_tokens)
    : lines_directory_(run_directory + "/metrics/jsonlines"),
      arrays_directory_(run_directory + "/metrics/arrays") {
  fs::create_directories(lines_directory_);
  for (const auto& entry : fs::directory_iterator(lines_directory_)) {
    if (entry.path().extension() != ".jsonl") continue;
    if (resume_tokens > 0) {
      purge(entry.path(), resume_tokens);
    } else {
      fs::remove(entry.path());
    }
  }
}

void Metrics::log(const std::string& name, std::int64_t tokens,
                  const nlohmann::ordered_json& values) const {
  nlohmann::ordered_json line{{"step", tokens}};
  line.update(values);
  const std::string text = line.dump() + "\n";
  const std::string path = lines_directory_ + "/" + name + ".jsonl";
  const std::unique_ptr<std::FILE, decltype(&std::fclose)> file(std::fopen(path.c_str(), "ae"),
                                                                &std::fclose);
  if (file == nullptr || std::fwrite(text.data(), 1, text.size(), file.get()) != text.size() ||
      std::fflush(file.get()) != 0) {
    fail("{}: cannot write: {}", path, std::generic_category().message(errno));
  }
}

void Metrics::log_losses(const std::string& name, std::int64_t tokens,
                         std::span<const float> losses) const {
  const std::string directory = arrays_directory_ + "/" + name;
  fs::create_directories(directory);
  const std::string path = fmt::format("{}/step-{:015}.safetensors", directory, tokens);
  io::SafetensorsWriter writer(
      path, {{"loss_per_token", DType::kF32, {static_cast<std::int64_t>(losses.size())}}});
  writer.write("loss_per_token", std::as_bytes(losses));
  writer.finish();
}

}  // namespace deltafox::train
