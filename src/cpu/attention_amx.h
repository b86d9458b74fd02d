// Softmax attention of 32 queries by the tile registers of AMX, on one thread: operands of products
// are bfloat16; scores, the softmax and sums float32.
#pragma once

#include <cstdint>

namespace deltafox::cpu::bf16 {

constexpr std::int64_t kAttentionRows = 32;
// Keys whose greatest score is found before they get weights.
constexpr std::int64_t kAttentionBlock = 256;

// Of some keys, which are counted from 0. D' is the head's size rounded up to whole tiles, V that
// of a value rounded up to 16.
struct AttentionRows {
  const std::uint16_t* q;       // [2][D' / 32][16 rows][32], scaled
  std::int64_t rows;            // of them that are there
  std::int64_t depth;           // D'
  std::int64_t columns;         // V
  const std::uint16_t* keys;    // [keys / 16][D' / 2][16 keys][2]
  const std::uint16_t* values;  // [keys / 32][V / 16][16][16 columns][2 keys]
  // Keys [first, end), multiples of 32, are read by one of the rows, and [begins[r], ends[r]) of
  // them by row r. Values there are finite.
  std::int64_t first;
  std::int64_t end;
  const std::int64_t* begins;  // [rows]
  const std::int64_t* ends;    // [rows]
  // Sums of log gates up to a key or query, in two parts; null without gates.
  const float* key_gates[2];    // [keys]
  const float* query_gates[2];  // [rows]
  float* scores;                // of work, [32 · kAttentionBlock] from a cache line on
};

// Weights and their sums are relative to 2^max.
struct AttentionSums {
  float* o;     // [2][V / 16][16 rows][16] weighted values, from a cache line on
  float* max;   // [32] about the greatest score · log2 e
  double* sum;  // [32] of weights
};

constexpr float kNoMax = -1e30F;  // before the first key

void attend_amx(const AttentionRows& rows, const AttentionSums& sums);

}  // namespace deltafox::cpu::bf16
