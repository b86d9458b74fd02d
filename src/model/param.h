// A weight as a block declares it: shape, initialisation, and once loaded its values.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace deltafox {

// How the official code initialises a weight.
struct Init {
  enum class Kind : std::uint8_t { kConstant, kNormal, kUniform, kLogIndex, kTimeStepBias };
  Kind kind = Kind::kConstant;
  double value = 0;  // the constant, the standard deviation, the bound of ±bound, or the minimum
  double max = 0;    // of kTimeStepBias
  double floor = 0;

  static Init constant(double value) { return {Kind::kConstant, value}; }
  static Init normal(double std) { return {Kind::kNormal, std}; }
  static Init uniform(double bound) { return {Kind::kUniform, bound}; }
  // log(1 + i) for element i of each row
  static Init log_index() { return {Kind::kLogIndex}; }
  // The inverse softplus of a time step drawn from [min, max], uniform in its logarithm, and then
  // raised to `floor`.
  static Init time_step_bias(double min, double max, double floor) {
    return {Kind::kTimeStepBias, min, max, floor};
  }
};

struct Param {
  Shape shape;
  Init init;
  // Matrices are kept in the dtype the user chose; everything else is small and kept in float32.
  bool is_matrix = false;
  ConstTensorView value;  // bound by the loader

  static Param matrix(const Shape& shape, Init init) { return {shape, init, true, {}}; }
  static Param vector(const Shape& shape, Init init) { return {shape, init, false, {}}; }
};

}  // namespace deltafox
