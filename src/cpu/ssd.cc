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

namespace {

// Tokens whose states are computed again at a time.
constexpr std::int64_t kBackwardChunk = 16;

struct BackwardHead {
  std::int64_t state_size;  // N
  std::int64_t head_dim;    // P
  HeadRows x, b, c, dt, dy;
  float dt_bias;
  float decay_rate;  // e^a_log
  float d, dt_min, dt_max;
  float* dx;
  float* db;  // [T, N] of this head, rows of db_stride
  float* dc;
  std::int64_t db_stride;
  float* ddt;
  float* dparams;  // [3] of this head and sequence: dt_bias, a_log, d
};

// Memory of a head; P is rounded up to 16, and what is beyond a row's end is zero.
struct BackwardChunk {
  std::int64_t width;
  float* u;       // [16, P], Δ x
  float* dy;      // [16, P]
  float* du;      // [16, P]
  float* rows;    // [17, P], one row of the state before each token and behind the last
  float* da;      // [16, 16], sums of each lane
  float* dt;      // [16], Δ
  float* decay;   // [16], a
  float* ds;      // [N, P], of the state behind the token at hand
  float* states;  // of each chunk [N, P], before it

  static std::int64_t floats(std::int64_t state_size, std::int64_t head_dim, std::int64_t chunks) {
    return round_up(head_dim) * (4 * kBackwardChunk + 1 + (chunks + 1) * state_size) +
           kBackwardChunk * (kBlock + 2);
  }
  BackwardChunk(float* memory, std::int64_t state_size, std::int64_t head_dim)
      : width(round_up(head_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    u = take(kBackwardChunk * width);
    dy = take(kBackwardChunk * width);
    du = take(kBackwardChunk * width);
    rows = take((kBackwardChunk + 1) * width);
    da = take(kBackwardChunk * kBlock);
    dt = take(kBackwardChunk);
    decay = take(kBackwardChunk);
    ds = take(state_size * width);
    states = memory;
  }
};

// Δ, a and u of tokens [begin, begin + tokens).
HWY_INLINE void begin_chunk(const BackwardHead& head, const BackwardChunk& chunk,
                            std::int64_t begin, std::int64_t tokens) {
  std::fill(chunk.dt, chunk.dt + kBackwardChunk, 0.0f);
  for (std::int64_t t = 0; t < tokens; ++t) chunk.dt[t] = *head.dt.row(begin + t);
  for (std::int64_t t = 0; t < kBackwardChunk; t += lanes()) {
    const VF32 raw = softplus(hn::Add(load(chunk.dt + t), hn::Set(kF32, head.dt_bias)));
    const VF32 step = hn::Min(hn::Max(raw, hn::Set(kF32, head.dt_min)), hn::Set(kF32, head.dt_max));
    store(step, chunk.dt + t);
    store(hn::Exp(kF32, hn::Mul(step, hn::Set(kF32, -head.decay_rate))), chunk.decay + t);
  }
  scaled_rows(head.x, begin, tokens, head.head_dim, chunk.dt, chunk.u, chunk.width);
}

// to = decay · from + b · u
HWY_INLINE void advance_row(float decay, const float* from, float b, const float* u, float* to,
                            std::int64_t size) {
  const VF32 factor = hn::Set(kF32, decay);
  const VF32 key = hn::Set(kF32, b);
  for (std::int64_t p = 0; p < size; p += lanes()) {
    store(hn::MulAdd(key, load(u + p), hn::Mul(factor, load(from + p))), to + p);
  }
}

// Token t of the chunk, row n of the state, the tokens behind it done.
HWY_INLINE void row_backward(const BackwardHead& head, const BackwardChunk& chunk,
                             std::int64_t begin, std::int64_t t, std::int64_t n) {
  const std::int64_t size = chunk.width;
  const VF32 key = hn::Set(kF32, head.b.row(begin + t)[n]);
  const VF32 query = hn::Set(kF32, head.c.row(begin + t)[n]);
  const VF32 decay = hn::Set(kF32, chunk.decay[t]);
  const float* before = chunk.rows + t * size;
  const float* after = before + size;
  float* ds = chunk.ds + n * size;
  float* lanes_of_da = chunk.da + t * kBlock;
  VF32 dc = hn::Zero(kF32);
  VF32 db = hn::Zero(kF32);
  VF32 da = load(lanes_of_da);
  for (std::int64_t p = 0; p < size; p += lanes()) {
    const VF32 dy = load(chunk.dy + t * size + p);
    const VF32 d = hn::MulAdd(query, dy, load(ds + p));
    dc = hn::MulAdd(load(after + p), dy, dc);
    db = hn::MulAdd(d, load(chunk.u + t * size + p), db);
    da = hn::MulAdd(d, load(before + p), da);
    float* du = chunk.du + t * size + p;
    store(hn::MulAdd(key, d, load(du)), du);
    store(hn::Mul(decay, d), ds + p);
  }
  store(da, lanes_of_da);
  head.db[(begin + t) * head.db_stride + n] = sum_of(db);
  head.dc[(begin + t) * head.db_stride + n] = sum_of(dc);
}

// What is left of token t when all rows of the state are done.
HWY_INLINE void finish_token(const BackwardHead& head, const BackwardChunk& chunk,
                             std::int64_t begin, std::int64_t t) {
  const float* x = head.x.row(begin + t);
  const float* dy = head.dy.row(begin + t);
  const float* du = chunk.du + t * chunk.width;
  float* dx = head.dx + (begin + t) * head.x.stride;
  const float dt = chunk.dt[t];
  float du_x = 0;
  float dy_x = 0;
  for (std::int64_t p = 0; p < head.head_dim; ++p) {
    dx[p] = dt * du[p] + head.d * dy[p];
    du_x += du[p] * x[p];
    dy_x += dy[p] * x[p];
  }
  const float dlog = -head.decay_rate * chunk.decay[t] * sum_of(load(chunk.da + t * kBlock));
  const double raw = static_cast<double>(*head.dt.row(begin + t)) + head.dt_bias;
  // Not a function of dt where it is clamped.
  const double softplus = std::max(raw, 0.0) + std::log1p(std::exp(-std::abs(raw)));
  const bool clamped = softplus < head.dt_min || softplus > head.dt_max;
  const float draw = clamped ? 0.0f : static_cast<float>((du_x + dlog) / (1 + std::exp(-raw)));
  head.ddt[(begin + t) * head.dt.stride] = draw;
  head.dparams[0] += draw;
  head.dparams[1] += dt * dlog;
  head.dparams[2] += dy_x;
}

// By the recurrence: rows of the state do not depend on one another, so that one row passes all
// tokens of a chunk in the first-level cache. What a chunk starts from is kept, what lies within it
// is computed again.
HWY_INLINE void head_backward(const BackwardHead& head, const BackwardChunk& chunk,
                              std::int64_t length) {
  const std::int64_t size = chunk.width;
  const std::int64_t state_floats = head.state_size * size;
  const std::int64_t count = (length + kBackwardChunk - 1) / kBackwardChunk;
  std::fill(chunk.states, chunk.states + state_floats, 0.0f);
  for (std::int64_t i = 0; i + 1 < count; ++i) {
    const std::int64_t begin = i * kBackwardChunk;
    begin_chunk(head, chunk, begin, kBackwardChunk);
    const float* before = chunk.states + i * state_floats;
    float* after = chunk.states + (i + 1) * state_floats;
    for (std::int64_t n = 0; n < head.state_size; ++n) {
      for (std::int64_t t = 0; t < kBackwardChunk; ++t) {
        advance_row(chunk.decay[t], (t == 0 ? before : after) + n * size, head.b.row(begin + t)[n],
                    chunk.u + t * size, after + n * size, size);
      }
    }
  }
  std::fill(chunk.ds, chunk.ds + state_floats, 0.0f);
  for (std::int64_t i = count - 1; i >= 0; --i) {
    const std::int64_t begin = i * kBackwardChunk;
    const std::int64_t tokens = std::min(kBackwardChunk, length - begin);
    begin_chunk(head, chunk, begin, tokens);
    load_rows(head.dy, begin, tokens, head.head_dim, 1, chunk.dy, size);
    std::fill(chunk.du, chunk.du + tokens * size, 0.0f);
    std::fill(chunk.da, chunk.da + tokens * kBlock, 0.0f);
    for (std::int64_t n = 0; n < head.state_size; ++n) {
      std::copy_n(chunk.states + i * state_floats + n * size, size, chunk.rows);
      for (std::int64_t t = 0; t < tokens; ++t) {
        advance_row(chunk.decay[t], chunk.rows + t * size, head.b.row(begin + t)[n],
                    chunk.u + t * size, chunk.rows + (t + 1) * size, size);
      }
      for (std::int64_t t = tokens - 1; t >= 0; --t) row_backward(head, chunk, begin, t, n);
    }
    for (std::int64_t t = tokens - 1; t >= 0; --t) finish_token(head, chunk, begin, t);
  }
}

}  // namespace

void ssd_backward_target(Context& ctx, const SsdBackwardArgs& args) {
  const std::int64_t heads = args.dy.shape[1];
  const std::int64_t head_dim = args.dy.shape[2];
  const std::int64_t size = args.state_size();
  const std::int64_t groups = args.num_groups;
  const std::int64_t row = args.xbc.shape[1];
  const std::int64_t tokens = args.xbc.shape[0];
  const std::int64_t count = args.sequences.count();
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < count; ++b) longest = std::max(longest, args.sequences.length(b));

  ScratchScope scratch(ctx);
  const std::int64_t slot_floats =
      BackwardChunk::floats(size, head_dim, (longest + kBackwardChunk - 1) / kBackwardChunk);
  float* slots = scratch.tensor({ctx.threads().size(), slot_floats}).f32();
  float* db = scratch.tensor({tokens, heads, size}).f32();
  float* dc = scratch.tensor({tokens, heads, size}).f32();
  float* dparams = scratch.tensor({count, heads, 3}).f32();
  std::fill(dparams, dparams + count * heads * 3, 0.0f);
  ctx.threads().parallel_for(count * heads, [&](std::int64_t task, int slot) {
    const std::int64_t b = task / heads;
    const std::int64_t h = task % heads;
    const std::int64_t group = h / (heads / groups);
    const std::int64_t begin = args.sequences.begin(b);
    const float* rows = args.xbc.f32() + begin * row;
    const BackwardHead head{
        .state_size = size,
        .head_dim = head_dim,
        .x = {rows + h * head_dim, row},
        .b = {rows + heads * head_dim + group * size, row},
        .c = {rows + heads * head_dim + (groups + group) * size, row},
        .dt = {args.dt.f32() + begin * heads + h, heads},
        .dy = {args.dy.f32() + (begin * heads + h) * head_dim, heads * head_dim},
        .dt_bias = args.dt_bias.f32()[h],
        .decay_rate = std::exp(args.a_log.f32()[h]),
        .d = args.d.f32()[h],
        .dt_min = args.dt_min,
        .dt_max = args.dt_max,
        .dx = args.dxbc.f32() + begin * row + h * head_dim,
        .db = db + (begin * heads + h) * size,
        .dc = dc + (begin * heads + h) * size,
        .db_stride = heads * size,
        .ddt = args.ddt.f32() + begin * heads + h,
        .dparams = dparams + task * 3,
    };
    head_backward(head, {slots + slot * slot_floats, size, head_dim}, args.sequences.length(b));
  });
  // b and c of a group got something from each of its heads.
  ctx.threads().parallel_for(tokens, [&](std::int64_t t) {
    float* out = args.dxbc.f32() + t * row + heads * head_dim;
    std::fill(out, out + 2 * groups * size, 0.0f);
    for (std::int64_t h = 0; h < heads; ++h) {
      float* db_row = out + h / (heads / groups) * size;
      float* dc_row = db_row + groups * size;
      for (std::int64_t n = 0; n < size; ++n) {
        db_row[n] += db[(t * heads + h) * size + n];
        dc_row[n] += dc[(t * heads + h) * size + n];
      }
    }
  });
  for (std::int64_t i = 0; i < count * heads; ++i) {
    args.d_dt_bias.f32()[i % heads] += dparams[3 * i];
    args.d_a_log.f32()[i % heads] += dparams[3 * i + 1];
    args.dd.f32()[i % heads] += dparams[3 * i + 2];
  }
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(ssd_target);
HWY_EXPORT(ssd_backward_target);
void ssd(Context& ctx, const SsdArgs& args) {
  HWY_DYNAMIC_DISPATCH(ssd_target)(ctx, args);
}
void ssd_backward(Context& ctx, const SsdBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(ssd_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
