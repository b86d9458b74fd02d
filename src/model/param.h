// A weight as a block declares it: shape, initialisation, and once loaded its values.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace deltafox {

// How the official code initialises a weight.
struct Init {
  enum class Kind : std::uint8_t {
    kConstant,
    kNormal,
    kUniform,
    kLogIndex,
    kTimeStepBias,
    kDecayTimes
  };
  Kind kind = Kind::kConstant;
  double value = 0;  // the constant, the standard deviation, the bound of ±bound, or the minimum
  double max = 0;    // of kTimeStepBias and kDecayTimes
  double floor = 0;  // of kTimeStepBias

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
  // Logits b of gates σ(b) that decay to 1/e in times from min to max, the first element's to the
  // last's, spaced evenly in the logarithm.
  static Init decay_times(double min, double max) { return {Kind::kDecayTimes, min, max}; }
};

struct Param {
  Shape shape;
  Init init;
  // Matrices are kept in the dtype the user chose; everything else is small and kept in float32.
  bool is_matrix = false;
  // False for a matrix that its block reads in parts which packed panels cannot be cut into.
  bool packable = true;
  bool trainable = true;       // false for what the official code keeps as a buffer
  bool read_on_host = false;   // true for a vector that its block reads on the host as well
  ConstTensorView value = {};  // bound by the loader
  // value lies in one buffer with the others, in the model's order, matrices with padded_rows()
  bool in_one_piece = false;
  ConstTensorView host = {};  // of such a vector whose value lies on a GPU, the same on the host

  // In a piece, zeros follow a matrix's rows up to a whole set of 16: several matrices, one below
  // the other, are then one whose products need no special case for its last rows.
  std::int64_t padded_rows() const {
    constexpr std::int64_t kRows = 16;
    return is_matrix ? (shape[0] + kRows - 1) / kRows * kRows : shape[0];
  }
  Shape padded_shape() const { return is_matrix ? Shape{padded_rows(), shape[1]} : shape; }

  const ConstTensorView& on_host() const { return host.data != nullptr ? host : value; }

  static Param matrix(const Shape& shape, Init init) {
    return {.shape = shape, .init = init, .is_matrix = true};
  }
  static Param vector(const Shape& shape, Init init) { return {.shape = shape, .init = init}; }
};

}  // namespace deltafox
