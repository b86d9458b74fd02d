// Tokenizer throughput on one thread: MB/s of UTF-8 text, the median of several passes over a
// corpus.
//   bench_tokenizer VOCABULARY_DIRECTORY CORPUS...
// A corpus is a JSON list of texts; each text is one call. bench/tokenizer.py makes corpora and
// measures other tokenizers on them.
#include <fmt/format.h>
#include <time.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "deltafox/error.h"
#include "deltafox/tokenizer.h"

namespace {

using deltafox::Tokenizer;
using deltafox::TokenizerFiles;
using nlohmann::json;

constexpr int kPasses = 9;

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw deltafox::Error(path + ": cannot be opened");
  return {std::istreambuf_iterator<char>(in), {}};
}

double thread_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double median_seconds(const std::function<void()>& pass) {
  std::vector<double> seconds;
  pass();
  for (int i = 0; i < kPasses; ++i) {
    const double begin = thread_seconds();
    pass();
    seconds.push_back(thread_seconds() - begin);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

json measure(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
  std::size_t bytes = 0;
  std::size_t tokens = 0;
  std::vector<std::vector<std::int32_t>> ids;
  for (const std::string& text : texts) {
    bytes += text.size();
    ids.push_back(tokenizer.encode(text));
    tokens += ids.back().size();
    if (tokenizer.decode(ids.back()) != text) throw deltafox::Error("a text does not come back");
  }
  const double encode = median_seconds([&] {
    for (const std::string& text : texts) tokenizer.encode(text);
  });
  const double decode = median_seconds([&] {
    for (const auto& sequence : ids) tokenizer.decode(sequence);
  });
  const double mb = static_cast<double>(bytes) / 1e6;
  return {{"bytes", bytes},
          {"tokens", tokens},
          {"encode_mb_per_s", mb / encode},
          {"decode_mb_per_s", mb / decode}};
}

int run(const std::string& directory, const std::vector<std::string>& corpora) {
  TokenizerFiles files;
  files.vocab = read_file(directory + "/vocab.json");
  files.merges = read_file(directory + "/merges.txt");
  const Tokenizer plain = Tokenizer::from_files(files);
  files.tokenizer_config = R"({"tokenizer_class": "JSONGPT2Tokenizer"})";
  const Tokenizer escaping = Tokenizer::from_files(files);

  json result;
  result["load_ms"] = 1e3 * median_seconds([&] { Tokenizer::load(directory); });
  for (const std::string& path : corpora) {
    const auto texts = json::parse(read_file(path)).get<std::vector<std::string>>();
    result["corpora"].push_back({{"corpus", path},
                                 {"gpt2", measure(plain, texts)},
                                 {"json_gpt2", measure(escaping, texts)}});
  }
  fmt::print("{}\n", result.dump(2));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fmt::print(stderr, "usage: bench_tokenizer VOCABULARY_DIRECTORY CORPUS...\n");
    return 2;
  }
  try {
    return run(argv[1], {argv + 2, argv + argc});
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_tokenizer: {}\n", error.what());
    return 2;
  }
}
