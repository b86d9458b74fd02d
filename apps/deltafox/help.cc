#include "help.h"

#include <fmt/format.h>

#include <sstream>

namespace deltafox::app {
namespace {

constexpr std::size_t kColumn = 30;  // where descriptions begin
constexpr std::size_t kWidth = 96;

}  // namespace

HelpFormatter::HelpFormatter() {
  column_width(kColumn);
}

std::string HelpFormatter::make_option(const CLI::Option* option, bool is_positional) const {
  std::string name = make_option_name(option, is_positional) + make_option_opts(option);
  // CLI11's mark of a flag that turns something off, which its name says already.
  constexpr std::string_view kOff = "{false}";
  if (const std::size_t at = name.find(kOff); at != std::string::npos) name.erase(at, kOff.size());

  std::string text = fmt::format("  {:<{}}", name, kColumn - 2);
  std::size_t column = name.size() + 2 < kColumn ? kColumn : kWidth;
  std::istringstream words(make_option_desc(option));
  for (std::string word; words >> word;) {
    if (column + word.size() >= kWidth) {
      text += fmt::format("\n{:{}}{}", "", kColumn, word);
      column = kColumn + word.size();
    } else {
      text += fmt::format("{}{}", column == kColumn ? "" : " ", word);
      column += word.size() + 1;
    }
  }
  return text + "\n";
}

std::string HelpFormatter::make_help(const CLI::App* app, std::string name,
                                     CLI::AppFormatMode mode) const {
  const std::string text = Formatter::make_help(app, std::move(name), mode);
  return CLI::detail::find_and_replace(text, "\n\n\n", "\n\n");
}

}  // namespace deltafox::app
