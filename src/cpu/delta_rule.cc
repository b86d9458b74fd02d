// See ops/delta_rule.h for the equations. One task is one head of one sequence: its chunks follow
// one another, so a task's result does not depend on the number of threads or on other sequences.
#include "ops/delta_rule.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/delta_rule.cc"
#include <hwy/foreach_target.h>

#include "cpu/chunk-inl.h"
#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = kDeltaRuleChunk;
// Shorter chunks cost less by the recurrence.
constexpr std::int64_t kMinChunk = 12;

struct Head {
  std::int64_t key_dim;    // K
  std::int64_t value_dim;  // V
  HeadRows q, k, v;
  const float* beta;  // null: ones
  std::int64_t beta_stride;
  float* o;
  std::int64_t o_stride;
  float* state;  // [K, V]
  float scale;   // 1 / √K

  float beta_at(std::int64_t t) const { return beta != nullptr ? beta[t * beta_stride] : 1.0f; }
};

// Memory of a chunk; K and V are rounded up to 16, and what is beyond a row's end is zero.
struct Chunk {
  std::int64_t key_stride, value_stride;
  float* q;       // [64, K], scaled by 1 / √K
  float* k;       // [64, K]
  float* k_t;     // [K, 64]
  float* u;       // [64, V]
  float* o;       // [64, V]
  float* scores;  // [64, 64]
  float* state;   // [K, V]

  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim) {
    const std::int64_t keys = round_up(key_dim);
    const std::int64_t values = round_up(value_dim);
    return 3 * kChunk * keys + 2 * kChunk * values + kChunk * kChunk + keys * values;
  }
  Chunk(float* memory, std::int64_t key_dim, std::int64_t value_dim)
      : key_stride(round_up(key_dim)), value_stride(round_up(value_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    q = take(kChunk * key_stride);
    k = take(kChunk * key_stride);
    k_t = take(kChunk * key_stride);
    u = take(kChunk * value_stride);
    o = take(kChunk * value_stride);
    scores = take(kChunk * kChunk);
    state = take(key_stride * value_stride);
  }
};

// One token by the recurrence. One pass over the state yields both Sᵀk and Sᵀq of the state before
// the update; o = (Sᵀq + (q·k) u) / √K.
HWY_INLINE void recurrent_step(const Head& head, std::int64_t t, float* u) {
  const float* q = head.q.row(t);
  const float* k = head.k.row(t);
  const float* v = head.v.row(t);
  float* o = head.o + t * head.o_stride;
  const VF32 beta = hn::Set(kF32, head.beta_at(t));
  float qk = 0;
  for (std::int64_t i = 0; i < head.key_dim; ++i) qk += q[i] * k[i];
  const auto column = [&](std::int64_t j, auto&& load_vector, auto&& store_vector) HWY_ATTR {
    VF32 state_k = hn::Zero(kF32);
    VF32 state_q = hn::Zero(kF32);
    for (std::int64_t i = 0; i < head.key_dim; ++i) {
      const VF32 s = load_vector(head.state + i * head.value_dim + j);
      state_k = hn::MulAdd(s, hn::Set(kF32, k[i]), state_k);
      state_q = hn::MulAdd(s, hn::Set(kF32, q[i]), state_q);
    }
    const VF32 update = hn::Mul(beta, hn::Sub(load_vector(v + j), state_k));
    store_vector(update, u + j);
    const VF32 sum = hn::MulAdd(hn::Set(kF32, qk), update, state_q);
    store_vector(hn::Mul(sum, hn::Set(kF32, head.scale)), o + j);
  };
  for_row(
      head.value_dim,
      [&](std::int64_t j) HWY_ATTR {
        column(
            j, [](const float* p) HWY_ATTR { return load(p); },
            [](VF32 x, float* p) HWY_ATTR { store(x, p); });
      },
      [&](std::int64_t j, std::int64_t n) HWY_ATTR {
        column(
            j, [n](const float* p) HWY_ATTR { return load_first(p, n); },
            [n](VF32 x, float* p) HWY_ATTR { store_first(x, p, n); });
      });
  for (std::int64_t i = 0; i < head.key_dim; ++i) {
    float* row = head.state + i * head.value_dim;
    const VF32 key = hn::Set(kF32, k[i]);
    for_row(
        head.value_dim,
        [&](std::int64_t j)
            HWY_ATTR { store(hn::MulAdd(key, load(u + j), load(row + j)), row + j); },
        [&](std::int64_t j, std::int64_t n) HWY_ATTR {
          store_first(hn::MulAdd(key, load_first(u + j, n), load_first(row + j, n)), row + j, n);
        });
  }
}

// scores = tril(left · k_tᵀ): rows [0, length), the diagonal included; garbage above it in its
// blocks.
HWY_INLINE void lower_scores(const Chunk& chunk, const float* left, std::int64_t length) {
  std::fill(chunk.scores, chunk.scores + round_up(length) * kChunk, 0.0f);
  for (std::int64_t r = 0; r < length; r += kBlock) {
    small_gemm(kBlock, r + kBlock, chunk.key_stride,
               {left + r * chunk.key_stride, chunk.key_stride, 1}, chunk.k_t, kChunk,
               chunk.scores + r * kChunk, kChunk);
  }
}

// Solves (I + diag(β) tril(scores, −1)) U = R in place of R, by blocks of rows.
HWY_INLINE void forward_substitution(const Chunk& chunk, const Head& head, std::int64_t begin,
                                     std::int64_t length) {
  const std::int64_t stride = chunk.value_stride;
  for (std::int64_t i = 0; i < length; ++i) {
    const float beta = head.beta_at(begin + i);
    for (std::int64_t j = 0; j < i; ++j) chunk.scores[i * kChunk + j] *= beta;
  }
  for (std::int64_t r = 0; r < length; r += kBlock) {
    small_gemm(kBlock, stride, r, {chunk.scores + r * kChunk, kChunk, 1}, chunk.u, stride,
               chunk.u + r * stride, stride, -1);
    for (std::int64_t i = r; i < std::min(r + kBlock, length); ++i) {
      small_gemm(1, stride, i - r, {chunk.scores + i * kChunk + r, kChunk, 1}, chunk.u + r * stride,
                 stride, chunk.u + i * stride, stride, -1);
    }
  }
}

HWY_INLINE void chunk_forward(const Head& head, const Chunk& chunk, float* state,
                              std::int64_t begin, std::int64_t length) {
  const std::int64_t keys = chunk.key_stride;
  const std::int64_t values = chunk.value_stride;
  const std::int64_t rows = round_up(length);
  load_rows(head.q, begin, length, head.key_dim, head.scale, chunk.q, keys);
  load_rows(head.k, begin, length, head.key_dim, 1, chunk.k, keys);
  load_rows(head.v, begin, length, head.value_dim, 1, chunk.u, values);
  for (std::int64_t i = 0; i < keys; ++i) {
    for (std::int64_t t = 0; t < rows; ++t) chunk.k_t[i * kChunk + t] = chunk.k[t * keys + i];
  }

  // U: R = diag(β) (V − K S), then the triangular solve.
  small_gemm(rows, values, keys, {chunk.k, keys, 1}, state, values, chunk.u, values, -1);
  for (std::int64_t t = 0; t < length; ++t) {
    const float beta = head.beta_at(begin + t);
    for (std::int64_t j = 0; j < values; ++j) chunk.u[t * values + j] *= beta;
  }
  lower_scores(chunk, chunk.k, length);
  forward_substitution(chunk, head, begin, length);

  // O = Q S + tril(Q Kᵀ) U
  std::fill(chunk.o, chunk.o + rows * values, 0.0f);
  small_gemm(rows, values, keys, {chunk.q, keys, 1}, state, values, chunk.o, values);
  lower_scores(chunk, chunk.q, length);
  for (std::int64_t t = 0; t < rows; ++t) {
    std::fill(chunk.scores + t * kChunk + t + 1, chunk.scores + t * kChunk + round_up(t + 1), 0.0f);
  }
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, values, r + kBlock, {chunk.scores + r * kChunk, kChunk, 1}, chunk.u, values,
               chunk.o + r * values, values);
  }
  for (std::int64_t t = 0; t < length; ++t) {
    std::copy_n(chunk.o + t * values, head.value_dim, head.o + (begin + t) * head.o_stride);
  }

  // S += Kᵀ U
  small_gemm(keys, values, length, {chunk.k_t, kChunk, 1}, chunk.u, values, state, values);
}

HWY_INLINE void head_forward(const Head& head, std::int64_t length, float* memory) {
  const Chunk chunk(memory, head.key_dim, head.value_dim);
  const std::int64_t tail = length % kChunk;
  const std::int64_t chunked = tail < kMinChunk ? length - tail : length;
  if (chunked > 0) {
    with_padded_state(head.state, head.key_dim, head.value_dim, chunk.state,
                      [&](float* state) HWY_ATTR {
                        for (std::int64_t t = 0; t < chunked; t += kChunk) {
                          chunk_forward(head, chunk, state, t, std::min(kChunk, chunked - t));
                        }
                      });
  }
  for (std::int64_t t = chunked; t < length; ++t) recurrent_step(head, t, chunk.u);
}

}  // namespace

void delta_rule_target(Context& ctx, const DeltaRuleArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = Chunk::floats(key_dim, value_dim);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  ctx.threads().parallel_for(args.sequences.count() * heads, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / heads;
    const std::int64_t h = task % heads;
    const std::int64_t row = args.sequences.begin(b) * heads + h;
    const Head head{
        .key_dim = key_dim,
        .value_dim = value_dim,
        .q = {args.q.f32() + row * key_dim, heads * key_dim},
        .k = {args.k.f32() + row * key_dim, heads * key_dim},
        .v = {args.v.f32() + row * value_dim, heads * value_dim},
        .beta = args.beta.data != nullptr ? args.beta.f32() + row : nullptr,
        .beta_stride = heads,
        .o = args.o.f32() + row * value_dim,
        .o_stride = heads * value_dim,
        .state = args.states[static_cast<std::size_t>(b)] + h * key_dim * value_dim,
        .scale = 1 / std::sqrt(static_cast<float>(key_dim)),
    };
    head_forward(head, args.sequences.length(b), slots + slot * slot_floats);
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(delta_rule_target);
void delta_rule(Context& ctx, const DeltaRuleArgs& args) {
  HWY_DYNAMIC_DISPATCH(delta_rule_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
