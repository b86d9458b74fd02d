// See ops/gla.h for the equations. One task is one head of one sequence: its chunks follow one
// another, so a task's result does not depend on the number of threads or on other sequences.
#include "ops/gla.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gla.cc"
#include <hwy/foreach_target.h>

#include "cpu/chunk-inl.h"
#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = kGlaChunk;
// Shorter chunks cost less by the recurrence.
constexpr std::int64_t kMinChunk = 6;

struct Head {
  std::int64_t key_dim;    // K
  std::int64_t value_dim;  // V
  HeadRows q, k, g, v;
  float* o;
  std::int64_t o_stride;
  float* state;  // [K, V]
  float scale;   // 1 / √K
};

// Memory of a chunk; K and V are rounded up to 16, and what is beyond a row's end is zero.
struct Chunk {
  std::int64_t key_stride, value_stride;
  float* q;       // [16, K], scaled by 1 / √K; row t turns into q_t ⊙ Γ_t
  float* k;       // [16, K], row s turns into k_s ⊙ Π_{r>s} g_r
  float* g;       // [16, K]
  float* gamma;   // [K], Γ
  float* v;       // [16, V]
  float* o;       // [16, V]
  float* scores;  // [16, 16], A
  float* state;   // [K, V]

  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim) {
    const std::int64_t keys = round_up(key_dim);
    const std::int64_t values = round_up(value_dim);
    return (3 * kChunk + 1) * keys + 2 * kChunk * values + kChunk * kChunk + keys * values;
  }
  Chunk(float* memory, std::int64_t key_dim, std::int64_t value_dim)
      : key_stride(round_up(key_dim)), value_stride(round_up(value_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    q = take(kChunk * key_stride);
    k = take(kChunk * key_stride);
    g = take(kChunk * key_stride);
    gamma = take(key_stride);
    v = take(kChunk * value_stride);
    o = take(kChunk * value_stride);
    scores = take(kChunk * kChunk);
    state = take(key_stride * value_stride);
  }
};

// k ← g ⊙ k; returns q · k.
HWY_INLINE float decay_and_dot(const float* g, const float* q, float* k, std::int64_t size) {
  VF32 sum = hn::Zero(kF32);
  for (std::int64_t i = 0; i < size; i += lanes()) {
    const VF32 key = hn::Mul(load(g + i), load(k + i));
    store(key, k + i);
    sum = hn::MulAdd(load(q + i), key, sum);
  }
  return sum_of(sum);
}

HWY_INLINE float dot(const float* a, const float* b, std::int64_t size) {
  VF32 sum = hn::Zero(kF32);
  for (std::int64_t i = 0; i < size; i += lanes()) sum = hn::MulAdd(load(a + i), load(b + i), sum);
  return sum_of(sum);
}

// A, and what the chunk's comments say that rows of q and k turn into.
HWY_INLINE void decay_rows(const Chunk& chunk, std::int64_t length) {
  const std::int64_t keys = chunk.key_stride;
  std::fill(chunk.scores, chunk.scores + kChunk * kChunk, 0.0f);
  std::fill(chunk.gamma, chunk.gamma + keys, 1.0f);
  for (std::int64_t t = 0; t < length; ++t) {
    float* q = chunk.q + t * keys;
    const float* g = chunk.g + t * keys;
    for (std::int64_t s = 0; s < t; ++s) {
      chunk.scores[t * kChunk + s] = decay_and_dot(g, q, chunk.k + s * keys, keys);
    }
    chunk.scores[t * kChunk + t] = dot(q, chunk.k + t * keys, keys);
    for (std::int64_t i = 0; i < keys; i += lanes()) {
      const VF32 gamma = hn::Mul(load(chunk.gamma + i), load(g + i));
      store(gamma, chunk.gamma + i);
      store(hn::Mul(load(q + i), gamma), q + i);
    }
  }
}

HWY_INLINE void chunk_forward(const Head& head, const Chunk& chunk, float* state,
                              std::int64_t begin, std::int64_t length) {
  const std::int64_t keys = chunk.key_stride;
  const std::int64_t values = chunk.value_stride;
  load_rows(head.q, begin, length, head.key_dim, head.scale, chunk.q, keys);
  load_rows(head.k, begin, length, head.key_dim, 1, chunk.k, keys);
  load_rows(head.g, begin, length, head.key_dim, 1, chunk.g, keys);
  load_rows(head.v, begin, length, head.value_dim, 1, chunk.v, values);
  decay_rows(chunk, length);

  // O = (Q ⊙ Γ) S + A V
  std::fill(chunk.o, chunk.o + length * values, 0.0f);
  small_gemm(length, values, keys, {chunk.q, keys, 1}, state, values, chunk.o, values);
  small_gemm(length, values, length, {chunk.scores, kChunk, 1}, chunk.v, values, chunk.o, values);
  for (std::int64_t t = 0; t < length; ++t) {
    std::copy_n(chunk.o + t * values, head.value_dim, head.o + (begin + t) * head.o_stride);
  }

  for (std::int64_t i = 0; i < keys; ++i) {
    const VF32 gamma = hn::Set(kF32, chunk.gamma[i]);
    float* row = state + i * values;
    for (std::int64_t j = 0; j < values; j += lanes())
      store(hn::Mul(gamma, load(row + j)), row + j);
  }
  small_gemm(keys, values, length, {chunk.k, 1, keys}, chunk.v, values, state, values);
}

HWY_INLINE void recurrent_step(const Head& head, std::int64_t t) {
  const float* g = head.g.row(t);
  decayed_step(
      head.state, head.key_dim, head.value_dim, [g](std::int64_t i) { return g[i]; }, head.k.row(t),
      head.v.row(t), head.q.row(t), head.scale, head.o + t * head.o_stride);
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
  for (std::int64_t t = chunked; t < length; ++t) recurrent_step(head, t);
}

}  // namespace

void gla_target(Context& ctx, const GlaArgs& args) {
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
        .g = {args.g.f32() + row * key_dim, heads * key_dim},
        .v = {args.v.f32() + row * value_dim, heads * value_dim},
        .o = args.o.f32() + row * value_dim,
        .o_stride = heads * value_dim,
        .state = args.states[static_cast<std::size_t>(b)] + h * key_dim * value_dim,
        .scale = 1 / std::sqrt(static_cast<float>(key_dim)),
    };
    head_forward(head, args.sequences.length(b), slots + slot * slot_floats);
  });
}

namespace {

struct BackwardHead {
  std::int64_t key_dim;    // K
  std::int64_t value_dim;  // V
  HeadRows q, k, g, v, d_o;
  float *dq, *dk, *dg, *dv;
  float scale;  // 1 / √K
};

// Memory of a head; V is rounded up to 16, and what is beyond a row's end is zero.
struct BackwardChunk {
  std::int64_t values;
  float* v;       // [16, V]
  float* d_o;     // [16, V], scaled by 1 / √K
  float* dv;      // [16, V]
  float* rows;    // [17, V], one row of the state before each token and behind the last
  float* ds;      // [K, V], of the state behind the token at hand
  float* states;  // of each chunk [K, V], before it

  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim, std::int64_t chunks) {
    return round_up(value_dim) * (4 * kChunk + 1 + (chunks + 1) * key_dim);
  }
  BackwardChunk(float* memory, std::int64_t key_dim, std::int64_t value_dim)
      : values(round_up(value_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n * values); };
    v = take(kChunk);
    d_o = take(kChunk);
    dv = take(kChunk);
    rows = take(kChunk + 1);
    ds = take(key_dim);
    states = memory;
  }
};

// to = g · from + k · v
HWY_INLINE void advance_row(float g, const float* from, float k, const float* v, float* to,
                            std::int64_t size) {
  const VF32 gate = hn::Set(kF32, g);
  const VF32 key = hn::Set(kF32, k);
  for (std::int64_t j = 0; j < size; j += lanes()) {
    store(hn::MulAdd(key, load(v + j), hn::Mul(gate, load(from + j))), to + j);
  }
}

// Token t of the chunk, row i of the state, the tokens behind it done.
HWY_INLINE void row_backward(const BackwardHead& head, const BackwardChunk& chunk,
                             std::int64_t begin, std::int64_t t, std::int64_t i) {
  const std::int64_t size = chunk.values;
  const std::int64_t at = (begin + t) * head.q.stride + i;
  const VF32 query = hn::Set(kF32, head.q.data[at]);
  const VF32 key = hn::Set(kF32, head.k.data[at]);
  const VF32 gate = hn::Set(kF32, head.g.data[at]);
  const float* before = chunk.rows + t * size;
  const float* after = before + size;
  float* ds = chunk.ds + i * size;
  VF32 dq = hn::Zero(kF32);
  VF32 dk = hn::Zero(kF32);
  VF32 dg = hn::Zero(kF32);
  for (std::int64_t j = 0; j < size; j += lanes()) {
    const VF32 d_o = load(chunk.d_o + t * size + j);
    const VF32 d = hn::MulAdd(query, d_o, load(ds + j));
    dq = hn::MulAdd(load(after + j), d_o, dq);
    dk = hn::MulAdd(d, load(chunk.v + t * size + j), dk);
    dg = hn::MulAdd(d, load(before + j), dg);
    float* dv = chunk.dv + t * size + j;
    store(hn::MulAdd(key, d, load(dv)), dv);
    store(hn::Mul(gate, d), ds + j);
  }
  head.dq[at] = sum_of(dq);
  head.dk[at] = sum_of(dk);
  head.dg[at] = sum_of(dg);
}

// By the recurrence: rows of the state do not depend on one another, so that one row passes all
// tokens of a chunk in the first-level cache. What a chunk starts from is kept, what lies within it
// is computed again.
HWY_INLINE void head_backward(const BackwardHead& head, const BackwardChunk& chunk,
                              std::int64_t length) {
  const std::int64_t size = chunk.values;
  const std::int64_t state_floats = head.key_dim * size;
  const std::int64_t count = (length + kChunk - 1) / kChunk;
  std::fill(chunk.states, chunk.states + state_floats, 0.0f);
  for (std::int64_t c = 0; c + 1 < count; ++c) {
    const std::int64_t begin = c * kChunk;
    load_rows(head.v, begin, kChunk, head.value_dim, 1, chunk.v, size);
    const float* before = chunk.states + c * state_floats;
    float* after = chunk.states + (c + 1) * state_floats;
    for (std::int64_t i = 0; i < head.key_dim; ++i) {
      for (std::int64_t t = 0; t < kChunk; ++t) {
        const std::int64_t at = (begin + t) * head.q.stride + i;
        advance_row(head.g.data[at], (t == 0 ? before : after) + i * size, head.k.data[at],
                    chunk.v + t * size, after + i * size, size);
      }
    }
  }
  std::fill(chunk.ds, chunk.ds + state_floats, 0.0f);
  for (std::int64_t c = count - 1; c >= 0; --c) {
    const std::int64_t begin = c * kChunk;
    const std::int64_t tokens = std::min(kChunk, length - begin);
    load_rows(head.v, begin, tokens, head.value_dim, 1, chunk.v, size);
    load_rows(head.d_o, begin, tokens, head.value_dim, head.scale, chunk.d_o, size);
    std::fill(chunk.dv, chunk.dv + tokens * size, 0.0f);
    for (std::int64_t i = 0; i < head.key_dim; ++i) {
      std::copy_n(chunk.states + c * state_floats + i * size, size, chunk.rows);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const std::int64_t at = (begin + t) * head.q.stride + i;
        advance_row(head.g.data[at], chunk.rows + t * size, head.k.data[at], chunk.v + t * size,
                    chunk.rows + (t + 1) * size, size);
      }
      for (std::int64_t t = tokens - 1; t >= 0; --t) row_backward(head, chunk, begin, t, i);
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::copy_n(chunk.dv + t * size, head.value_dim, head.dv + (begin + t) * head.v.stride);
    }
  }
}

}  // namespace

void gla_backward_target(Context& ctx, const GlaBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    longest = std::max(longest, args.sequences.length(b));
  }
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats =
      BackwardChunk::floats(key_dim, value_dim, (longest + kChunk - 1) / kChunk);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  ctx.threads().parallel_for(args.sequences.count() * heads, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / heads;
    const std::int64_t row = args.sequences.begin(b) * heads + task % heads;
    const auto keys_at = [&](const auto& view) { return view.f32() + row * key_dim; };
    const auto values_at = [&](const auto& view) { return view.f32() + row * value_dim; };
    const BackwardHead head{
        .key_dim = key_dim,
        .value_dim = value_dim,
        .q = {keys_at(args.q), heads * key_dim},
        .k = {keys_at(args.k), heads * key_dim},
        .g = {keys_at(args.g), heads * key_dim},
        .v = {values_at(args.v), heads * value_dim},
        .d_o = {values_at(args.d_o), heads * value_dim},
        .dq = keys_at(args.dq),
        .dk = keys_at(args.dk),
        .dg = keys_at(args.dg),
        .dv = values_at(args.dv),
        .scale = 1 / std::sqrt(static_cast<float>(key_dim)),
    };
    head_backward(head, {slots + slot * slot_floats, key_dim, value_dim}, args.sequences.length(b));
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(gla_target);
HWY_EXPORT(gla_backward_target);
void gla(Context& ctx, const GlaArgs& args) {
  HWY_DYNAMIC_DISPATCH(gla_target)(ctx, args);
}
void gla_backward(Context& ctx, const GlaBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(gla_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
