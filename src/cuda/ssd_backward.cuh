// What the ways to the state space's gradients share (the equations are in ops/ssd.h).
#pragma once

#include "core/context.h"
#include "core/sequences.h"
#include "cuda/rows.cuh"

namespace deltafox::cuda {

struct SsdGradients {
  Elements xbc, dy, dxbc;
  const float* dt;       // [T, H]
  const float* dt_bias;  // [H]
  const float* a_log;    // [H]
  const float* d;        // [H]
  float dt_min, dt_max;
  std::int64_t tokens;
  int heads, groups, state_size, head_dim;
  int shares;      // of db and dc, by a head or several
  float* db;       // [T, shares, N]
  float* dc;       // [T, shares, N]
  float* ddt;      // [T, H]
  float* d_a_log;  // [T, H], each token's share
  float* dd;       // [T, H]

  __device__ std::ptrdiff_t row_size() const {
    return static_cast<std::ptrdiff_t>(heads) * head_dim + 2 * groups * state_size;
  }
  __device__ std::ptrdiff_t x_at(std::ptrdiff_t token, int head, int p) const {
    return token * row_size() + head * head_dim + p;
  }
  __device__ std::ptrdiff_t b_at(std::ptrdiff_t token, int group, int n) const {
    return token * row_size() + heads * head_dim + group * state_size + n;
  }
  __device__ std::ptrdiff_t c_at(std::ptrdiff_t token, int group, int n) const {
    return b_at(token, groups + group, n);
  }
  __device__ std::ptrdiff_t scalar_at(std::ptrdiff_t token, int head) const {
    return token * heads + head;
  }
  __device__ float softplus(float raw) const {
    return fmaxf(raw, 0.0F) + log1pf(expf(-fabsf(raw)));
  }
  // Δ of a token and head.
  __device__ float step(std::ptrdiff_t scalar, int head) const {
    return fminf(fmaxf(softplus(dt[scalar] + dt_bias[head]), dt_min), dt_max);
  }
  // ddt and the parameters' shares, from du·x, dy·x and the gradient of log a.
  __device__ void finish_token(std::ptrdiff_t scalar, int head, float du_x, float dy_x,
                               float d_log_a) const {
    const float raw = dt[scalar] + dt_bias[head];
    const float soft = softplus(raw);
    const bool clamped = soft < dt_min || soft > dt_max;
    const float of_step = -expf(a_log[head]) * d_log_a;
    ddt[scalar] = clamped ? 0 : (du_x + of_step) * sigmoid(raw);
    d_a_log[scalar] = fminf(fmaxf(soft, dt_min), dt_max) * of_step;
    dd[scalar] = dy_x;
  }
};

// In chunks of 64 rows on the tensor cores: bfloat16, P = 64, N 64 or 128. Heads are worked on
// ssd_heads_at_once at a time, whose db and dc are one share.
bool ssd_backward_chunks_fit(const SsdGradients& p);
int ssd_heads_at_once(int heads_of_group);
void ssd_backward_chunks(Context& ctx, const SsdGradients& p, const Sequences& sequences);

}  // namespace deltafox::cuda
