// The subcommands of the program. Each function adds one to `app`: its options, its help, and what
// runs when the command line names it.
#pragma once

#include <CLI/CLI.hpp>

namespace deltafox::app {

void add_generate(CLI::App& app);
void add_logits(CLI::App& app);
void add_loss(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_info(CLI::App& app);
void add_init(CLI::App& app);
void add_quantize(CLI::App& app);
void add_pull(CLI::App& app);
void add_state(CLI::App& app);
void add_bench(CLI::App& app);
void add_data(CLI::App& app);
void add_train(CLI::App& app);
void add_export(CLI::App& app);

}  // namespace deltafox::app
