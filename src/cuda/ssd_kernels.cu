// Mamba-2's state space (ops/ssd.h), row by row in float32.
#include "cuda/decayed_kernels.h"
#include "cuda/decayed_recurrence.cuh"
#include "cuda/rows.cuh"

namespace deltafox::cuda {
namespace {

template <typename T>
struct SsdSource {
  const T* xbc;          // [T, H·P + 2·G·N]
  const float* dt;       // [T, H]
  const float* dt_bias;  // [H]
  const float* a_log;    // [H]
  const float* d;        // [H]
  const float* z;        // [T, H, P] or null
  T* y;                  // [T, H, P]
  float dt_min;
  float dt_max;
  int heads;
  int heads_per_group;
  int groups;
  int rows;     // N
  int columns;  // P

  __device__ const T* token_row(std::ptrdiff_t token) const {
    return xbc + token * (static_cast<std::ptrdiff_t>(heads) * columns + 2 * groups * rows);
  }

  template <int kRows>
  struct Row {
    float q[kRows];  // c
    float k[kRows];  // b
    float v[4];      // Δ x
    float a;

    __device__ float decay(int /*r*/) const { return a; }
    __device__ void load(const SsdSource& s, std::ptrdiff_t token, int head, int row_group,
                         int column) {
      const T* row = s.token_row(token);
      const T* b = row + s.heads * s.columns + head / s.heads_per_group * s.rows;
      const T* c = b + s.groups * s.rows;
      // Of x, b and c of every token.
      const bool aligned = s.rows % 4 == 0 && s.columns % 4 == 0;
      load_part(k, b, row_group * kRows, s.rows, aligned);
      load_part(q, c, row_group * kRows, s.rows, aligned);
      const float raw = s.dt[token * s.heads + head] + s.dt_bias[head];
      const float softplus = fmaxf(raw, 0.0F) + log1pf(expf(-fabsf(raw)));
      const float step = fminf(fmaxf(softplus, s.dt_min), s.dt_max);
      a = expf(-expf(s.a_log[head]) * step);
      const int count = count_columns(column, s.columns);
      load_four(v, row + head * s.columns + column, count == kVector && !aligned ? 4 : count);
#pragma unroll
      for (float& x : v) x *= step;
    }
  };

  __device__ void prefetch_token(std::ptrdiff_t token, int head, int row, int column) const {
    const T* x = token_row(token);
    const T* b = x + heads * columns + head / heads_per_group * rows + row;
    if (row < rows) {
      prefetch(b);
      prefetch(b + groups * rows);
    }
    if (column < columns) prefetch(x + head * columns + column);
    if (row == 0) prefetch(dt + token * heads + head);
  }

  __device__ void finish(std::ptrdiff_t token, int head, int column, float sum) const {
    const float x = to_float(token_row(token)[head * columns + column]);
    const std::ptrdiff_t at = (token * heads + head) * columns + column;
    sum += d[head] * x;
    if (z != nullptr) sum *= z[at] * sigmoid(z[at]);
    from_float(y[at], sum);
  }
};

template <typename T>
void launch(Context& ctx, const SsdProblem& p, const SequenceBatch& batch) {
  const SsdSource<T> source{
      .xbc = static_cast<const T*>(p.xbc),
      .dt = p.dt,
      .dt_bias = p.dt_bias,
      .a_log = p.a_log,
      .d = p.d,
      .z = p.z,
      .y = static_cast<T*>(p.y),
      .dt_min = p.dt_min,
      .dt_max = p.dt_max,
      .heads = p.heads,
      .heads_per_group = p.heads / p.groups,
      .groups = p.groups,
      .rows = p.state_size,
      .columns = p.head_dim,
  };
  launch_decayed_recurrence(ctx, source, p.heads, batch);
}

}  // namespace

void launch_ssd(Context& ctx, const SsdProblem& problem, const SequenceBatch& batch) {
  problem.is_bf16 ? launch<bf16>(ctx, problem, batch) : launch<float>(ctx, problem, batch);
}

}  // namespace deltafox::cuda
