// See ops/delta_rule.h for the equations. One task is one head of one sequence: its chunks follow
// one another, so a task's result does not depend on the number of threads or on other sequences.
#include "ops/delta_rule.h"

#include "cpu/bf16_tiles.h"
#include "cpu/isa.h"

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
  float* state;       // [K, V]
  float scale;        // 1 / √K
  const float* norm;  // [V], or null
  float norm_eps;

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
  // Operands of products by tiles, K' being K rounded up to 32; else null:
  std::uint16_t* left;      // [64, K' + 64], k, or q and beside it the scores
  std::uint16_t* k_left;    // [K, 64], kᵀ
  std::uint16_t* k_right;   // [K', 64], kᵀ packed
  std::uint16_t* su_right;  // [K' + 64, V], the state and below it U packed

  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim, bool tiles) {
    const std::int64_t keys = round_up(key_dim);
    const std::int64_t values = round_up(value_dim);
    const std::int64_t depth = padded_depth(key_dim);
    const std::int64_t bf16 = kChunk * (depth + kChunk + keys + depth) + (depth + kChunk) * values;
    return 3 * kChunk * keys + 2 * kChunk * values + kChunk * kChunk + keys * values +
           (tiles ? bf16 / 2 : 0);
  }
  Chunk(float* memory, std::int64_t key_dim, std::int64_t value_dim, bool tiles)
      : key_stride(round_up(key_dim)), value_stride(round_up(value_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    q = take(kChunk * key_stride);
    k = take(kChunk * key_stride);
    k_t = take(kChunk * key_stride);
    u = take(kChunk * value_stride);
    o = take(kChunk * value_stride);
    scores = take(kChunk * kChunk);
    state = take(key_stride * value_stride);
    const std::int64_t depth = padded_depth(key_dim);
    const auto take_bf16 = [&](std::int64_t n) {
      return tiles ? reinterpret_cast<std::uint16_t*>(take(n / 2)) : nullptr;
    };
    left = take_bf16(kChunk * (depth + kChunk));
    k_left = take_bf16(key_stride * kChunk);
    k_right = take_bf16(depth * kChunk);
    su_right = take_bf16((depth + kChunk) * value_stride);
  }
  bool tiles() const { return left != nullptr; }
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

// scores ← diag(β) scores, below the diagonal.
HWY_INLINE void scale_scores(const Chunk& chunk, const Head& head, std::int64_t begin,
                             std::int64_t length) {
  for (std::int64_t i = 0; i < length; ++i) {
    const float beta = head.beta_at(begin + i);
    for (std::int64_t j = 0; j < i; ++j) chunk.scores[i * kChunk + j] *= beta;
  }
}

// Zeros above the diagonal of the first `rows` rows, up to `width` columns beyond it.
HWY_INLINE void zero_above_diagonal(const Chunk& chunk, std::int64_t rows, std::int64_t width) {
  for (std::int64_t t = 0; t < rows; ++t) {
    float* row = chunk.scores + t * kChunk;
    std::fill(row + t + 1, row + std::min(kChunk, round_up(t + 1) + width), 0.0f);
  }
}

// Solves (I + tril(a, −1)) U = R for 16 rows of U in place of R, sixteen columns in registers at a
// time.
HWY_INLINE void solve_block(const float* a, float* u, std::int64_t columns) {
  for (std::int64_t c = 0; c < columns; c += lanes()) {
    VF32 rows[kBlock];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kBlock; ++i) {
      rows[i] = load(u + i * columns + c);
#pragma GCC unroll 16
      for (std::int64_t j = 0; j < i; ++j) {
        rows[i] = hn::NegMulAdd(hn::Set(kF32, a[i * kChunk + j]), rows[j], rows[i]);
      }
      store(rows[i], u + i * columns + c);
    }
  }
}

// Solves (I + tril(scores, −1)) U = R for rows [first, last), rounded up to a block, in place of R,
// from which what comes of the rows before them has been subtracted.
HWY_INLINE void forward_substitution(const Chunk& chunk, std::int64_t first, std::int64_t last) {
  const std::int64_t stride = chunk.value_stride;
  const float* known = chunk.u + first * stride;
  for (std::int64_t r = first; r < last; r += kBlock) {
    float* u = chunk.u + r * stride;
    small_gemm(kBlock, stride, r - first, {chunk.scores + r * kChunk + first, kChunk, 1}, known,
               stride, u, stride, -1);
    solve_block(chunk.scores + r * kChunk + r, u, stride);
  }
}

// Of a head's token, with its norm if there is one.
HWY_INLINE void store_output(const Head& head, const float* from, std::int64_t t) {
  float* o = head.o + t * head.o_stride;
  if (head.norm != nullptr) {
    normalize(from, head.norm, head.norm_eps, o, head.value_dim);
  } else if (o != from) {
    std::copy_n(from, head.value_dim, o);
  }
}

HWY_INLINE void store_outputs(const Head& head, const Chunk& chunk, std::int64_t begin,
                              std::int64_t length) {
  for (std::int64_t t = 0; t < length; ++t) {
    store_output(head, chunk.o + t * chunk.value_stride, begin + t);
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
  scale_scores(chunk, head, begin, length);
  forward_substitution(chunk, 0, length);

  // O = Q S + tril(Q Kᵀ) U
  std::fill(chunk.o, chunk.o + rows * values, 0.0f);
  small_gemm(rows, values, keys, {chunk.q, keys, 1}, state, values, chunk.o, values);
  lower_scores(chunk, chunk.q, length);
  zero_above_diagonal(chunk, rows, 0);
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, values, r + kBlock, {chunk.scores + r * kChunk, kChunk, 1}, chunk.u, values,
               chunk.o + r * values, values);
  }
  store_outputs(head, chunk, begin, length);

  // S += Kᵀ U
  small_gemm(keys, values, length, {chunk.k_t, kChunk, 1}, chunk.u, values, state, values);
}

#if defined(__x86_64__)
// Columns [begin, end) of the state, for the products of the next chunk.
HWY_INLINE void pack_state(const Chunk& chunk, const float* state, std::int64_t begin,
                           std::int64_t end, std::int64_t depth) {
  bf16::pack_right(state + begin, chunk.value_stride, chunk.key_stride, depth, end - begin,
                   chunk.su_right + begin * (depth + kChunk), depth + kChunk);
}

// The same with the products of bfloat16 matrices by tiles, and a state that has been packed.
// Shorter chunks have zeros for the rows that they lack, and like odd sizes pass through padded
// copies. What the next chunk reads, up to row `end`, is fetched in between.
HWY_INLINE void chunk_forward_by_tiles(const Head& head, const Chunk& chunk, float* state,
                                       std::int64_t begin, std::int64_t length, std::int64_t end) {
  const std::int64_t keys = chunk.key_stride;
  const std::int64_t values = chunk.value_stride;
  const std::int64_t depth = padded_depth(head.key_dim);
  const std::int64_t next = std::min(end, begin + kChunk);
  const std::int64_t next_end = std::min(end, next + kChunk);
  const std::int64_t left_stride = depth + kChunk;
  const std::int64_t right_depth = depth + kChunk;
  std::uint16_t* const u_right = chunk.su_right + depth * kTileSide;
  const bool whole = length == kChunk && keys == head.key_dim && values == head.value_dim;
  const auto padded = [&](HeadRows rows, std::int64_t width, float* copy,
                          std::int64_t stride) HWY_ATTR {
    if (whole) return HeadRows{rows.row(begin), rows.stride};
    load_rows(rows, begin, length, width, 1, copy, stride);
    std::fill(copy + round_up(length) * stride, copy + kChunk * stride, 0.0f);
    return HeadRows{copy, stride};
  };
  // y [kChunk, columns] = left [kChunk, inner] · right
  const auto multiply = [&](const std::uint16_t* right, std::int64_t depth_of_right,
                            std::int64_t inner, std::int64_t columns, float* y,
                            bf16::RowsToFetch* meanwhile) {
    bf16::multiply({.left = chunk.left,
                    .left_stride = left_stride,
                    .right = right,
                    .right_depth = depth_of_right,
                    .rows = kChunk,
                    .columns = columns,
                    .depth = inner,
                    .y = y,
                    .y_stride = columns,
                    .accumulate = false,
                    .meanwhile = meanwhile,
                    .configured = true});
  };
  const auto rows_of_next = [&](HeadRows rows, std::int64_t width) {
    return bf16::RowsToFetch(rows.row(next), rows.stride, next_end - next, width);
  };
  bf16::RowsToFetch next_k = rows_of_next(head.k, head.key_dim);
  bf16::RowsToFetch next_q = rows_of_next(head.q, head.key_dim);
  bf16::RowsToFetch next_v = rows_of_next(head.v, head.value_dim);
  bf16::RowsToFetch outputs(head.o + begin * head.o_stride, head.o_stride, length, head.value_dim);
  const HeadRows k = padded(head.k, head.key_dim, chunk.k, keys);
  const HeadRows v = padded(head.v, head.value_dim, chunk.o, values);
  bf16::round_left(k.data, k.stride, kChunk, keys, 1, chunk.left, left_stride);
  bf16::transpose_left(chunk.left, left_stride, kChunk, depth, chunk.k_right);
  bf16::right_to_left(chunk.k_right, depth, keys, kChunk, chunk.k_left);

  // U: R = diag(β) (V − K S), then the triangular solve: what comes of the first 32 rows is
  // subtracted from the others by tiles.
  multiply(chunk.su_right, right_depth, depth, values, chunk.u, &outputs);
  multiply(chunk.k_right, depth, depth, kChunk, chunk.scores, &next_q);
  for (std::int64_t t = 0; t < kChunk; ++t) {
    const VF32 beta = hn::Set(kF32, t < length ? head.beta_at(begin + t) : 0.0f);
    float* u = chunk.u + t * values;
    for (std::int64_t j = 0; j < values; j += lanes()) {
      store(hn::Mul(beta, hn::Sub(load(v.row(t) + j), load(u + j))), u + j);
    }
  }
  scale_scores(chunk, head, begin, length);
  constexpr std::int64_t kHalf = kChunk / 2;
  static_assert(kHalf == kTileDepth);
  forward_substitution(chunk, 0, kHalf);
  bf16::pack_right(chunk.u, values, kHalf, kHalf, values, u_right, right_depth);
  bf16::round_left(chunk.scores + kHalf * kChunk, kChunk, kHalf, kHalf, -1, chunk.left,
                   left_stride);
  bf16::multiply({.left = chunk.left,
                  .left_stride = left_stride,
                  .right = u_right,
                  .right_depth = right_depth,
                  .rows = kHalf,
                  .columns = values,
                  .depth = kHalf,
                  .y = chunk.u + kHalf * values,
                  .y_stride = values,
                  .accumulate = true,
                  .configured = true});
  forward_substitution(chunk, kHalf, kChunk);
  bf16::pack_right(chunk.u + kHalf * values, values, kHalf, kHalf, values,
                   u_right + kHalf * kTileSide, right_depth);

  // O = [Q | tril(Q Kᵀ)] [S; U]
  const HeadRows q = padded(head.q, head.key_dim, chunk.q, keys);
  bf16::round_left(q.data, q.stride, kChunk, keys, head.scale, chunk.left, left_stride);
  multiply(chunk.k_right, depth, depth, kChunk, chunk.scores, &next_q);
  zero_above_diagonal(chunk, kChunk, kChunk);
  bf16::round_left(chunk.scores, kChunk, kChunk, kChunk, 1, chunk.left + depth, left_stride);
  multiply(chunk.su_right, right_depth, depth + kChunk, values, chunk.o, &next_k);
  store_outputs(head, chunk, begin, length);

  // S += Kᵀ U, and while its columns are near, they are packed.
  constexpr std::int64_t kColumns = 2 * kTileSide;
  for (std::int64_t c = 0; c < values; c += kColumns) {
    const std::int64_t columns = std::min(kColumns, values - c);
    bf16::multiply({.left = chunk.k_left,
                    .left_stride = kChunk,
                    .right = u_right + c * right_depth,
                    .right_depth = right_depth,
                    .rows = keys,
                    .columns = columns,
                    .depth = kChunk,
                    .y = state + c,
                    .y_stride = values,
                    .accumulate = true,
                    .meanwhile = &next_v,
                    .configured = true});
    if (next < end) pack_state(chunk, state, c, c + columns, depth);
  }
}

// Chunks up to row `chunked`, of `length`.
HWY_INLINE void chunks_by_tiles(const Head& head, const Chunk& chunk, float* state,
                                std::int64_t chunked, std::int64_t length) {
  const bf16::WholeTiles tiles;
  pack_state(chunk, state, 0, chunk.value_stride, padded_depth(head.key_dim));
  for (std::int64_t t = 0; t < chunked; t += kChunk) {
    chunk_forward_by_tiles(head, chunk, state, t, std::min(kChunk, chunked - t), length);
  }
}
#endif

HWY_INLINE void head_forward(const Head& head, std::int64_t length, const Chunk& chunk) {
  const std::int64_t tail = length % kChunk;
  const std::int64_t chunked = tail < kMinChunk ? length - tail : length;
  if (chunked > 0) {
    with_padded_state(head.state, head.key_dim, head.value_dim, chunk.state,
                      [&](float* state) HWY_ATTR {
#if defined(__x86_64__)
                        if (chunk.tiles())
                          return chunks_by_tiles(head, chunk, state, chunked, length);
#endif
                        for (std::int64_t t = 0; t < chunked; t += kChunk) {
                          chunk_forward(head, chunk, state, t, std::min(kChunk, chunked - t));
                        }
                      });
  }
  for (std::int64_t t = chunked; t < length; ++t) {
    recurrent_step(head, t, chunk.u);
    store_output(head, head.o + t * head.o_stride, t);
  }
}

}  // namespace

void delta_rule_target(Context& ctx, const DeltaRuleArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  ScratchScope scratch(ctx);
  const bool tiles = args.bf16_products && isa().avx512_bf16;
  const std::int64_t slot_floats = Chunk::floats(key_dim, value_dim, tiles);
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
        .norm = args.norm.data != nullptr ? args.norm.f32() : nullptr,
        .norm_eps = args.norm_eps,
    };
    const Chunk chunk(slots + slot * slot_floats, key_dim, value_dim, tiles);
    head_forward(head, args.sequences.length(b), chunk);
  });
}

namespace {

struct BackwardHead {
  std::int64_t key_dim;    // K
  std::int64_t value_dim;  // V
  HeadRows q, k, v, d_o;
  const float* beta;  // null: ones
  std::int64_t beta_stride;
  float *dq, *dk, *dv;
  float* dbeta;  // null without beta
  float scale;   // 1 / √K

  std::int64_t key_row() const { return q.stride; }
  std::int64_t value_row() const { return v.stride; }
  float beta_at(std::int64_t t) const { return beta != nullptr ? beta[t * beta_stride] : 1.0f; }
};

// Memory of a head; K and V are rounded up to 16, and what is beyond a row's end is zero.
struct BackwardChunk {
  std::int64_t keys, values;
  float* q;        // [64, K], scaled by 1 / √K
  float* k;        // [64, K]
  float* dq;       // [64, K]
  float* dk;       // [64, K]
  float* k_t;      // [K, 64]
  float* d_o;      // [64, V]
  float* u;        // [64, V], β X
  float* u_t;      // [V, 64]
  float* d_r;      // [64, V]
  float* d_e;      // [64, V], β dR
  float* a;        // [64, 64], tril(K Kᵀ, −1)
  float* p;        // [64, 64], tril(Q Kᵀ)
  float* m;        // [64, 64], the triangle at hand of the others
  float* s_t;      // [V, K]
  float* state;    // [K, V], and on the way back dS
  float* states;   // of each chunk [K, V], before it
  float* updates;  // of each chunk [64, V], X

  static std::int64_t floats(std::int64_t key_dim, std::int64_t value_dim, std::int64_t chunks) {
    const std::int64_t keys = round_up(key_dim);
    const std::int64_t values = round_up(value_dim);
    return kChunk * (5 * keys + 5 * values + 3 * kChunk) + 2 * keys * values +
           chunks * (keys * values + kChunk * values);
  }
  BackwardChunk(float* memory, std::int64_t key_dim, std::int64_t value_dim, std::int64_t chunks)
      : keys(round_up(key_dim)), values(round_up(value_dim)) {
    const auto take = [&](std::int64_t n) { return std::exchange(memory, memory + n); };
    for (float** rows : {&q, &k, &dq, &dk, &k_t}) *rows = take(kChunk * keys);
    for (float** rows : {&d_o, &u, &u_t, &d_r, &d_e}) *rows = take(kChunk * values);
    for (float** square : {&a, &p, &m}) *square = take(kChunk * kChunk);
    s_t = take(keys * values);
    state = take(keys * values);
    states = take(chunks * keys * values);
    updates = take(chunks * kChunk * values);
  }

  float* state_before(std::int64_t chunk) const { return states + chunk * keys * values; }
  float* update(std::int64_t chunk) const { return updates + chunk * kChunk * values; }
};

// to [columns, rows] = from [rows, columns]ᵀ
HWY_INLINE void transpose(const float* from, std::int64_t rows, std::int64_t columns, float* to,
                          std::int64_t to_stride) {
  for (std::int64_t c = 0; c < columns; c += kBlock) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = c; i < c + kBlock; ++i) to[i * to_stride + r] = from[r * columns + i];
    }
  }
}

// triangle = alpha · tril(left · right) for rows of a chunk, with zeros above, or with `strict` on
// and above the diagonal; right is [depth, 64].
HWY_INLINE void lower_product(const float* left, std::int64_t depth, const float* right,
                              std::int64_t rows, float alpha, bool strict, float* triangle) {
  std::fill(triangle, triangle + rows * kChunk, 0.0f);
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, r + kBlock, depth, {left + r * depth, depth, 1}, right, kChunk,
               triangle + r * kChunk, kChunk, alpha);
    for (std::int64_t i = r; i < r + kBlock; ++i) {
      float* row = triangle + i * kChunk;
      std::fill(row + i + (strict ? 0 : 1), row + r + kBlock, 0.0f);
    }
  }
}

// to += triangle · from, both [rows, width]
HWY_INLINE void add_lower(const float* triangle, const float* from, std::int64_t rows,
                          std::int64_t width, float* to) {
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, width, r + kBlock, {triangle + r * kChunk, kChunk, 1}, from, width,
               to + r * width, width);
  }
}

// to += triangleᵀ · from, both [rows, width]
HWY_INLINE void add_upper(const float* triangle, const float* from, std::int64_t rows,
                          std::int64_t width, float* to) {
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, width, rows - r, {triangle + r * kChunk + r, 1, kChunk}, from + r * width,
               width, to + r * width, width);
  }
}

HWY_INLINE void load_keys(const BackwardHead& head, const BackwardChunk& chunk, std::int64_t begin,
                          std::int64_t length) {
  load_rows(head.k, begin, length, head.key_dim, 1, chunk.k, chunk.keys);
  transpose(chunk.k, round_up(length), chunk.keys, chunk.k_t, kChunk);
  lower_product(chunk.k, chunk.keys, chunk.k_t, round_up(length), 1, true, chunk.a);
}

// u_i = β_i · x_i; rows behind the last are zeros in x.
HWY_INLINE void scale_row(const BackwardHead& head, std::int64_t begin, std::int64_t length,
                          std::int64_t i, const float* x, float* u, std::int64_t width) {
  const VF32 beta = hn::Set(kF32, i < length ? head.beta_at(begin + i) : 0.0f);
  for (std::int64_t j = 0; j < width; j += lanes()) {
    store(hn::Mul(beta, load(x + i * width + j)), u + i * width + j);
  }
}

// The updates and states of a chunk: X = V − K S − tril(K Kᵀ, −1) U with U = diag(β) X, then
// S += Kᵀ U.
HWY_INLINE void chunk_states(const BackwardHead& head, const BackwardChunk& chunk,
                             std::int64_t index, std::int64_t begin, std::int64_t length) {
  const std::int64_t width = chunk.values;
  const std::int64_t rows = round_up(length);
  float* x = chunk.update(index);
  std::copy_n(chunk.state, chunk.keys * width, chunk.state_before(index));
  load_keys(head, chunk, begin, length);
  load_rows(head.v, begin, length, head.value_dim, 1, x, width);
  small_gemm(rows, width, chunk.keys, {chunk.k, chunk.keys, 1}, chunk.state, width, x, width, -1);
  for (std::int64_t r = 0; r < rows; r += kBlock) {
    small_gemm(kBlock, width, r, {chunk.a + r * kChunk, kChunk, 1}, chunk.u, width, x + r * width,
               width, -1);
    for (std::int64_t i = r; i < r + kBlock; ++i) {
      small_gemm(1, width, i - r, {chunk.a + i * kChunk + r, kChunk, 1}, chunk.u + r * width, width,
                 x + i * width, width, -1);
      scale_row(head, begin, length, i, x, chunk.u, width);
    }
  }
  small_gemm(chunk.keys, width, length, {chunk.k_t, kChunk, 1}, chunk.u, width, chunk.state, width);
}

// dR and dE from dU in place of dR: (I + diag(β) A)ᵀ dR = dU, dE = diag(β) dR.
HWY_INLINE void back_substitution(const BackwardHead& head, const BackwardChunk& chunk,
                                  std::int64_t begin, std::int64_t length) {
  const std::int64_t width = chunk.values;
  const std::int64_t rows = round_up(length);
  for (std::int64_t r = rows - kBlock; r >= 0; r -= kBlock) {
    const std::int64_t next = r + kBlock;
    small_gemm(kBlock, width, rows - next, {chunk.a + next * kChunk + r, 1, kChunk},
               chunk.d_e + next * width, width, chunk.d_r + r * width, width, -1);
    for (std::int64_t i = next - 1; i >= r; --i) {
      small_gemm(1, width, next - i - 1, {chunk.a + (i + 1) * kChunk + i, 1, kChunk},
                 chunk.d_e + (i + 1) * width, width, chunk.d_r + i * width, width, -1);
      scale_row(head, begin, length, i, chunk.d_r, chunk.d_e, width);
    }
  }
}

// dQ = dO Sᵀ + tril(dO Uᵀ) K
// dK = tril(dO Uᵀ)ᵀ Q + U dSᵀ − dE Sᵀ − tril(dE Uᵀ, −1) K − tril(dE Uᵀ, −1)ᵀ K
HWY_INLINE void query_and_key_gradients(const BackwardChunk& chunk, const float* state,
                                        std::int64_t rows) {
  const std::int64_t keys = chunk.keys;
  const std::int64_t values = chunk.values;
  std::fill(chunk.dq, chunk.dq + rows * keys, 0.0f);
  std::fill(chunk.dk, chunk.dk + rows * keys, 0.0f);
  transpose(chunk.state, keys, values, chunk.s_t, keys);
  small_gemm(rows, keys, values, {chunk.u, values, 1}, chunk.s_t, keys, chunk.dk, keys);
  transpose(state, keys, values, chunk.s_t, keys);
  small_gemm(rows, keys, values, {chunk.d_o, values, 1}, chunk.s_t, keys, chunk.dq, keys);
  small_gemm(rows, keys, values, {chunk.d_e, values, 1}, chunk.s_t, keys, chunk.dk, keys, -1);
  transpose(chunk.u, rows, values, chunk.u_t, kChunk);
  lower_product(chunk.d_o, values, chunk.u_t, rows, 1, false, chunk.m);
  add_lower(chunk.m, chunk.k, rows, keys, chunk.dq);
  add_upper(chunk.m, chunk.q, rows, keys, chunk.dk);
  lower_product(chunk.d_e, values, chunk.u_t, rows, -1, true, chunk.m);
  add_lower(chunk.m, chunk.k, rows, keys, chunk.dk);
  add_upper(chunk.m, chunk.k, rows, keys, chunk.dk);
}

// chunk.state is dS of the state behind the chunk, and then of the one before it.
HWY_INLINE void chunk_backward(const BackwardHead& head, const BackwardChunk& chunk,
                               std::int64_t index, std::int64_t begin, std::int64_t length) {
  const std::int64_t keys = chunk.keys;
  const std::int64_t values = chunk.values;
  const std::int64_t rows = round_up(length);
  const float* x = chunk.update(index);
  load_keys(head, chunk, begin, length);
  load_rows(head.q, begin, length, head.key_dim, head.scale, chunk.q, keys);
  load_rows(head.d_o, begin, length, head.value_dim, 1, chunk.d_o, values);
  for (std::int64_t i = 0; i < rows; ++i) scale_row(head, begin, length, i, x, chunk.u, values);

  // dU = tril(Q Kᵀ)ᵀ dO + K dS
  lower_product(chunk.q, keys, chunk.k_t, rows, 1, false, chunk.p);
  std::fill(chunk.d_r, chunk.d_r + rows * values, 0.0f);
  small_gemm(rows, values, keys, {chunk.k, keys, 1}, chunk.state, values, chunk.d_r, values);
  add_upper(chunk.p, chunk.d_o, rows, values, chunk.d_r);
  back_substitution(head, chunk, begin, length);
  query_and_key_gradients(chunk, chunk.state_before(index), rows);

  // dS += Qᵀ dO − Kᵀ dE
  small_gemm(keys, values, length, {chunk.q, 1, keys}, chunk.d_o, values, chunk.state, values);
  small_gemm(keys, values, length, {chunk.k_t, kChunk, 1}, chunk.d_e, values, chunk.state, values,
             -1);
  for (std::int64_t t = 0; t < length; ++t) {
    float* dq = head.dq + (begin + t) * head.key_row();
    for (std::int64_t i = 0; i < head.key_dim; ++i) dq[i] = head.scale * chunk.dq[t * keys + i];
    std::copy_n(chunk.dk + t * keys, head.key_dim, head.dk + (begin + t) * head.key_row());
    std::copy_n(chunk.d_e + t * values, head.value_dim, head.dv + (begin + t) * head.value_row());
    if (head.dbeta == nullptr) continue;
    VF32 sum = hn::Zero(kF32);
    for (std::int64_t j = 0; j < values; j += lanes()) {
      sum = hn::MulAdd(load(chunk.d_r + t * values + j), load(x + t * values + j), sum);
    }
    head.dbeta[(begin + t) * head.beta_stride] = sum_of(sum);
  }
}

HWY_INLINE void head_backward(const BackwardHead& head, const BackwardChunk& chunk,
                              std::int64_t length) {
  std::fill(chunk.state, chunk.state + chunk.keys * chunk.values, 0.0f);
  for (std::int64_t t = 0; t < length; t += kChunk) {
    chunk_states(head, chunk, t / kChunk, t, std::min(kChunk, length - t));
  }
  std::fill(chunk.state, chunk.state + chunk.keys * chunk.values, 0.0f);
  for (std::int64_t index = (length - 1) / kChunk; index >= 0; --index) {
    const std::int64_t begin = index * kChunk;
    chunk_backward(head, chunk, index, begin, std::min(kChunk, length - begin));
  }
}

}  // namespace

void delta_rule_backward_target(Context& ctx, const DeltaRuleBackwardArgs& args) {
  const std::int64_t heads = args.q.shape[1];
  const std::int64_t key_dim = args.q.shape[2];
  const std::int64_t value_dim = args.v.shape[2];
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < args.sequences.count(); ++b) {
    longest = std::max(longest, args.sequences.length(b));
  }
  const std::int64_t chunks = (longest + kChunk - 1) / kChunk;
  ScratchScope scratch(ctx);
  const std::int64_t slot_floats = BackwardChunk::floats(key_dim, value_dim, chunks);
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
        .v = {values_at(args.v), heads * value_dim},
        .d_o = {values_at(args.d_o), heads * value_dim},
        .beta = args.beta.data != nullptr ? args.beta.f32() + row : nullptr,
        .beta_stride = heads,
        .dq = keys_at(args.dq),
        .dk = keys_at(args.dk),
        .dv = values_at(args.dv),
        .dbeta = args.beta.data != nullptr ? args.dbeta.f32() + row : nullptr,
        .scale = 1 / std::sqrt(static_cast<float>(key_dim)),
    };
    head_backward(head, {slots + slot * slot_floats, key_dim, value_dim, chunks},
                  args.sequences.length(b));
  });
}

}  // namespace deltafox::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deltafox::cpu {
HWY_EXPORT(delta_rule_target);
HWY_EXPORT(delta_rule_backward_target);
void delta_rule(Context& ctx, const DeltaRuleArgs& args) {
  HWY_DYNAMIC_DISPATCH(delta_rule_target)(ctx, args);
}
void delta_rule_backward(Context& ctx, const DeltaRuleBackwardArgs& args) {
  HWY_DYNAMIC_DISPATCH(delta_rule_backward_target)(ctx, args);
}
}  // namespace deltafox::cpu
#endif
