// See ops/ssd.h for the equations. First C Bᵀ of every chunk, once a group; then one task is one
// head of one sequence. Chunks of a task follow one another, so a result does not depend on the
// number of threads or on other sequences.
#include "ops/ssd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/ssd.cc"
#include <hwy/foreach_target.h>

#include <limits>

#include "cpu/chunk-inl.h"
#include "cpu/small_gemm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace deltafox::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kChunk = kSsdChunk;
// Shorter chunks cost less by the recurrence.
constexpr std::int64_t kMinChunk = 6;

// The part of a sequence of `length` tokens that goes by chunks.
HWY_INLINE std::int64_t chunked_length(std::int64_t length) {
  const std::int64_t tail = length % kChunk;
  return tail < kMinChunk ? length - tail : length;
}

// One head of one sequence.
struct Head {
  std::int64_t state_size;  // N
  std::int64_t head_dim;    // P
  HeadRows x, b, c, dt;
  const float* scores;  // [tokens of the sequence, 32], C Bᵀ within each chunk
  std::int64_t score_stride;
  float dt_bias;
  float decay_rate;  // e^a_log
  float d, dt_min, dt_max;
  float* y;
  std::int64_t y_stride;
  float* state;  // [N, P]
};

// Memory of a chunk; P is rounded up to 16, and what is beyond a row's end is zero.
struct Chunk {
  std::int64_t head_stride;
  float* b;           // [32, N]
  float* c;           // [32, N]
  float* u;           // [32, P]
  float* y;           // [32, P]
  float* scores;      // [32, 32], tril(C Bᵀ) ⊙ A
  float* dt;          // [32], Δ
  float* from_start;  // [32], log A_t0 and then A_t0
  float* to_token;    // [32], log A_ts for the t at hand, and at last A_ns
  float* state;       // [N, P]

  static std::int64_t floats(std::int64_t state_size, std::int64_t head_dim) {
    const std::int64_t keys = round_up(state_size);
    const std::int64_t width = round_up(head_dim);
    return kChunk * (2 * keys + 2 * width + kChunk + 3) + keys * width;
  }
  Chunk(float* memory, std::int64_t state_size, std::int64_t head_dim)
      : head_stride(round_up(head_dim)) {
    const std::int64_t keys = round_up(state_size);
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    b = take(kChunk * keys);
    c = take(kChunk * keys);
    u = take(kChunk * head_stride);
    y = take(kChunk * head_stride);
    scores = take(kChunk * kChunk);
    dt = take(kChunk);
    from_start = take(kChunk);
    to_token = take(kChunk);
    state = take(keys * head_stride);
  }
};

// Δ of `length` tokens from token `begin`.
HWY_INLINE void time_steps(const Head& head, std::int64_t begin, std::int64_t length, float* dt) {
  std::fill(dt, dt + kChunk, 0.0f);
  for (std::int64_t t = 0; t < length; ++t) dt[t] = *head.dt.row(begin + t);
  for (std::int64_t t = 0; t < kChunk; t += lanes()) {
    const VF32 step = softplus(hn::Add(load(dt + t), hn::Set(kF32, head.dt_bias)));
    store(hn::Min(hn::Max(step, hn::Set(kF32, head.dt_min)), hn::Set(kF32, head.dt_max)), dt + t);
  }
}

HWY_INLINE void exponentiate(float* x) {
  for (std::int64_t t = 0; t < kChunk; t += lanes()) store(hn::Exp(kF32, load(x + t)), x + t);
}

// The chunk's scores, from_start and to_token.
HWY_INLINE void decays(const Head& head, const Chunk& chunk, std::int64_t begin,
                       std::int64_t length) {
  // What lies ahead of t has weight zero.
  std::fill(chunk.to_token, chunk.to_token + kChunk, -std::numeric_limits<float>::infinity());
  std::fill(chunk.from_start, chunk.from_start + kChunk, 0.0f);
  float sum = 0;
  for (std::int64_t t = 0; t < length; ++t) {
    const float log_decay = -head.decay_rate * chunk.dt[t];
    sum += log_decay;
    chunk.from_start[t] = sum;
    const float* raw = head.scores + (begin + t) * head.score_stride;
    float* scores = chunk.scores + t * kChunk;
    for (std::int64_t s = 0; s < kChunk; s += lanes()) {
      store(hn::Add(load(chunk.to_token + s), hn::Set(kF32, log_decay)), chunk.to_token + s);
    }
    chunk.to_token[t] = 0;
    for (std::int64_t s = 0; s < kChunk; s += lanes()) {
      store(hn::Mul(load(raw + s), hn::Exp(kF32, load(chunk.to_token + s))), scores + s);
    }
  }
  exponentiate(chunk.from_start);
  exponentiate(chunk.to_token);
}

// to_t = factor_t · row t
HWY_INLINE void scaled_rows(HeadRows rows, std::int64_t begin, std::int64_t length,
                            std::int64_t width, const float* factors, float* to,
                            std::int64_t stride) {
  for (std::int64_t t = 0; t < length; ++t) {
    const float* from = rows.row(begin + t);
    for (std::int64_t i = 0; i < width; ++i) to[t * stride + i] = factors[t] * from[i];
    std::fill(to + t * stride + width, to + (t + 1) * stride, 0.0f);
  }
}

HWY_INLINE void chunk_forward(const Head& head, const Chunk& chunk, float* state,
                              std::int64_t begin, std::int64_t length) {
  const std::int64_t size = head.state_size;
  const std::int64_t width = chunk.head_stride;
  time_steps(head, begin, length, chunk.dt);
  decays(head, chunk, begin, length);
  scaled_rows(head.x, begin, length, head.head_dim, chunk.dt, chunk.u, width);
  scaled_rows(head.c, begin, length, size, chunk.from_start, chunk.c, size);
  scaled_rows(head.b, begin, length, size, chunk.to_token, chunk.b, size);

  std::fill(chunk.y, chunk.y + length * width, 0.0f);
  small_gemm(length, width, size, {chunk.c, size, 1}, state, width, chunk.y, width);
  small_gemm(length, width, length, {chunk.scores, kChunk, 1}, chunk.u, width, chunk.y, width);
  for (std::int64_t t = 0; t < length; ++t) {
    const float* x = head.x.row(begin + t);
    float* y = head.y + (begin + t) * head.y_stride;
    for (std::int64_t p = 0; p < head.head_dim; ++p) y[p] = chunk.y[t * width + p] + head.d * x[p];
  }

  const VF32 decay = hn::Set(kF32, chunk.from_start[length - 1]);
  for (std::int64_t i = 0; i < size * width; i += lanes()) {
    store(hn::Mul(decay, load(state + i)), state + i);
  }
  small_gemm(size, width, length, {chunk.b, 1, size}, chunk.u, width, state, width);
}

// Tokens [begin, begin + length) by the recurrence, length at most a chunk.
HWY_INLINE void recurrent_steps(const Head& head, const Chunk& chunk, std::int64_t begin,
                                std::int64_t length) {
  time_steps(head, begin, length, chunk.dt);
  for (std::int64_t t = 0; t < length; ++t) chunk.from_start[t] = -head.decay_rate * chunk.dt[t];
  exponentiate(chunk.from_start);
  scaled_rows(head.x, begin, length, head.head_dim, chunk.dt, chunk.u, chunk.head_stride);
  for (std::int64_t t = 0; t < length; ++t) {
    const float* x = head.x.row(begin + t);
    float* y = head.y + (begin + t) * head.y_stride;
    decayed_step(
        head.state, head.state_size, head.head_dim,
        [decay = chunk.from_start[t]](std::int64_t) { return decay; }, head.b.row(begin + t),
        chunk.u + t * chunk.head_stride, head.c.row(begin + t), 1, y);
    for (std::int64_t p = 0; p < head.head_dim; ++p) y[p] += head.d * x[p];
  }
}

HWY_INLINE void head_forward(const Head& head, std::int64_t length, float* memory) {
  const Chunk chunk(memory, head.state_size, head.head_dim);
  const std::int64_t chunked = chunked_length(length);
  if (chunked > 0) {
    with_padded_state(head.state, head.state_size, head.head_dim, chunk.state,
                      [&](float* state) HWY_ATTR {
                        for (std::int64_t t = 0; t < chunked; t += kChunk) {
                          chunk_forward(head, chunk, state, t, std::min(kChunk, chunked - t));
                        }
                      });
  }
  if (chunked < length) recurrent_steps(head, chunk, chunked, length - chunked);
}

// scores [length, 32] = C Bᵀ within each chunk of one group of one sequence.
HWY_INLINE void group_scores(HeadRows b, HeadRows c, std::int64_t state_size, std::int64_t length,
                             float* scores, std::int64_t stride, float* b_t /* [N, 32] */) {
  for (std::int64_t begin = 0; begin < length; begin += kChunk) {
    const std::int64_t rows = std::min(kChunk, length - begin);
    std::fill(b_t, b_t + state_size * kChunk, 0.0f);
    for (std::int64_t t = 0; t < rows; ++t) {
      const float* row = b.row(begin + t);
      for (std::int64_t n = 0; n < state_size; ++n) b_t[n * kChunk + t] = row[n];
    }
    float* out = scores + begin * stride;
    for (std::int64_t t = 0; t < rows; ++t) {
      std::fill(out + t * stride, out + t * stride + kChunk, 0.0f);
    }
    small_gemm(rows, kChunk, state_size, {c.row(begin), c.stride, 1}, b_t, kChunk, out, stride);
  }
}

}  // namespace

void ssd_target(Context& ctx, const SsdArgs& args) {
  const std::int64_t heads = args.y.shape[1];
  const std::int64_t head_dim = args.y.shape[2];
  const std::int64_t size = args.state_size();
  const std::int64_t groups = args.num_groups;
  const std::int64_t row = args.xbc.shape[1];
  const std::int64_t count = args.sequences.count();
  const auto rows_from = [&](std::int64_t b, std::int64_t column) {
    return HeadRows{args.xbc.f32() + args.sequences.begin(b) * row + column, row};
  };
  const auto b_rows = [&](std::int64_t b, std::int64_t group) {
    return rows_from(b, heads * head_dim + group * size);
  };
  const auto c_rows = [&](std::int64_t b, std::int64_t group) {
    return rows_from(b, heads * head_dim + (groups + group) * size);
  };

  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = Chunk::floats(size, head_dim);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  float* scores = scratch.tensor({args.xbc.shape[0], groups, kChunk}).f32();
  ctx.threads().parallel_for(count * groups, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / groups;
    const std::int64_t group = task % groups;
    group_scores(b_rows(b, group), c_rows(b, group), size, chunked_length(args.sequences.length(b)),
                 scores + (args.sequences.begin(b) * groups + group) * kChunk, groups * kChunk,
                 slots + slot * slot_floats);
  });
  ctx.threads().parallel_for(count * heads, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / heads;
    const std::int64_t h = task % heads;
    const std::int64_t group = h / (heads / groups);
    const std::int64_t begin = args.sequences.begin(b);
    const Head head{
        .state_size = size,
        .head_dim = head_dim,
        .x = rows_from(b, h * head_dim),
        .b = b_rows(b, group),
        .c = c_rows(b, group),
        .dt = {args.dt.f32() + begin * heads + h, heads},
        .scores = scores + (begin * groups + group) * kChunk,
        .score_stride = groups * kChunk,
        .dt_bias = args.dt_bias.f32()[h],
        .decay_rate = std::exp(args.a_log.f32()[h]),
        .d = args.d.f32()[h],
        .dt_min = args.dt_min,
        .dt_max = args.dt_max,
        .y = args.y.f32() + (begin * heads + h) * head_dim,
        .y_stride = heads * head_dim,
        .state = args.states[static_cast<std::size_t>(b)] + h * size * head_dim,
    };
    head_forward(head, args.sequences.length(b), slots + slot * slot_floats);
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(ssd_target);
void ssd(Context& ctx, const SsdArgs& args) {
  HWY_DYNAMIC_DISPATCH(ssd_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
