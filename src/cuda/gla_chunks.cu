// Gated linear attention in chunks, and its gradients (the equations are in ops/gla.h), in float32.
#include <cmath>

#include "cuda/decayed_backward.cuh"
#include "cuda/decayed_kernels.h"
#include "ops/gla.h"

namespace deltafox::cuda {
namespace {

struct Source {
  static constexpr bool kOneGate = false;

  Elements queries, values, outputs;
  Elements d_outputs, d_queries, d_values;
  const float* keys;   // [T, H, K]
  const float* gates;  // [T, H, K]
  float* d_keys;
  float* d_gates;
  int heads;
  int rows;     // K
  int columns;  // V
  float scale;  // 1 / √K

  __device__ std::ptrdiff_t key_at(std::ptrdiff_t token, int head, int row) const {
    return (token * heads + head) * rows + row;
  }
  __device__ std::ptrdiff_t value_at(std::ptrdiff_t token, int head, int column) const {
    return (token * heads + head) * columns + column;
  }
  __device__ float q(std::ptrdiff_t token, int head, int row) const {
    return queries.get(key_at(token, head, row));
  }
  __device__ float k(std::ptrdiff_t token, int head, int row) const {
    return keys[key_at(token, head, row)];
  }
  __device__ float g(std::ptrdiff_t token, int head, int row) const {
    return gates[key_at(token, head, row)];
  }
  __device__ float v(std::ptrdiff_t token, int head, int column) const {
    return values.get(value_at(token, head, column));
  }
  __device__ void store_o(std::ptrdiff_t token, int head, int column, float o) const {
    outputs.put(value_at(token, head, column), scale * o);
  }
  __device__ float d_o(std::ptrdiff_t token, int head, int column) const {
    return scale * d_outputs.get(value_at(token, head, column));
  }
  __device__ void store_dq(std::ptrdiff_t token, int head, int row, float d) const {
    d_queries.put(key_at(token, head, row), d);
  }
  __device__ void store_dk(std::ptrdiff_t token, int head, int row, float d) const {
    d_keys[key_at(token, head, row)] = d;
  }
  __device__ void store_dg(std::ptrdiff_t token, int head, int row, float d) const {
    d_gates[key_at(token, head, row)] = d;
  }
  __device__ void store_dv(std::ptrdiff_t token, int head, int column, float d) const {
    d_values.put(value_at(token, head, column), d);
  }
};

}  // namespace

void launch_gla_chunks(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch) {
  const Elements none(nullptr, false);
  const Source source{.queries = Elements(problem.q, problem.is_bf16),
                      .values = Elements(problem.v, problem.is_bf16),
                      .outputs = Elements(problem.o, problem.is_bf16),
                      .d_outputs = none,
                      .d_queries = none,
                      .d_values = none,
                      .keys = problem.k,
                      .gates = problem.g,
                      .d_keys = nullptr,
                      .d_gates = nullptr,
                      .heads = problem.heads,
                      .rows = problem.key_dim,
                      .columns = problem.value_dim,
                      .scale = 1 / std::sqrt(static_cast<float>(problem.key_dim))};
  decayed_forward(ctx, "gla", source, batch);
}

void launch_gla_backward_f32(Context& ctx, const GlaBackwardArgs& args) {
  const Source source{.queries = Elements(args.q),
                      .values = Elements(args.v),
                      .outputs = Elements(nullptr, false),
                      .d_outputs = Elements(args.d_o),
                      .d_queries = Elements(args.dq),
                      .d_values = Elements(args.dv),
                      .keys = args.k.f32(),
                      .gates = args.g.f32(),
                      .d_keys = args.dk.f32(),
                      .d_gates = args.dg.f32(),
                      .heads = static_cast<int>(args.q.shape[1]),
                      .rows = static_cast<int>(args.q.shape[2]),
                      .columns = static_cast<int>(args.v.shape[2]),
                      .scale = 1 / std::sqrt(static_cast<float>(args.q.shape[2]))};
  decayed_backward(ctx, "gla_backward", source, args.sequences);
}

}  // namespace deltafox::cuda
