#include "io/prepare_data.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"
#include "core/thread_pool.h"
#include "deltafox/tokenizer.h"
#include "io/bpe_trainer.h"
#include "io/file.h"
#include "io/text_corpus.h"
#include "io/token_file.h"

namespace deltafox::io {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxSmallFile = std::size_t{256} << 20;
constexpr std::array kTokenizerFiles{"vocab.json", "merges.txt", "tokenizer.json",
                                     "tokenizer_config.json", "special_tokens_map.json"};
// The two files that are made.
constexpr std::array kSplits{"train", "heldout"};

void write_file(const fs::path& path, const std::string& text) {
  AtomicFile file(path.string());
  file.append(std::as_bytes(std::span(text)));
  file.commit();
}

// Runs tasks that may throw; of several errors, the same one whatever the threads did.
template <typename Task>
void parallel_tasks(ThreadPool& threads, std::size_t count, Task&& task) {
  std::mutex mutex;
  std::optional<std::pair<std::int64_t, std::string>> problem;
  threads.parallel_for(static_cast<std::int64_t>(count), [&](std::int64_t i, int slot) {
    try {
      task(static_cast<std::size_t>(i), static_cast<std::size_t>(slot));
    } catch (const std::exception& error) {
      const std::scoped_lock lock(mutex);
      if (!problem || i < problem->first) problem = {i, error.what()};
    }
  });
  if (problem) throw Error(problem->second);
}

class Preparation {
 public:
  explicit Preparation(const PrepareOptions& options)
      : options_(options),
        corpus_(options.inputs, options.field),
        threads_(options.threads),
        output_(options.output),
        parts_directory_(output_ / "parts") {}

  PreparedData run();

 private:
  // Successive chunks that are tokenized and kept together.
  struct Part {
    std::size_t first = 0;
    std::size_t end = 0;
    std::size_t bytes = 0;
  };
  struct Ids {
    std::array<std::vector<std::int32_t>, kSplits.size()> ids;  // by split
    std::array<std::int64_t, kSplits.size()> documents{};
  };

  std::string description() const;
  void open_directory();
  void provide_tokenizer();
  void learn_tokenizer();
  void copy_tokenizer();
  std::vector<Part> parts() const;
  std::string part_path(std::size_t part, std::size_t split) const;
  Ids encode(const Tokenizer& tokenizer, std::int32_t separator,
             const TextCorpus::Chunk& chunk) const;
  void encode_part(const Tokenizer& tokenizer, std::int32_t separator, const Part& part,
                   std::size_t index);
  void join(std::size_t parts, PreparedData& result);
  void progress(const std::string& label, std::int64_t done) const {
    if (options_.on_progress) {
      options_.on_progress(label, done, static_cast<std::int64_t>(corpus_.bytes()));
    }
  }

  const PrepareOptions& options_;
  TextCorpus corpus_;
  ThreadPool threads_;
  fs::path output_;
  fs::path parts_directory_;
};

// Parts that were made by another description are of no use.
std::string Preparation::description() const {
  nlohmann::ordered_json json{{"field", options_.field},
                              {"heldout_share", options_.heldout_share},
                              {"learn_vocab_size", options_.vocab_size}};
  for (const char* name : kTokenizerFiles) {
    const fs::path path = fs::path(options_.tokenizer) / name;
    if (options_.tokenizer.empty() || !fs::exists(path)) continue;
    const std::string text = read_text_file(path.string(), kMaxSmallFile);
    json["tokenizer"][name] = fmt::format("{:016x}", XXH3_64bits(text.data(), text.size()));
  }
  for (std::size_t file = 0; file < corpus_.paths().size(); ++file) {
    const std::string& path = corpus_.paths()[file];
    const auto time = fs::last_write_time(path).time_since_epoch().count();
    json["inputs"].push_back({path, corpus_.file_bytes(file), time});
  }
  return json.dump(1) + "\n";
}

void Preparation::open_directory() {
  for (const char* split : kSplits) {
    const fs::path path = output_ / (std::string(split) + ".tokens");
    if (fs::exists(path)) fail("{}: exists already", path.string());
  }
  std::error_code error;
  fs::create_directories(output_, error);
  if (error) fail("{}: cannot make the directory: {}", output_.string(), error.message());
  const fs::path made_of = parts_directory_ / "made_of.json";
  const std::string wanted = description();
  if (fs::exists(made_of) && read_text_file(made_of.string(), kMaxSmallFile) == wanted) return;
  fs::remove_all(parts_directory_);
  fs::create_directory(parts_directory_);
  write_file(made_of, wanted);
}

void Preparation::learn_tokenizer() {
  // Written last: where it is, the vocabulary is whole.
  const fs::path done = parts_directory_ / "tokenizer_learned";
  if (fs::exists(done)) return;
  std::vector<PieceCounts> counts(static_cast<std::size_t>(threads_.size()));
  constexpr std::size_t kAtATime = 64;  // chunks between updates of the progress
  std::int64_t bytes = 0;
  for (std::size_t first = 0; first < corpus_.chunks().size(); first += kAtATime) {
    const std::size_t count = std::min(kAtATime, corpus_.chunks().size() - first);
    parallel_tasks(threads_, count, [&](std::size_t i, std::size_t slot) {
      corpus_.for_each(corpus_.chunks()[first + i],
                       [&](const TextCorpus::Text& text) { counts[slot].add(text.text); });
    });
    for (std::size_t i = first; i < first + count; ++i) {
      bytes += static_cast<std::int64_t>(corpus_.chunks()[i].end - corpus_.chunks()[i].begin);
    }
    progress("counting words", bytes);
  }
  for (std::size_t slot = 1; slot < counts.size(); ++slot) counts[0].merge(counts[slot]);
  const BpeVocabulary vocabulary = train_bpe(counts[0], options_.vocab_size);
  write_file(output_ / "vocab.json", vocabulary.vocab_json());
  write_file(output_ / "merges.txt", vocabulary.merges_txt());
  write_file(output_ / "tokenizer_config.json",
             "{\n  \"tokenizer_class\": \"GPT2Tokenizer\",\n  \"add_bos_token\": true,\n"
             "  \"bos_token\": \"<|endoftext|>\",\n  \"eos_token\": \"<|endoftext|>\"\n}\n");
  write_file(done, "");
}

void Preparation::copy_tokenizer() {
  for (const char* name : kTokenizerFiles) {
    const fs::path from = fs::path(options_.tokenizer) / name;
    if (!fs::exists(from) || (fs::exists(output_ / name) && fs::equivalent(from, output_ / name))) {
      continue;
    }
    write_file(output_ / name, read_text_file(from.string(), kMaxSmallFile));
  }
}

void Preparation::provide_tokenizer() {
  if (options_.tokenizer.empty() == (options_.vocab_size == 0)) {
    fail("give either a tokenizer or the size of a vocabulary to learn");
  }
  if (options_.tokenizer.empty()) {
    learn_tokenizer();
  } else {
    copy_tokenizer();
  }
}

std::vector<Preparation::Part> Preparation::parts() const {
  std::vector<Part> parts;
  const std::vector<TextCorpus::Chunk>& chunks = corpus_.chunks();
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    if (parts.empty() || parts.back().bytes >= options_.part_bytes) parts.push_back({i, i, 0});
    parts.back().end = i + 1;
    parts.back().bytes += chunks[i].end - chunks[i].begin;
  }
  return parts;
}

std::string Preparation::part_path(std::size_t part, std::size_t split) const {
  return (parts_directory_ / fmt::format("{:06}.{}.tokens", part, kSplits[split])).string();
}

Preparation::Ids Preparation::encode(const Tokenizer& tokenizer, std::int32_t separator,
                                     const TextCorpus::Chunk& chunk) const {
  Ids result;
  corpus_.for_each(chunk, [&](const TextCorpus::Text& text) {
    const std::array place{text.file, text.document};
    const XXH64_hash_t draw = XXH3_64bits(place.data(), sizeof place);
    const std::size_t split = static_cast<double>(draw) * 0x1p-64 < options_.heldout_share ? 1 : 0;
    const std::vector<std::int32_t> ids = tokenizer.encode(text.text, false);
    result.ids[split].insert(result.ids[split].end(), ids.begin(), ids.end());
    if (!text.ends) return;
    result.ids[split].push_back(separator);
    ++result.documents[split];
  });
  return result;
}

void Preparation::encode_part(const Tokenizer& tokenizer, std::int32_t separator, const Part& part,
                              std::size_t index) {
  std::vector<Ids> chunks(part.end - part.first);
  parallel_tasks(threads_, chunks.size(), [&](std::size_t i, std::size_t) {
    chunks[i] = encode(tokenizer, separator, corpus_.chunks()[part.first + i]);
  });
  // The train file comes last: where it is, the part is whole.
  for (const std::size_t split : {1, 0}) {
    TokenFileWriter writer(part_path(index, split), tokenizer.vocab_size(), separator);
    std::int64_t documents = 0;
    for (const Ids& chunk : chunks) {
      writer.append(chunk.ids[split]);
      documents += chunk.documents[split];
    }
    writer.finish(documents);
  }
}

void Preparation::join(std::size_t parts, PreparedData& result) {
  constexpr std::int64_t kAtATime = 1 << 20;
  std::vector<std::int32_t> ids;
  for (std::size_t split = 0; split < kSplits.size(); ++split) {
    const std::string path = (output_ / (std::string(kSplits[split]) + ".tokens")).string();
    std::optional<TokenFileWriter> writer;
    std::int64_t documents = 0;
    std::int64_t tokens = 0;
    for (std::size_t part = 0; part < parts; ++part) {
      const TokenFile file = TokenFile::open(part_path(part, split));
      if (!writer) writer.emplace(path, file.header().vocab_size, file.header().separator);
      for (std::int64_t begin = 0; begin < file.size(); begin += kAtATime) {
        ids.resize(static_cast<std::size_t>(std::min(kAtATime, file.size() - begin)));
        file.read(begin, ids);
        writer->append(ids);
      }
      documents += file.header().documents;
      tokens += file.size();
    }
    result.documents += documents;
    (split == 0 ? result.train_tokens : result.heldout_tokens) = tokens;
    if (tokens > 0) writer->finish(documents);
  }
}

PreparedData Preparation::run() {
  open_directory();
  provide_tokenizer();
  const Tokenizer tokenizer = Tokenizer::load(output_.string());
  const auto eos = tokenizer.eos_token_id();
  if (!eos) fail("{}: the tokenizer has no end-of-text token", options_.tokenizer);
  PreparedData result{.bytes = static_cast<std::int64_t>(corpus_.bytes()),
                      .vocab_size = tokenizer.vocab_size()};
  const std::vector<Part> all = parts();
  std::int64_t done = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (fs::exists(part_path(i, 0))) {
      result.resumed_bytes += static_cast<std::int64_t>(all[i].bytes);
    } else {
      encode_part(tokenizer, *eos, all[i], i);
    }
    done += static_cast<std::int64_t>(all[i].bytes);
    progress("tokenizing", done);
  }
  join(all.size(), result);
  write_file(output_ / "data.json",
             read_text_file((parts_directory_ / "made_of.json").string(), kMaxSmallFile));
  fs::remove_all(parts_directory_);
  return result;
}

}  // namespace

PreparedData prepare_data(const PrepareOptions& options) {
  if (!(options.heldout_share >= 0 && options.heldout_share < 1)) {
    fail("the held-out share must be from 0 to below 1, got {}", options.heldout_share);
  }
  return Preparation(options).run();
}

}  // namespace deltafox::io
