// A weight as a block declares it: shape, initialisation, and once loaded its values.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace deltafox {

// How the official code initialises a weight.
struct Init {
  enum class Kind : std::uint8_t { kConstant, kNormal, kUniform };
  Kind kind = Kind::kConstant;
  double value = 0;  // the constant, the standard deviation, or the bound of ±bound

  static Init constant(double value) { return {Kind::kConstant, value}; }
  static Init normal(double std) { return {Kind::kNormal, std}; }
  static Init uniform(double bound) { return {Kind::kUniform, bound}; }
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
