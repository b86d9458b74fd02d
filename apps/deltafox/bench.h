// What the benchmarks of the program share.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace deltafox::app {

void add_bench_machine(CLI::App& bench);
void add_bench_model(CLI::App& bench);

// Of one value or more.
double median(std::vector<double> values);

// The processor as /proc/cpuinfo names it, with its family and model where known.
std::string processor_name();

}  // namespace deltafox::app
