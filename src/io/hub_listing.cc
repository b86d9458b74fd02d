#include "io/hub_listing.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "io/hub_names.h"

namespace deltafox::hub {
namespace {

// Picks {"sha": ..., "siblings": [{"rfilename": ...}, ...]} out of the events of the parser. No
// document is built: a hostile one would take a hundred times the memory of its text.
class ListingReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit ListingReader(std::string_view subject) : subject_(subject) {}

  bool null() override { return scalar(); }
  bool boolean(bool /*value*/) override { return scalar(); }
  bool number_integer(std::int64_t /*value*/) override { return scalar(); }
  bool number_unsigned(std::uint64_t /*value*/) override { return scalar(); }
  bool number_float(double /*value*/, const std::string& /*text*/) override { return scalar(); }
  bool binary(binary_t& /*value*/) override { return scalar(); }
  bool string(std::string& value) override {
    if (depth_ == kTop && key_ == "sha") commit_ = value;
    if (depth_ == kEntry && in_siblings_ && entry_key_ == "rfilename") {
      entry_has_name_ = true;
      add(value);
    }
    return scalar();
  }
  bool key(std::string& name) override {
    if (depth_ == kTop) key_ = name;
    if (depth_ == kEntry) entry_key_ = name;
    return true;
  }
  bool start_object(std::size_t /*count*/) override {
    if (depth_ == 0) is_object_ = true;
    if (++depth_ == kEntry) entry_has_name_ = false;
    return true;
  }
  bool end_object() override {
    if (depth_-- == kEntry && in_siblings_ && !entry_has_name_) refuse_entry();
    return true;
  }
  bool start_array(std::size_t /*count*/) override {
    if (depth_ == kTop && key_ == "siblings")
      in_siblings_ = has_siblings_ = true;
    else if (depth_ == kSiblings && in_siblings_)
      refuse_entry();
    ++depth_;
    return true;
  }
  bool end_array() override {
    if (--depth_ == kTop) in_siblings_ = false;
    return true;
  }
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    return false;
  }

  // What was read; `complete` says whether the parser came to the end.
  Listing finish(bool complete) const {
    if (!complete || !is_object_)
      fail("{}: the server's list of files is not a JSON object", subject_);
    if (!is_commit(commit_))
      fail("{}: the server's list of files names no commit (\"sha\")", subject_);
    if (!has_siblings_) fail("{}: the server's list of files has no \"siblings\"", subject_);
    if (!files_.contains("config.json"))
      fail("{}: no config.json: not a checkpoint in the Hugging Face layout", subject_);
    if (std::none_of(files_.begin(), files_.end(),
                     [](const std::string& name) { return name.ends_with(".safetensors"); }))
      fail("{}: no weights in .safetensors format", subject_);
    return {commit_, {files_.begin(), files_.end()}};
  }

 private:
  // Number of brackets that are open around a value.
  static constexpr std::size_t kTop = 1;
  static constexpr std::size_t kSiblings = 2;
  static constexpr std::size_t kEntry = 3;

  bool scalar() const {
    if (depth_ == kSiblings && in_siblings_) refuse_entry();
    return true;
  }
  [[noreturn]] void refuse_entry() const {
    fail("{}: the server's list of files has an entry without a name (\"rfilename\")", subject_);
  }
  void add(const std::string& name) {
    if (!is_checkpoint_file(name)) return;
    if (!is_relative_path(name))
      fail("{}: the server lists a file with the unsafe name '{}'", subject_, printable(name));
    files_.insert(name);
  }

  std::string_view subject_;
  std::size_t depth_ = 0;
  bool is_object_ = false;
  bool has_siblings_ = false;
  bool in_siblings_ = false;
  bool entry_has_name_ = false;
  std::string key_;        // of the top object
  std::string entry_key_;  // of the object three brackets deep
  std::string commit_;
  std::set<std::string> files_;
};

}  // namespace

Listing parse_listing(std::string_view json, std::string_view subject) {
  ListingReader reader(subject);
  const bool complete = nlohmann::json::sax_parse(json, &reader);
  return reader.finish(complete);
}

}  // namespace deltafox::hub
