// Gated linear attention (ops/gla.h), row by row in float32.
#include <cmath>

#include "cuda/decayed_kernels.h"
#include "cuda/decayed_recurrence.cuh"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

template <typename T>
struct GlaSource {
  const T* q;      // [T, H, K]
  const float* k;  // [T, H, K]
  const float* g;  // [T, H, K]
  const T* v;      // [T, H, V]
  T* o;            // [T, H, V]
  int heads;
  int rows;     // K
  int columns;  // V
  float scale;

  template <int kRows>
  struct Row {
    float q[kRows];
    float k[kRows];
    float g[kRows];
    float v[4];

    __device__ float decay(int r) const { return g[r]; }
    __device__ void load(const GlaSource& s, std::ptrdiff_t token, int head, int row_group,
                         int column) {
      const std::ptrdiff_t at = token * s.heads + head;
      const bool aligned = s.rows % 4 == 0;
      const int first = row_group * kRows;
      load_part(q, s.q + at * s.rows, first, s.rows, aligned);
      load_part(k, s.k + at * s.rows, first, s.rows, aligned);
      load_part(g, s.g + at * s.rows, first, s.rows, aligned);
      load_four(v, s.v + at * s.columns + column, count_columns(column, s.columns));
    }
  };

  __device__ void prefetch_token(std::ptrdiff_t token, int head, int row, int column) const {
    const std::ptrdiff_t at = token * heads + head;
    if (row < rows) {
      prefetch(q + at * rows + row);
      prefetch(k + at * rows + row);
      prefetch(g + at * rows + row);
    }
    if (column < columns) prefetch(v + at * columns + column);
  }

  __device__ void finish(std::ptrdiff_t token, int head, int column, float sum) const {
    from_float(o[(token * heads + head) * columns + column], sum * scale);
  }
};

struct GlaStepSource {
  const float* q;
  const float* f;
  const float* v;
  float* o;
  int heads;
  int rows;
  int columns;
  float scale;

  template <int kRows>
  struct Row {
    float q[kRows];
    float k[kRows];
    float g[kRows];
    float v[4];

    __device__ float decay(int r) const { return g[r]; }
    __device__ void load(const GlaStepSource& s, std::ptrdiff_t token, int head, int row_group,
                         int column) {
      const std::ptrdiff_t at = token * s.heads + head;
      const bool aligned = s.rows % 4 == 0;
      const int first = row_group * kRows;
      load_part(q, s.q + at * s.rows, first, s.rows, aligned);
      load_part(g, s.f + at * s.rows, first, s.rows, aligned);
      load_four(v, s.v + at * s.columns + column, count_columns(column, s.columns));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        q[r] *= sigmoid(q[r]);
        k[r] = first + r < s.rows ? sigmoid(-g[r]) : 0;
        g[r] = sigmoid(g[r]);
      }
    }
  };

  __device__ void prefetch_token(std::ptrdiff_t, int, int, int) const {}
  __device__ void finish(std::ptrdiff_t token, int head, int column, float sum) const {
    o[(token * heads + head) * columns + column] = sum * scale;
  }
};

template <typename T>
void launch(Context& ctx, const GlaProblem& p, const SequenceBatch& batch) {
  const GlaSource<T> source{
      .q = static_cast<const T*>(p.q),
      .k = p.k,
      .g = p.g,
      .v = static_cast<const T*>(p.v),
      .o = static_cast<T*>(p.o),
      .heads = p.heads,
      .rows = p.key_dim,
      .columns = p.value_dim,
      .scale = 1 / std::sqrt(static_cast<float>(p.key_dim)),
  };
  launch_decayed_recurrence(ctx, source, p.heads, batch);
}

}  // namespace

void launch_gla_step(Context& ctx, const GlaStepProblem& p, const SequenceBatch& batch) {
  const GlaStepSource source{.q = p.q,
                             .f = p.f,
                             .v = p.v,
                             .o = p.o,
                             .heads = p.heads,
                             .rows = p.key_dim,
                             .columns = p.value_dim,
                             .scale = 1 / std::sqrt(static_cast<float>(p.key_dim))};
  launch_decayed_recurrence(ctx, source, p.heads, batch);
}

void launch_gla(Context& ctx, const GlaProblem& problem, const SequenceBatch& batch) {
  problem.is_bf16 ? launch<bf16>(ctx, problem, batch) : launch<float>(ctx, problem, batch);
}

}  // namespace deltafox::cuda
