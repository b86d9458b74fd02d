// exp and log whose every rounding is written down: +, −, ·, / of IEEE 754 doubles, one after the
// other. The host and a GPU get the same bits, so that a token drawn on either is the same. Where
// they are used nothing may be fused (-ffp-contract=off, --fmad=false).
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace deltafox {

// e^x for x in [−700, 700], to some 2 units in the last place.
constexpr double exact_exp(double x) {
  constexpr double kRounder = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = x * 0x1.71547652b82fep+0 + kRounder;  // x / ln 2
  const double n = shifted - kRounder;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // |r| <= ln 2 / 2
  double p = 1.0 / 479001600;  // Taylor's series to r^12 / 12!: the rest is below 2^-52
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const auto exponent = std::bit_cast<std::uint64_t>(shifted) + 1023;
  return p * std::bit_cast<double>(exponent << 52);
}

// ln x for positive normal x, to some 2 units in the last place; −∞ for 0.
constexpr double exact_log(double x) {
  if (x == 0) return -std::numeric_limits<double>::infinity();
  constexpr std::uint64_t kRootHalf = 0x3fe6a09e667f3bcd;  // the bits of √½
  // x = m · 2^n with m in [√½, √2)
  const std::uint64_t above = std::bit_cast<std::uint64_t>(x) - kRootHalf;
  const auto exponent = static_cast<std::int64_t>(above) >> 52;
  const double m = std::bit_cast<double>((above & 0xfffffffffffffULL) + kRootHalf);
  const auto n = static_cast<double>(exponent);
  // ln m = 2 artanh s = 2 Σ s^(2i+1) / (2i+1), |s| <= 0.172
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  double p = 1.0 / 23;
  p = p * z + 1.0 / 21;
  p = p * z + 1.0 / 19;
  p = p * z + 1.0 / 17;
  p = p * z + 1.0 / 15;
  p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11;
  p = p * z + 1.0 / 9;
  p = p * z + 1.0 / 7;
  p = p * z + 1.0 / 5;
  p = p * z + 1.0 / 3;
  const double log_m = 2 * s + 2 * s * (z * p);
  return n * 0x1.62e42fee00000p-1 + (n * 0x1.a39ef35793c76p-33 + log_m);
}

}  // namespace deltafox
