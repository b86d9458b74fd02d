// How --help looks: CLI11's layout, with descriptions broken into lines.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace deltafox::app {

class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter();
  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override;
  std::string make_option(const CLI::Option* option, bool is_positional) const override;
};

}  // namespace deltafox::app
