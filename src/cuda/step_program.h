// Decoding steps as one launch: what step_linear and delta_rule_step would launch one after the
// other becomes the phases of one kernel. See step_program.cu.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "core/context.h"
#include "core/tensor.h"
#include "ops/step.h"

namespace deltafox::cuda {

constexpr int kStepParts = 6;

struct StepPart {
  const void* w;  // if they are packed
  void* y;
  const float4* conv;          // [N]
  const float* conv_bias;      // [N] or null
  float4* const* conv_states;  // [B] in device memory, each [N]
  int rows;                    // N
  int stride;                  // N'
  int turn;                    // of packed weights: the block that has the first panel
  int share;                   // of others: rows of a block
  int map;                     // of others: of their pieces, among those of the program
  std::uint8_t tile_rows;      // at most
  bool y_is_bf16;
  StepEpilogue epilogue;
  DType form;  // of the weights: kBF16, kQ8 or kQ4
};

// step_linear, or with heads > 0 delta_rule_step.
struct alignas(16) StepPhase {
  StepPart parts[kStepParts];
  const void* x;
  const float* norm;
  float norm_eps;
  int norm_width;  // 0: none
  int k;
  int count;  // of parts
  bool x_is_bf16;
  int heads;
  const float* q;  // [B, H, 128]
  const float* key;
  const float* v;
  const float* beta;     // [B, H]
  float* const* states;  // [B]
  float* o;
};

// What a stream gathers between ops::StepProgram's begin and end.
struct StepProgram {
  std::vector<StepPhase> phases;
  int batch = 0;
  bool any = false;               // whether any weights are packed, or any x of float32 is wide
  int turn = 0;                   // of the next packed weights
  Tensor counters;                // of the barrier between thread blocks; zero between launches
  std::vector<CUtensorMap> maps;  // of the parts' weights, if they are not packed
  // All that were made, by place, rows and columns of the weights and rows of tiles.
  std::map<std::tuple<const void*, std::int64_t, std::int64_t, int>, CUtensorMap> known_maps;

  void clear() {
    phases.clear();
    maps.clear();
    any = false;
    turn = 0;
  }
};

// Whether the phase was taken; else the caller launches it.
bool add_to_program(Context& ctx, const StepLinearArgs& args);
bool add_to_program(Context& ctx, const DeltaRuleStepArgs& args);

}  // namespace deltafox::cuda
